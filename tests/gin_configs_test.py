"""Every gin file parses, is wholly used, and runs one tiny step."""

import dataclasses
import functools
import json
import math
import pathlib
import re

import jax
import pytest

from mlrl import checkpoints, main, meshes, runs, selection
from mlrl.loops import offline, online, states
from mlrl.loops.checks import meshes_of
from mlrl.loops.start import random_parameters
from mlrl.models import pretrained
from mlrl.models.transformer import Config, Transformer, initialize
from mlrl.rewards.lifting import lift
from mlrl.types import Refused

REPO = pathlib.Path(__file__).resolve().parent.parent
DATA = REPO.parent / "shared" / "data"
EXPERIMENTS = sorted(path.relative_to(REPO).as_posix() for path in REPO.glob("experiments/**/*.gin"))
METHODS = sorted(path.stem for path in REPO.glob("gin/methods/*.gin"))
MESHES = {
    "data": {"data": 8}, "fsdp": {"fsdp": 8}, "tensor": {"data": 4, "tensor": 2},
    "fsdp_tensor": {"fsdp": 4, "tensor": 2}, "expert": {"fsdp": 4, "expert": 2}, "sequence": {"fsdp": 4, "sequence": 2},
}  # fmt: skip
FILES = sorted(path.relative_to(REPO).as_posix() for path in REPO.glob("gin/**/*.gin")) + EXPERIMENTS
# make test-all runs them all. An experiment that runs is loaded first.
LOADED_QUICKLY = {"experiments/quickstart/random_reward.gin"}
RUN_QUICKLY = {"experiments/quickstart/grpo.gin", "ppo", "kto"}

WITH_VALUES = {"ppo", "ma_ppo", "ppo_shared", "rlhf", "reward_model", "process_reward_model"}
WITH_A_CRITIC = {"ppo", "ma_ppo", "rlhf"}

slow = functools.partial(pytest.param, marks=pytest.mark.slow)

ONLINE = """from __gin__ import dynamic_registration
include 'gin/methods/{method}.gin'
include 'gin/tasks/arithmetic.gin'
from mlrl.loops import online
from mlrl.models import transformer
from mlrl.rewards import graph
DIGITS = 1
MAX_COMPLETION_TOKENS = 3
online.Experiment.reward_fn = @graph.random()
online.Experiment.prompts_per_step = 8
online.Experiment.group_size = 4
"""
ATTEMPTS = """from __gin__ import dynamic_registration
include 'gin/methods/{method}.gin'
include 'gin/rollouts/multi_turn.gin'
from mlrl.environments import retry
from mlrl.loops import online
from mlrl.models import transformer
from mlrl.rewards import graph
from mlrl.tasks import puzzles
puzzles.arithmetic.digits = 1
ENVIRONMENT = @retry.always()
MAX_TURNS = 2
MAX_TURN_TOKENS = 3
retry.always.task = @puzzles.arithmetic()
online.Experiment.task = @puzzles.arithmetic()
online.Experiment.reward_fn = @graph.random()
online.Experiment.prompts_per_step = 8
online.Experiment.group_size = 4
"""
OFFLINE = """from __gin__ import dynamic_registration
include 'gin/methods/{method}.gin'
from mlrl.loops import offline
from mlrl.models import transformer
from mlrl.tasks import pairs
from mlrl.tasks import puzzles
puzzles.arithmetic.digits = 1
pairs.against_corrupted.task = @puzzles.arithmetic()
offline.Experiment.task = @pairs.against_corrupted()
offline.Experiment.rows_per_step = 8
"""
ITERATED = """from __gin__ import dynamic_registration
include 'gin/methods/{method}.gin'
from mlrl.loops import iterated
from mlrl.models import transformer
from mlrl.rewards import graph
from mlrl.rollouts import single_turn
from mlrl.tasks import puzzles
puzzles.arithmetic.digits = 1
single_turn.single_turn.max_completion_tokens = 3
iterated.Experiment.task = @puzzles.arithmetic()
iterated.Experiment.reward_fn = @graph.random()
iterated.Experiment.prompts_per_round = 8
iterated.Experiment.prompts_per_step = 4
iterated.Experiment.group_size = 4
iterated.Experiment.rows_per_step = 16
"""
SHAPED = """from __gin__ import dynamic_registration
include 'gin/tasks/arithmetic.gin'
include 'gin/methods/{method}.gin'
from mlrl.loops import online
from mlrl.models import transformer
from mlrl.rewards import graph
DIGITS = 1
MAX_COMPLETION_TOKENS = 3
REWARD = @graph.random()
online.Experiment.prompts_per_step = 8
online.Experiment.group_size = 4
"""
JUDGED = """from __gin__ import dynamic_registration
include 'gin/tasks/arithmetic.gin'
include 'gin/methods/{method}.gin'
from mlrl import sampling
from mlrl.loops import online
from mlrl.models import transformer
from mlrl.rewards import graph
from mlrl.rewards import judges
from mlrl.tasks import judgements
DIGITS = 1
MAX_COMPLETION_TOKENS = 3
judgements.Form.after = '='
judges.judge.samples = 64
judges.judge.sampling = @sampling.Sampling()
online.Experiment.prompts_per_step = 8
online.Experiment.group_size = 4
"""
TEACHER = "from mlrl.loops import start\nTEACHER = @start.random_parameters\n"


