"""A saved state comes back bitwise, or the one before it does; a folder belongs to one run."""

import asyncio
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mlrl import checkpoints, folders
from mlrl.types import Refused, TrainState


def make_state(seed=0, width=4):
    params = {
        "embed": jax.random.normal(jax.random.key(seed), (8, width)),
        "half": jnp.full((3,), 1.0 + seed, jnp.bfloat16),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    updates, opt_state = optimizer.update(params, optimizer.init(params), params)
    return TrainState(
        step=jnp.int32(seed), key=jax.random.key(seed + 7), params=optax.apply_updates(params, updates),
        opt_state=opt_state, reference=(), curriculum={"weights": jnp.ones(3) / 3}, reward=(),
        controllers={"kl": {"coef": jnp.float32(0.1), "key": jax.random.key(seed, impl="rbg")}},
        bad_updates=jnp.int32(0),
    )  # fmt: skip


def abstract(state):
    return jax.eval_shape(lambda: state)


def assert_bitwise(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for path, leaf in jax.tree_util.tree_leaves_with_path(want):
        found = dict(jax.tree_util.tree_leaves_with_path(got))[path]
        assert found.dtype == leaf.dtype, path
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            found, leaf = jax.random.key_data(found), jax.random.key_data(leaf)
        assert np.asarray(found).tobytes() == np.asarray(leaf).tobytes(), path


def saved(folder, steps=(0,), **knobs):
    manager = checkpoints.open_manager(folder, **knobs)
    for step in steps:
        checkpoints.save(manager, step, make_state(step))
    checkpoints.wait(manager)
    return manager


def test_a_state_comes_back_bitwise_with_keys_and_optimizer(tmp_path):
    state = make_state(3)
    checkpoints.close(saved(tmp_path / "c", [3]))
    manager = checkpoints.open_manager(tmp_path / "c")
    restored = checkpoints.restore(manager, abstract(state))
    assert_bitwise(restored, state)
    assert jax.random.uniform(restored.key) == jax.random.uniform(state.key)
    assert int(restored.opt_state[1][0].count) == 1  # adam's state is still a named tuple
    assert_bitwise(checkpoints.restore(manager, state), state)  # concrete templates too
    checkpoints.close(manager)


def test_leaves_get_the_sharding_of_the_template(tmp_path):
    state = make_state(1)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    place = lambda x: jax.ShapeDtypeStruct(  # noqa: E731
        x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec("data") if x.shape == (8, 4) else PartitionSpec())
    )
    template = jax.tree.map(place, abstract(state))
    manager = saved(tmp_path / "c", [1])
    restored = checkpoints.restore(manager, template)
    assert_bitwise(restored, state)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(template)):
        assert got.sharding.is_equivalent_to(want.sharding, len(want.shape))
    checkpoints.save(manager, 2, restored)  # and a sharded state is saved, and restored on one device
    checkpoints.wait(manager)
    assert_bitwise(checkpoints.restore(manager, abstract(state)), state)
    checkpoints.close(manager)


def test_numpy_and_python_leaves_of_host_rewards_survive(tmp_path):
    state = make_state().replace(reward={"seen": np.arange(3, dtype=np.int64), "count": 5, "mean": 0.25})
    manager = checkpoints.open_manager(tmp_path / "c")
    checkpoints.save(manager, 0, state)
    checkpoints.wait(manager)
    reward = checkpoints.restore(manager, state).reward
    assert isinstance(reward["seen"], np.ndarray) and reward["seen"].dtype == np.int64
    assert reward["seen"].tolist() == [0, 1, 2] and reward["count"] == 5 and reward["mean"] == 0.25
    checkpoints.close(manager)


def test_a_state_may_be_donated_right_after_save(tmp_path):
    state = make_state().replace(params={"w": jnp.arange(1 << 20, dtype=jnp.float32)})
    want = np.asarray(state.params["w"]).copy()
    step = jax.jit(lambda s: s.replace(params=jax.tree.map(lambda x: -x - 1, s.params)), donate_argnums=0)
    manager, template = checkpoints.open_manager(tmp_path / "c"), abstract(state)
    checkpoints.save(manager, 0, state)
    for _ in range(3):
        state = step(state)
    jax.block_until_ready(state.params)
    checkpoints.wait(manager)
    np.testing.assert_array_equal(checkpoints.restore(manager, template).params["w"], want)
    checkpoints.close(manager)


