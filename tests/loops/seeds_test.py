"""Seeds that are trained together are the runs that each would be alone."""

import dataclasses
import functools
import json
import os
import pathlib
import signal
import sys

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import worlds  # noqa: E402
from worlds import assert_same, logged  # noqa: E402

from mlrl import folders, main, meshes, runs  # noqa: E402
from mlrl.loops import online, seeds  # noqa: E402
from mlrl.types import Refused  # noqa: E402

RECORDING = runs.Recording(save_every_steps=2, samples_every_steps=2, samples_rows=8, phases_every_steps=0)
EXACT = ("tokens", "length/mean", "accuracy", "eval/held_out/greedy")
GIN = """
from __gin__ import dynamic_registration
include 'gin/methods/grpo.gin'
from mlrl import meshes
from mlrl.loops import online
from mlrl.models import transformer
from mlrl.rewards import graph
from mlrl.rollouts import single_turn
from mlrl.tasks import puzzles
STEPS = 2
SEED = 3
puzzles.arithmetic.digits = 1
online.Experiment.task = @puzzles.arithmetic()
online.Experiment.reward_fn = @graph.arithmetic
online.Experiment.prompts_per_step = 8
online.Experiment.group_size = 2
meshes.mesh.devices = 1
transformer.Config.width = 16
transformer.Config.layers = 1
transformer.Config.heads = 2
transformer.Config.kv_heads = 1
transformer.Config.head_width = 8
transformer.Config.mlp_width = 24
single_turn.single_turn.max_completion_tokens = 3
"""


def sums(seed=0, **changes):
    evaluations = tuple(dataclasses.replace(e, every_steps=2) for e in worlds.sums().evaluations)
    changes = {"num_steps": 4, "recording": RECORDING, "evaluations": evaluations, **changes}
    return worlds.sums(seed=seed, **changes)


MADE = {}


def together(folder, chosen=(0, 1), *, anew=False, **changes):
    """Trains seeds by programs that are compiled once for all experiments of which they know no difference, or `anew`.
    """
    experiments = [sums(seed, **changes) for seed in chosen]
    own = [folder / f"seed_{seed}" for seed in chosen]
    same = dataclasses.replace(experiments[0], num_steps=1, recording=runs.Recording(), evaluations=())
    make = seeds.programs
    if anew or same not in MADE:
        MADE[same] = functools.cache(lambda: make([variant], experiments[0].mesh(), "cpu"))
    variant = seeds.Variant(online.prepare(experiments[0]), experiments, own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seeds, "programs", lambda *given: MADE[same]())
        return seeds.train([variant])


def alone(folder, **changes):
    experiment = sums(**changes)
    with runs.Run(folder, experiment.recording) as run:
        return online.train(experiment, run)