def keep_any(batch, *, threshold=0.0):
    """Every row, where a threshold may be chosen too."""
    return selection.keep_all(batch)


TINY = {
    "online": dict(prompts_per_step=2, group_size=2, minibatches=1),
    "offline": dict(rows_per_step=4, minibatches=1),
    "iterated": dict(prompts_per_round=4, prompts_per_step=2, group_size=2, rows_per_step=4,
                     select_fn=keep_any),  # a random model is hardly ever right
}  # fmt: skip
SMALL = dict(width=16, layers=1, heads=2, kv_heads=1, head_width=8, mlp_width=24)
SHAPE = "".join(f"transformer.Config.{name} = {value}\n" for name, value in SMALL.items())


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(REPO)


def with_includes(path):
    """The text of a gin file and of all that it includes."""
    text = (REPO / path).read_text()
    return text + "".join(with_includes(name) for name in re.findall(r"^include '(.+)'", text, re.M))


def overrides_for(path, folder):
    """The values that an experiment asks for: real data beside the checkout; weights and runs, made here."""
    text = with_includes(path)
    given = re.findall(r"^(\w+) = (?!%gin.REQUIRED)", text, re.M)  # by the experiment itself
    asked = [name for name in re.findall(r"^(\w+) = %gin.REQUIRED", text, re.M) if name not in given]
    made_by = {"BASE": "experiments/score/base.gin", "STAGE_ONE": "experiments/score/base.gin",
               "REWARD_RUN": "experiments/ma_rlhf/reward_model.gin"}  # fmt: skip
    runs_asked = {name: folder / name / "seed_0" for name in made_by if name in asked}
    for name, run in runs_asked.items():
        write_run(run, main.load(made_by[name])[0])
    where = {"DATA": DATA / pathlib.Path(path).parent.name, "VOCAB": DATA / "tokenizers" / "gpt2", "WEIGHTS": folder}
    where |= runs_asked
    if "WEIGHTS" in asked:
        config = Config(**SMALL, vocabulary_size=50304)  # more rows than the tokenizer has ids
        pretrained.write(folder, initialize(Transformer(config), jax.random.key(0)), config)
    for name in asked:
        if not where[name].is_dir():
            pytest.skip(f"{path} needs {name}, and there is no folder {where[name]}")
    return {name: str(where[name]) for name in asked}


def write_run(folder, experiment):
    """A run folder with random parameters of the experiment's model in a checkpoint, none of them zero."""
    start = lambda model, key: jax.tree.map(lambda x: x + 0.1, random_parameters(model, key))  # noqa: E731
    parts = offline.prepare(dataclasses.replace(experiment, start=start, evaluations=()))
    manager = checkpoints.open_manager(folder / "checkpoints")
    checkpoints.save(manager, 0, states.initial_state(parts))
    checkpoints.close(manager)


def prepared(path, overrides=None, **changes):
    """(experiment, loop): loaded, checked, traced, and every binding used. On one device, unless it names a mesh."""
    experiment, config = main.load(str(path), overrides)
    alone = {} if re.search(r"\bmesh\.\w+ =", config) else {"mesh": functools.partial(meshes.mesh, devices=1)}
    experiment = dataclasses.replace(experiment, **alone, **changes)
    loop, _ = main._prepared(experiment)
    return experiment, loop


def one_step(experiment, loop, folder):
    """The metrics of the first step, or round, of a real run."""
    length = "num_rounds" if hasattr(experiment, "num_rounds") else "num_steps"
    rewarded = lift(experiment.reward_fn).names if hasattr(experiment, "reward_fn") else ()
    unread = 1.0 if "judge" in rewarded else 0.5  # what a random model answers is hardly ever a grade
    recording = runs.Recording(save_every_steps=0, samples_rows=1, max_unscored_share=unread)
    experiment = dataclasses.replace(experiment, recording=recording, **{length: 1})
    with runs.Run(folder, experiment.recording) as run:
        state = loop.train(experiment, run)
    assert int(state.step) == 1 and int(state.bad_updates) == 0
    lines = [json.loads(line) for line in pathlib.Path(folder, "metrics.jsonl").read_text().splitlines()]
    assert math.isfinite(lines[-1]["loss"]) and math.isfinite(lines[-1]["grad_norm"])
    return lines[-1]