def test_the_last_steps_and_the_best_stay(tmp_path):
    manager = checkpoints.open_manager(tmp_path / "c", keep_last=2, keep_best=1, best_metric="gsm8k/greedy")
    for step, quality in enumerate([0.1, 0.9, 0.3, float("nan"), 0.2, None]):
        metrics = {} if quality is None else {"eval/gsm8k/greedy": quality}
        assert checkpoints.save(manager, step, make_state(step), metrics)
    checkpoints.close(manager)
    manager = checkpoints.open_manager(tmp_path / "c", best_metric="gsm8k/greedy")
    assert sorted(manager.orbax.all_steps()) == [1, 4, 5]
    assert checkpoints.best_step(manager) == 1
    assert checkpoints.latest_step(tmp_path / "c") == 5
    assert_bitwise(checkpoints.restore(manager, abstract(make_state()), step=1), make_state(1))
    assert not checkpoints.save(manager, 5, make_state(5))  # already there
    checkpoints.close(manager)


def test_without_a_metric_only_the_last_stay(tmp_path):
    checkpoints.close(saved(tmp_path / "c", range(4), keep_last=1, keep_best=3))
    assert [p.name for p in (tmp_path / "c").iterdir() if p.name.isdigit()] == ["3"]


def test_a_misspelled_best_metric_is_said(tmp_path, caplog):
    manager = checkpoints.open_manager(tmp_path / "c", best_metric="gsm8k/gredy")
    with caplog.at_level(logging.WARNING, "mlrl"):
        checkpoints.save(manager, 0, make_state(), {"eval/gsm8k/greedy": 0.5})
    assert "gsm8k/gredy" in caplog.text and "eval/gsm8k/greedy" in caplog.text
    checkpoints.close(manager)