def read(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def close(state, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, other.params)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return together(folder, anew=True), folder


def test_each_seed_is_the_run_that_it_is_alone(two, tmp_path):
    states, folder = two
    close(states[1], alone(tmp_path, seed=1))
    for line, same in zip(logged(tmp_path), logged(folder / "seed_1"), strict=True):
        assert line.keys() == same.keys()
        for name, value in line.items():
            tolerance = 0 if name in EXACT else 1e-5
            assert same[name] == pytest.approx(value, rel=tolerance, abs=tolerance, nan_ok=True), (line["step"], name)
    for row, same in zip(*(read(f, "samples.jsonl") for f in (tmp_path, folder / "seed_1")), strict=True):
        assert [row[k] for k in ("step", "prompt", "tokens")] == [same[k] for k in ("step", "prompt", "tokens")]
    first, second = (logged(folder / f"seed_{seed}") for seed in (0, 1))
    assert all(a["grad_norm"] != b["grad_norm"] for a, b in zip(first[1:], second[1:], strict=True))


@pytest.mark.slow
def test_all_at_once_is_one_after_another_on_several_devices():
    split = functools.partial(meshes.mesh, data=1, fsdp=2, devices=2)
    parts, made = online.prepare(sums(mesh=split)), []
    with meshes.use(split()) as mesh:
        each = [dataclasses.replace(parts, experiment=sums(seed, mesh=split)) for seed in (0, 1)]
        starts = [online.initial_state(own) for own in each]
        for platform in ("cpu", "gpu"):
            do = seeds.programs([seeds.Variant(parts, [], ["a", "b"])], mesh, platform)
            states, *_ = do.step(do.stack(starts))
            made.append(jax.device_get(do.step(states)))
            assert do.step._cache_size() == 1, "states come out split otherwise than they went in"
    (state, metrics, batch), (same, as_good, rows) = made
    np.testing.assert_array_equal(batch.rollout.tokens, rows.rollout.tokens)
    np.testing.assert_allclose(metrics["grad_norm"], as_good["grad_norm"], rtol=1e-5)
    close(state, same)


def test_nothing_is_compiled_for_another_seed_or_after_the_first_steps(two):
    counts = [line["compilations"] for line in read(two[1] / "seed_0", "metrics.jsonl")[1:]]
    others = [line["compilations"] for line in read(two[1] / "seed_1", "metrics.jsonl")[1:]]
    assert len({*counts[1:], *others[1:]}) == 1, (counts, others)


def test_a_seed_has_its_share_of_the_time(two):
    for line, other in zip(*(read(two[1] / f"seed_{seed}", "metrics.jsonl")[1:] for seed in (0, 1)), strict=True):
        assert line["seconds/step"] == pytest.approx(other["seconds/step"], rel=1e-6)
    watch = seeds.Stopwatch(2)
    assert watch() == 0.0 == watch()
    with watch.running():
        pass
    assert watch() > 0.0 and watch() == watch()


def test_seeds_go_on_bitwise_together_and_each_alone(two, tmp_path):
    states, folder = two
    together(tmp_path, num_steps=2)
    for state, resumed in zip(states, together(tmp_path), strict=True):
        assert_same(state, resumed)
    for seed in (0, 1):
        assert logged(tmp_path / f"seed_{seed}") == logged(folder / f"seed_{seed}")
    assert int(alone(tmp_path / "seed_1", seed=1, num_steps=6).step) == 6
    with pytest.raises(Refused, match="different steps .seed_0 4, seed_1 6.: remove the checkpoints after step 4"):
        together(tmp_path, num_steps=6)


def test_several_steps_of_several_seeds_are_one_program_too(two, tmp_path):
    states, folder = two
    for state, dispatched in zip(states, together(tmp_path, steps_per_dispatch=2), strict=True):
        close(state, dispatched)
    for seed in (0, 1):
        lines, same = (logged(f / f"seed_{seed}") for f in (folder, tmp_path))
        assert [[line.get(name) for name in ("step", *EXACT)] for line in lines] == [
            [line.get(name) for name in ("step", *EXACT)] for line in same
        ]


def test_seeds_that_are_told_to_end_are_saved_at_the_same_step(tmp_path):
    def ends(self, state, step, *rest):
        if step == 1 and self.folder.name == "seed_1":
            os.kill(os.getpid(), signal.SIGTERM)
        return record(self, state, step, *rest)

    record = runs.Run.record
    with pytest.MonkeyPatch.context() as patch, pytest.raises(runs.Preempted, match="seed_1: told to end after step 1"):
        patch.setattr(runs.Run, "record", ends)
        together(tmp_path, evaluations=())
    assert all((tmp_path / f"seed_{seed}" / "checkpoints" / "1").is_dir() for seed in (0, 1))
    assert [int(state.step) for state in together(tmp_path, num_steps=2, evaluations=())] == [2, 2]


def test_a_seed_that_is_stopped_stops_all_after_the_same_step(tmp_path):
    stopped = {"seed_0": runs.Stopped("no sense")}

    def breaks(self, *rest):
        record(self, *rest)
        if self.folder.name in stopped and rest[1] == 2:
            raise stopped[self.folder.name]

    record = runs.Run.record
    with pytest.MonkeyPatch.context() as patch, pytest.raises(runs.Stopped, match="seed_0: no sense"):
        patch.setattr(runs.Run, "record", breaks)
        together(tmp_path, evaluations=())
    assert [[line["step"] for line in logged(tmp_path / f"seed_{seed}")] for seed in (0, 1)] == [[0, 1, 2]] * 2


def test_what_cannot_be_one_program_is_refused_with_the_numbers():
    cases = [
        (sums(reward_fn=worlds.first_digit), 8, "8 seeds .*reward is on the host: .*SEED=0 to --gin.SEED=7"),
        (sums(), -1, "seeds must be a whole number of at least 1, got -1"),
    ]
    for experiment, count, words in cases:
        with pytest.raises(Refused, match=words):
            seeds.fits(online.prepare(experiment), count)


def test_configurations_may_differ_in_the_seed_only():
    follows = "SEED = {}\nonline.Experiment.seed = %SEED\nstart.from_run.seed = %SEED"
    folders.require_only_seeds_differ([follows.format(n) for n in (0, 1)], [0, 1], range(2))
    with pytest.raises(Refused, match="differ in nothing else, but the experiment binds graph.random.seed = %SEED"):
        folders.require_only_seeds_differ([follows + "\ngraph.random.seed = %SEED"], [0], range(1))
    with pytest.raises(Refused, match="SEED set to 1 leaves the experiment's seed at 0"):
        folders.require_only_seeds_differ(["SEED = 0", "SEED = 1"], [0, 0], range(2))


def test_the_command_line_trains_seeds_into_folders_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("e.gin").write_text(GIN)
    assert main.main(["train", "e.gin", "--run_dir", "out", "--seeds", "2", "--report"]) == 0
    assert "report: out" in capsys.readouterr().out and pathlib.Path("out/report.html").is_file()
    for seed in (3, 4):
        folder = pathlib.Path("out", f"seed_{seed}")
        for name in ("config.gin", "operative_config.gin"):
            assert f"\nSEED = {seed}\n" in folder.joinpath(name).read_text()
        assert [line["step"] for line in logged(folder)] == [0, 1, 2]
    assert main.main(["train", "e.gin", "--run_dir", "out/seed_3", "--seeds", "2"]) == 2
    assert "out/seed_3 holds a run" in capsys.readouterr().err
    assert main.main(["train", "out/seed_4/config.gin", "--run_dir", "out/seed_4", "--gin.STEPS=3"]) == 0
    assert [line["step"] for line in logged("out/seed_4")] == [0, 1, 2, 3]