@pytest.mark.parametrize("path", [path if path in LOADED_QUICKLY else slow(path) for path in EXPERIMENTS])
def test_an_experiment_is_wholly_used(path, tmp_path):
    experiment, loop = prepared(path, overrides_for(path, tmp_path / "weights"))
    assert loop.Experiment is type(experiment)  # a binding that nothing uses was refused before


@pytest.mark.parametrize("path", [path if path in RUN_QUICKLY else slow(path) for path in EXPERIMENTS])
def test_an_experiment_runs_a_tiny_step(path, tmp_path):
    """Its own task, rewards and method, with a smaller model, fewer rows, random first weights and no evaluations."""
    experiment, loop = prepared(path, overrides_for(path, tmp_path / "weights"))
    tiny = dataclasses.replace(
        experiment, model=dataclasses.replace(experiment.model, **SMALL), start=random_parameters, evaluations=(),
        micro_batch_rows=0, **TINY[loop.__name__.rpartition(".")[-1]],
    )  # fmt: skip
    if experiment.mesh().size > 1:  # over which prompts are split
        tiny = dataclasses.replace(tiny, prompts_per_step=experiment.mesh().size)
    assert one_step(tiny, loop, tmp_path / "run")["tokens"] > 0


def compose(method, folder):
    """A gin file of a method and a tiny task."""
    text = (REPO / "gin" / "methods" / f"{method}.gin").read_text()
    bodies = {"REWARD = %gin.REQUIRED": SHAPED, "gin/loops/offline.gin": OFFLINE, "gin/loops/iterated.gin": ITERATED,
              "iterated.Experiment": ITERATED, "advantages.attempts": ATTEMPTS,
              "ssr_zero.gin": JUDGED, "judges.judge": JUDGED}  # fmt: skip
    body = next((body for words, body in bodies.items() if words in text), ONLINE)
    path = folder / f"{method}.gin"
    teacher = TEACHER if "TEACHER = %gin.REQUIRED" in text else ""
    external = "EXTERNAL = @graph.random()\n" if "EXTERNAL = %gin.REQUIRED" in text else ""
    judge = ""
    if "REWARD_RUN = %gin.REQUIRED" in text:
        write_run(folder / "judge", main.load(str(compose("reward_model", folder)))[0])
        judge = f"REWARD_RUN = '{folder / 'judge'}'\n"
        body = SHAPED.replace("REWARD = @graph.random()\n", "").replace("from mlrl.rewards import graph\n", "")
    path.write_text(body.format(method=method) + SHAPE + teacher + external + judge)
    return path


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_wholly_used(method, tmp_path):
    experiment, _ = prepared(compose(method, tmp_path))
    values = dict(value_head=method in WITH_VALUES, critic_layers=2 if method in WITH_A_CRITIC else 0)
    assert experiment.model == Config(**SMALL, **values)


@pytest.mark.parametrize("method", [method if method in RUN_QUICKLY else slow(method) for method in METHODS])
def test_a_method_learns_from_a_step(method, tmp_path):
    """With random rewards there is something to learn in every step."""
    assert one_step(*prepared(compose(method, tmp_path)), tmp_path / "run")["grad_norm"] > 0


def adapted(method, folder):
    """(experiment, loop) of a method with adapters by an include."""
    path = compose(method, folder)
    path.write_text(path.read_text() + "include 'gin/models/lora.gin'\nLORA_RANK = 4\nBASE_DTYPE = 'bfloat16'\n")
    return prepared(path)


def deep(folder):
    """(experiment, loop) of a method with a deep model by an include."""
    path = compose("grpo", folder)
    path.write_text(path.read_text() + "include 'gin/models/deep.gin'\ntransformer.Config.layers = 2\n")
    return prepared(path)


def test_adapters_and_deep_models_are_chosen_by_an_include(tmp_path):
    model = adapted("grpo", tmp_path)[0].model
    assert (model.lora_rank, model.param_dtype) == (4, "bfloat16")
    model = deep(tmp_path)[0].model
    assert model.scanned == (2, 1) and model.remat.__name__ == "full"


@pytest.mark.slow  # loops/lora_runs_test trains adapters
@pytest.mark.parametrize("method", ["grpo", "ppo", "ppo_shared", "dpo", "raft", "sft"])
def test_a_method_trains_adapters(method, tmp_path):
    assert one_step(*adapted(method, tmp_path), tmp_path / "run")["grad_norm"] > 0


@pytest.mark.slow  # models/scanned_test takes gradients of deep models
def test_a_method_trains_a_deep_model(tmp_path):
    assert one_step(*deep(tmp_path), tmp_path / "run")["grad_norm"] > 0