def test_no_checkpoint_is_refused(tmp_path):
    assert checkpoints.latest_step(tmp_path / "nowhere") is None
    manager = checkpoints.open_manager(tmp_path / "c")
    assert checkpoints.latest_step(tmp_path / "c") is None
    with pytest.raises(Refused, match="no complete checkpoint"):
        checkpoints.restore(manager, abstract(make_state()))
    checkpoints.close(manager)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.replace(params={**s.params, "embed": jnp.zeros((8, 5))}),
         r"has params\['embed'\] as float32\[8, 4\], but this run has it as float32\[8, 5\]"),
        (lambda s: s.replace(params={**s.params, "embed": jnp.zeros((8, 4), jnp.bfloat16)}),
         r"params\['embed'\] as float32\[8, 4\], but this run has it as bfloat16"),
        (lambda s: s.replace(params={**s.params, "new": jnp.zeros(2)}), r"has no params\['new'\].*float32\[2\]"),
        (lambda s: s.replace(params={"embed": s.params["embed"]}), r"has params\['half'\], which this run does not"),
        (lambda s: s.replace(opt_state=optax.sgd(0.1, momentum=0.9).init(s.params)), r"has no opt_state\[0\]\.trace"),
        (lambda s: s.replace(key=jax.random.key(0, impl="rbg")), r"key as key<fry>\[\].*key<rbg>\[\]"),
    ],
)  # fmt: skip
def test_another_tree_is_refused_by_its_first_leaf(tmp_path, change, message):
    manager = saved(tmp_path / "c")
    with pytest.raises(Refused, match=message) as refusal:
        checkpoints.restore(manager, abstract(change(make_state())))
    assert "\n" not in str(refusal.value)
    assert checkpoints.latest_step(tmp_path / "c") == 0  # nothing was set aside
    checkpoints.close(manager)


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("damage", ["flip", "remove", "truncate", "name"])
def test_a_damaged_step_is_passed_over(tmp_path, caplog, damage):
    state = make_state(2).replace(params={"w": jax.random.normal(jax.random.key(0), (128, 128))})
    manager = checkpoints.open_manager(tmp_path / "c")
    for step in (1, 2):
        checkpoints.save(manager, step, state.replace(step=jnp.int32(step)))
    checkpoints.close(manager)
    victim = largest_file(tmp_path / "c" / "2" / "state")
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
        victim.write_bytes(content)
    elif damage == "name":  # a bit of it, with which the step looks like one of another configuration
        victim = tmp_path / "c" / "2" / "leaves" / "metadata"
        victim.write_text(victim.read_text().replace("params", "parals"))
    elif damage == "truncate":
        victim.write_bytes(content[: len(content) // 2])
    else:
        victim.unlink()
    watching = checkpoints.open_manager(tmp_path / "c", read_only=True)
    with caplog.at_level(logging.WARNING, "mlrl"):
        assert int(checkpoints.restore(watching, abstract(state)).step) == 1
    assert "c/2 is damaged" in caplog.text and len(caplog.records) == 1 and "\n" not in caplog.messages[0]
    assert (tmp_path / "c" / "2").is_dir()
    manager = checkpoints.open_manager(tmp_path / "c")
    restored = checkpoints.restore(manager, abstract(state))
    assert_bitwise(restored, state.replace(step=jnp.int32(1)))
    assert (tmp_path / "c_unreadable" / "2.0").is_dir()
    assert checkpoints.save(manager, 2, restored.replace(step=jnp.int32(2)))  # the run goes on over the gap
    checkpoints.close(manager)
    assert checkpoints.latest_step(tmp_path / "c") == 2


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"quality": "x"}'])
def test_damaged_metrics_cost_a_step_its_rank_and_nothing_else(tmp_path, caplog, content):
    checkpoints.close(saved(tmp_path / "c", [1, 2]))
    (tmp_path / "c" / "2" / "metrics" / "metrics").write_bytes(content)
    with pytest.raises(Refused, match="metrics/metrics is damaged: `mlrl train`"):
        checkpoints.open_manager(tmp_path / "c", read_only=True)
    with caplog.at_level(logging.WARNING, "mlrl"):
        manager = checkpoints.open_manager(tmp_path / "c")
    assert "c/2 are damaged and left out" in caplog.text and len(caplog.records) == 1
    assert_bitwise(checkpoints.restore(manager, abstract(make_state(2))), make_state(2))
    assert checkpoints.save(manager, 3, make_state(3), {"a": 1.0})
    checkpoints.close(manager)
    assert checkpoints.latest_step(tmp_path / "c") == 3


@pytest.mark.parametrize("damage", ["flip", "remove", "name"])
def test_damaged_parameters_are_refused(tmp_path, damage):
    """They are read alone for another run, and for an export."""
    state = make_state(2).replace(params={"w": jax.random.normal(jax.random.key(0), (128, 128))}, opt_state=())
    manager = checkpoints.open_manager(tmp_path / "c")
    checkpoints.save(manager, 1, state)
    checkpoints.close(manager)
    wanted = jax.eval_shape(lambda: state.params)
    np.testing.assert_array_equal(checkpoints.restore_params(tmp_path / "c", wanted)["w"], state.params["w"])
    victim = largest_file(tmp_path / "c" / "1" / "state")
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    if damage == "name":
        victim = tmp_path / "c" / "1" / "leaves" / "metadata"
        content = victim.read_bytes().replace(b"params", b"parals")
    victim.unlink() if damage == "remove" else victim.write_bytes(content)
    with pytest.raises(Refused, match="c/1 is damaged .*: `mlrl train` on its run sets it aside"):
        checkpoints.restore_params(tmp_path / "c", wanted)


def test_an_error_of_a_save_is_said_once(tmp_path, monkeypatch, caplog):
    """What a full disk makes tensorstore print and asyncio log beside it; see the drill `ends`."""
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    for _ in range(2):
        checkpoints.close(checkpoints.open_manager(tmp_path / "c"))
    loop = asyncio.new_event_loop()
    loop.close()
    for late in (loop.call_soon_threadsafe, loop.call_soon):
        try:
            late(print)
        except RuntimeError as error:
            trace = error.__traceback__.tb_next  # without this frame: nothing of Python's called it
            sys.unraisablehook(types.SimpleNamespace(exc_value=error, exc_traceback=trace))
    assert [said.exc_traceback.tb_frame.f_code.co_name for said in seen] == ["call_soon"]
    with pytest.raises(Exception) as of_orbax:
        checkpoints.ocp.CheckpointManager(3)
    for error in (of_orbax.value, ValueError("another")):
        logging.getLogger("asyncio").error("Task exception was never retrieved", exc_info=error)
    assert [record.exc_info[1].args for record in caplog.records] == [("another",)]


def test_only_damaged_steps_are_refused(tmp_path):
    checkpoints.close(saved(tmp_path / "c", [4]))
    largest_file(tmp_path / "c" / "4" / "leaves").write_text("{")
    manager = checkpoints.open_manager(tmp_path / "c")
    with pytest.raises(Refused, match="none of the checkpoints .* can be read .tried 4."):
        checkpoints.restore(manager, abstract(make_state()))
    checkpoints.close(manager)


CHILD = """
import sys, jax, jax.numpy as jnp
from mlrl import checkpoints
manager = checkpoints.open_manager(sys.argv[1], keep_last=3)
w = jnp.zeros(1 << 21)
for step in range(10**6):
    checkpoints.save(manager, step, {"step": jnp.int32(step), "w": w + step})
    print(step, flush=True)
"""


def test_kill_in_the_middle_of_a_save_leaves_the_last_complete_step(tmp_path):
    repo = pathlib.Path(__file__).resolve().parent.parent
    env = {**os.environ, "PYTHONPATH": str(repo), "XLA_FLAGS": ""}
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path / "c")], stdout=subprocess.PIPE, env=env)
    for line in child.stdout:
        if int(line) >= 4:
            break
    time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    last = checkpoints.latest_step(tmp_path / "c")
    assert last is not None and last >= 2
    template = jax.eval_shape(lambda: {"step": jnp.int32(0), "w": jnp.zeros(1 << 21)})
    manager = checkpoints.open_manager(tmp_path / "c")
    state = checkpoints.restore(manager, template)
    assert int(state["step"]) == last and bool(jnp.all(state["w"] == last))
    assert checkpoints.save(manager, last + 1, state)
    checkpoints.close(manager)
    assert checkpoints.latest_step(tmp_path / "c") == last + 1


def test_a_partial_step_does_not_count(tmp_path):
    manager = saved(tmp_path / "c", [1, 2])
    checkpoints.close(manager)
    complete = tmp_path / "c" / "2"
    complete.rename(tmp_path / "c" / "2.orbax-checkpoint-tmp")
    assert checkpoints.latest_step(tmp_path / "c") == 1
    manager = checkpoints.open_manager(tmp_path / "c")
    assert int(checkpoints.restore(manager, abstract(make_state())).step) == 1
    checkpoints.close(manager)


@pytest.mark.parametrize("error, words", [
    (OSError(28, "No space left on device"), "no space left on the device"),
    (ValueError("UNKNOWN: Failed to write [OS error 27: EFBIG File too large]"), "larger than is allowed here"),
    (ValueError("Read-only file system"), "the file system is read-only"),
])  # fmt: skip
def test_a_disk_that_takes_no_more_is_one_line_and_keeps_the_last_step(tmp_path, monkeypatch, error, words):
    manager = saved(tmp_path / "c", [1])

    def full(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(type(manager.orbax), "save", full)
        with pytest.raises(Refused, match=f"{words}.*; step 1 is complete") as refusal:
            checkpoints.save(manager, 2, make_state(2))
    assert "\n" not in str(refusal.value)
    assert int(checkpoints.restore(manager, abstract(make_state())).step) == 1
    checkpoints.close(manager)


FULL = """
import resource, sys, jax.numpy as jnp
from mlrl import checkpoints
manager = checkpoints.open_manager(sys.argv[1])
checkpoints.save(manager, 1, {"w": jnp.zeros(4)})
checkpoints.wait(manager)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
try:
    checkpoints.save(manager, 2, {"w": jnp.arange(1e5)})
    checkpoints.close(manager)
except checkpoints.Refused as refusal:
    print(refusal)
"""


def test_a_disk_that_takes_no_more_in_the_background_prints_no_trace(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).resolve().parent.parent), "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / "c")], env=env, capture_output=True, text=True)
    assert "larger than is allowed here (ulimit -f); step 1 is complete" in done.stdout, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="cannot write in .*file/c"):
        checkpoints.open_manager(tmp_path / "file" / "c")
    with pytest.raises(Refused, match="keep_last must be at least 1, got 0"):
        checkpoints.open_manager(tmp_path / "c", keep_last=0)


CONFIG = """# made by mlrl
from __gin__ import dynamic_registration

SEED = 0
Experiment.num_steps = 10
Experiment.losses = [
    @policy_loss(),
    @entropy_bonus(),
]
train.note = 'a (b'
train.loop = \\
    @online()
"""


def test_a_bucket_is_no_folder():
    with pytest.raises(Refused, match="gs://b/run is no path of this machine: mount the bucket"):
        checkpoints.claim_run_folder("gs://b/run", CONFIG)


def test_a_folder_belongs_to_one_run(tmp_path):
    folder = tmp_path / "runs" / "a"
    assert not checkpoints.claim_run_folder(folder, CONFIG)
    assert (folder / "config.gin").read_text() == CONFIG
    (folder / "metrics.jsonl").write_text("{}\n")
    assert checkpoints.claim_run_folder(folder, CONFIG)
    assert checkpoints.claim_run_folder(folder, CONFIG.replace("# made by mlrl\n", "# by hand\n\n"))
    other = CONFIG.replace("SEED = 0", "SEED = 1").replace("@entropy_bonus", "@value_loss")
    checkpoints.claim_run_folder(folder, other)  # no checkpoint yet: what was refused early is given up
    checkpoints.claim_run_folder(folder, CONFIG)
    (folder / "checkpoints" / "0").mkdir(parents=True)
    with pytest.raises(Refused) as refusal:
        checkpoints.claim_run_folder(folder, other)
    message = str(refusal.value)
    assert "-SEED = 0; +SEED = 1" in message and "-Experiment.losses = [ @policy_loss(), @entropy" in message
    assert "num_steps" not in message and "\n" not in message
    assert (folder / "config.gin").read_text().endswith("@online()\n")