def test_the_files_of_meshes_are_those_that_are_tested():
    assert {path.stem for path in REPO.glob("gin/meshes/*.gin")} == {*MESHES, "rollout_tensor", "apart"}


def test_a_mesh_takes_no_knob_of_another_file():
    """A macro of the same name would be one for both: the folder of a task's data, say, and a number of copies."""
    macros = {path: set(re.findall(r"^([A-Z_]+) =", path.read_text(), re.M)) for path in REPO.glob("gin/**/*.gin")}
    of_meshes = set.union(*(names for path, names in macros.items() if path.parent.name == "meshes"))
    of_others = set.union(*(names for path, names in macros.items() if path.parent.name != "meshes"))
    assert "TENSOR" in of_meshes and of_meshes & of_others == set()


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_is_chosen_by_an_include(name, tmp_path):
    path = compose("sft", tmp_path)
    path.write_text(path.read_text() + f"include 'gin/meshes/{name}.gin'\n" + "transformer.Config.experts = 2\n")
    experiment, _ = main.load(str(path))
    main._prepared(experiment)  # the bindings are used
    sizes = {axis: size for axis, size in experiment.mesh().shape.items() if size > 1}
    assert sizes == MESHES[name]


def test_rollouts_may_be_on_another_mesh_than_the_update(tmp_path):
    path = compose("grpo", tmp_path)
    path.write_text(path.read_text() + "include 'gin/meshes/fsdp.gin'\ninclude 'gin/meshes/rollout_tensor.gin'\n")
    experiment, _ = main.load(str(path))
    _, parts = main._prepared(experiment)
    words = "before any of it is split over 8 device(s): fsdp 8, and for rollouts 8 device(s): data 4 x tensor 2"
    assert words in online.describe(parts)


def test_rollouts_may_have_devices_of_their_own(tmp_path):
    path = compose("grpo", tmp_path)
    path.write_text(path.read_text() + "include 'gin/meshes/apart.gin'\nLEARNERS = 4\n")
    experiment, _ = main.load(str(path))
    _, parts = main._prepared(experiment)
    assert not set(parts.experiment.mesh().devices.flat) & set(meshes_of(experiment)[1].devices.flat)
    words = online.describe(parts)
    assert "4 device(s): fsdp 4, and for rollouts 4 device(s): data 4" in words and "one update old" in words


@pytest.mark.parametrize("method", ["grpo", "remax"])
def test_rows_are_decoded_in_slots_by_an_include(method, tmp_path):
    """In every rollout that is a single turn, those within another included."""
    path = compose(method, tmp_path)
    path.write_text(path.read_text() + "include 'gin/rollouts/refilled.gin'\nSLOTS = 16\nCHECK_EVERY_STEPS = 2\n")
    prepared(path)  # the bindings are used
    path.write_text(path.read_text() + "SLOTS = 2\n")
    with pytest.raises(Refused, match="refilled.slots is 2, but a group has [34] rows"):
        prepared(path)


def test_caches_grow_by_an_include(tmp_path):
    path = compose("grpo", tmp_path)
    path.write_text(path.read_text() + "include 'gin/rollouts/growing.gin'\nGROW_AT = (1, 2)\n")
    prepared(path)  # the bindings are used
    path.write_text(path.read_text() + "GROW_AT = (2, 1)\n")
    with pytest.raises(Refused, match="generate.grow_at must be ascending"):
        prepared(path)


def test_a_method_that_asks_for_too_much_is_refused(tmp_path):
    path = compose("ppo_shared", tmp_path)
    path.write_text(path.read_text() + "transformer.Config.value_head = False\n")
    with pytest.raises(Refused, match="no value head"):
        prepared(path)
    path = compose("dapo", tmp_path)
    path.write_text(path.read_text() + "from mlrl.losses import policy\npolicy.gspo.clip_high = 0.1\n")
    with pytest.raises(Refused, match="nothing uses the binding mlrl.losses.policy.gspo.clip_high"):
        prepared(path)


@pytest.mark.parametrize("path", FILES)
def test_a_file_uses_what_it_imports_and_says_what_it_is(path):
    lines = (REPO / path).read_text().splitlines()
    assert lines[0].startswith("# "), "the first line says what the file is"
    bindings = "\n".join(line for line in lines if not line.startswith(("#", "from ", "import ", "include ")))
    for line in lines:
        if line.startswith(("from mlrl", "import ")):
            name = line.split()[-1]
            assert re.search(rf"\b{name}\.", bindings), f"{path} imports {name} and does not name it"


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_short(method):
    lines = (REPO / "gin" / "methods" / f"{method}.gin").read_text().splitlines()
    parts = [line for line in lines if line and not line.startswith(("#", "from ", "import ", "include "))]
    assert len(parts) <= 12, "a method is an include and the parts that differ"