def test_named_bindings_may_differ(tmp_path):
    checkpoints.claim_run_folder(tmp_path / "a", CONFIG)
    (tmp_path / "a" / "checkpoints" / "0").mkdir(parents=True)
    longer = CONFIG.replace("num_steps = 10", "num_steps = 20")
    with pytest.raises(Refused, match=r"-Experiment.num_steps = 10; \+Experiment.num_steps = 20"):
        checkpoints.claim_run_folder(tmp_path / "a", longer, may_differ=("steps",))
    assert checkpoints.claim_run_folder(tmp_path / "a", longer, may_differ=("num_steps",))
    assert (tmp_path / "a" / "config.gin").read_text() == longer


def test_what_lays_a_run_out_over_devices_may_differ(tmp_path):
    lines = ("TENSOR = 2", "online.Experiment.mesh = @meshes.mesh", "online.Experiment.rollout_mesh = @meshes.same",
             "online.Experiment.micro_batch_rows = 8", "meshes.mesh.fsdp = 4", "meshes.mesh.tensor = %TENSOR",
             "online.Experiment.prompts_per_step = 32")  # fmt: skip
    other = ("TENSOR = 8", "online.Experiment.mesh = @my.mesh", "online.Experiment.rollout_mesh = @meshes.rearranged",
             "online.Experiment.micro_batch_rows = 64", "meshes.rearranged.tensor = 2", "meshes.mesh.fsdp = 0",
             "meshes.mesh.tensor = %TENSOR", "online.Experiment.prompts_per_step = 32")  # fmt: skip
    checkpoints.claim_run_folder(tmp_path, CONFIG + "\n".join(lines))
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    assert checkpoints.claim_run_folder(tmp_path, CONFIG + "\n".join(other), may_differ=folders.LAYOUT)
    with pytest.raises(Refused, match="-online.Experiment.prompts_per_step = 32; .online.Experiment.prompts_per_step"):
        checkpoints.claim_run_folder(tmp_path, CONFIG + "\n".join(other).replace("= 32", "= 64"),
                                     may_differ=folders.LAYOUT)  # fmt: skip


def test_foreign_folders_are_refused(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("")
    with pytest.raises(Refused, match="thesis is not empty and holds no run .found chapter1.tex."):
        checkpoints.claim_run_folder(tmp_path / "thesis", CONFIG)
    assert os.listdir(tmp_path / "thesis") == ["chapter1.tex"]
    with pytest.raises(Refused, match="is a file"):
        checkpoints.claim_run_folder(tmp_path / "thesis" / "chapter1.tex", CONFIG)
    with pytest.raises(Refused, match="cannot write in"):
        checkpoints.claim_run_folder(tmp_path / "thesis" / "chapter1.tex" / "run", CONFIG)
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / ".gitkeep").write_text("")
    assert not checkpoints.claim_run_folder(tmp_path / "fresh", CONFIG)


def test_statements_join_lines():
    assert list(folders.statements(CONFIG)) == [
        "from __gin__ import dynamic_registration",
        "SEED = 0",
        "Experiment.num_steps = 10",
        "Experiment.losses = [ @policy_loss(), @entropy_bonus(), ]",
        "train.note = 'a (b'",
        "train.loop = @online()",
    ]


def test_files_are_written_whole(tmp_path):
    folders.write_atomically(tmp_path / "r.json", json.dumps({"a": 1}))
    folders.write_atomically(tmp_path / "r.json", json.dumps({"a": 2}))
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": 2} and os.listdir(tmp_path) == ["r.json"]
    with pytest.raises(Refused, match="cannot write"):
        folders.write_atomically(tmp_path / "r.json" / "x", "")


def test_a_macro_behind_such_a_binding_may_differ_too(tmp_path):
    text = "STEPS = 10\nSEED = 1\nExperiment.num_steps = %STEPS\n"
    longer = text.replace("STEPS = 10", "STEPS = 20")
    assert folders.config_differences(text, longer, may_differ=("num_steps",)) == []
    assert folders.config_differences(text, longer) == ["-STEPS = 10", "+STEPS = 20"]
    assert folders.config_differences(text, longer.replace("SEED = 1", "SEED = 2"), may_differ=("num_steps",)) == [
        "-SEED = 1",
        "+SEED = 2",
    ]
