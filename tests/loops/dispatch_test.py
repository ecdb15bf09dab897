"""Steps of one dispatch are the steps of the loop: the same lines, tokens and parameters."""

import dataclasses
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import worlds  # noqa: E402
from worlds import assert_same, logged  # noqa: E402

from mlrl import meshes, runs  # noqa: E402
from mlrl.evaluation import Evaluation  # noqa: E402
from mlrl.loops import dispatch, online  # noqa: E402
from mlrl.rewards import graph  # noqa: E402
from mlrl.types import Refused, TrainState  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_once")
EVERY_FOUR = runs.Recording(save_every_steps=4, samples_every_steps=4, samples_rows=8, phases_every_steps=0)
EXACT = ("tokens", "length/mean", "reward", "accuracy", "bad_updates", "eval/held_out/greedy")


def sums(**changes):
    evaluations = tuple(dataclasses.replace(e, every_steps=4) for e in worlds.sums().evaluations)
    return worlds.sums(**{"num_steps": 8, "recording": EVERY_FOUR, "evaluations": evaluations, **changes})


def train(folder, **changes):
    experiment = sums(**changes)
    with runs.Run(folder, experiment.recording) as run:
        return online.train(experiment, run)


def read(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_by_one")
    return train(folder), folder


@pytest.fixture(scope="module")
def by_four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("by_four")
    return train(folder, steps_per_dispatch=4), folder


def test_a_dispatch_of_four_logs_and_learns_what_four_steps_do(one_by_one, by_four):
    (state, folder), (dispatched, other) = one_by_one, by_four
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, dispatched.params)
    lines, dispatched_lines = logged(folder), logged(other)
    assert [line["step"] for line in dispatched_lines] == list(range(9))
    for line, same in zip(lines, dispatched_lines, strict=True):
        assert line.keys() == same.keys()
        for name, value in line.items():
            tolerance = 0 if name in EXACT else 1e-5
            assert same[name] == pytest.approx(value, rel=tolerance, abs=tolerance, nan_ok=True), (line["step"], name)
    assert len({line["grad_norm"] for line in lines[1:]}) == 8, "nothing was learned"


def test_samples_of_the_last_step_of_a_dispatch_are_those_of_the_loop(one_by_one, by_four):
    rows, dispatched = (read(folder, "samples.jsonl") for _, folder in (one_by_one, by_four))
    assert {row["step"] for row in rows} == {4, 8}
    for row, same in zip(rows, dispatched, strict=True):
        assert [row[k] for k in ("step", "prompt", "tokens")] == [same[k] for k in ("step", "prompt", "tokens")]
        np.testing.assert_allclose(row["log_probs"], same["log_probs"], atol=2e-5)


def test_a_step_of_a_dispatch_has_its_share_of_the_time(by_four):
    lines = read(by_four[1], "metrics.jsonl")[1:]
    for dispatched in (lines[:4], lines[4:]):
        assert len({line["seconds/step"] for line in dispatched}) == 1
        for line in dispatched:
            assert line["tokens_per_second"] == pytest.approx(line["tokens"] / line["seconds/step"])


def test_dispatches_are_one_program_that_is_compiled_once(tmp_path):
    split = functools.partial(meshes.mesh, data=1, fsdp=2, devices=2)  # the state comes out split as it went in
    never = runs.Recording(save_every_steps=0, samples_every_steps=0)
    train(tmp_path, steps_per_dispatch=2, mesh=split, evaluations=(), recording=never)
    counts = [line["compilations"] for line in read(tmp_path, "metrics.jsonl")[1:]]
    assert len(set(counts)) == 1, counts
    parts = online.prepare(sums(steps_per_dispatch=4))
    prompts = jax.eval_shape(online.prompt_source(parts), online.initial_state(parts), 0)
    compiled = online.jitted(parts)["step"]
    text = compiled.lower(online.abstract_state(parts), prompts).as_text()
    assert "callback" not in text and text.count("func.func public @main") == 1


def test_a_run_that_goes_on_between_dispatches_is_bitwise_the_undisturbed_one(by_four, tmp_path):
    state, folder = by_four
    train(tmp_path, steps_per_dispatch=4, num_steps=4)
    assert_same(state, train(tmp_path, steps_per_dispatch=4))
    assert logged(folder) == logged(tmp_path)


def test_a_run_goes_on_only_from_the_end_of_a_dispatch(tmp_path):
    train(tmp_path, num_steps=2, evaluations=())
    with pytest.raises(Refused, match="checkpoint is of step 2, .*steps_per_dispatch = 4"):
        train(tmp_path, steps_per_dispatch=4, evaluations=())


def test_rehearsals_are_of_one_step_and_come_when_they_are_due(tmp_path):
    recording = runs.Recording(save_every_steps=0, samples_every_steps=0, phases_every_steps=3)
    train(tmp_path, steps_per_dispatch=2, evaluations=(), recording=recording)
    timed = [line["step"] for line in read(tmp_path, "metrics.jsonl") if "seconds/rollout" in line]
    assert timed == [4, 6]  # steps 3 and 6 are in the dispatches that end there


def a_loss_that_breaks(scores, batch):
    """Not a number in the third and fourth step."""
    version = jnp.max(batch.rollout.policy_version)
    broken = jnp.where((version == 2) | (version == 3), jnp.nan, 0.0)
    return jnp.sum(batch.weights * jnp.where(batch.mask, scores.log_probs, 0.0)) + broken, {}


def test_every_step_of_a_dispatch_is_looked_at(tmp_path):
    recording = runs.Recording(save_every_steps=0, samples_every_steps=0, phases_every_steps=0, max_bad_updates=2)
    changes = dict(steps_per_dispatch=8, minibatches=1, evaluations=(), recording=recording)
    with pytest.raises(runs.Stopped, match="2 updates in a row, up to step 4: the batch of step 8 .*bad_batch_8"):
        train(tmp_path / "loss", losses=(a_loss_that_breaks,), **changes)
    assert [line["bad_updates"] for line in logged(tmp_path / "loss")[1:]] == [0, 0, 1, 2, 0, 0, 0, 0]

    def fades(rollout, prompts):
        return jnp.where(rollout.policy_version == 2, jnp.nan, 1.0)

    with pytest.raises(runs.Stopped, match="step 3 has no reward for 100% of its rows"):
        train(tmp_path / "reward", reward_fn=fades, **changes)


def test_what_does_not_fit_into_dispatches_is_refused_with_its_numbers():
    held_out = Evaluation(worlds.sums().evaluations[0].task, graph.arithmetic, prompts=8, every_steps=6)
    saves, samples = (runs.Recording(**{"save_every_steps": 4, "samples_every_steps": 4, name: 6})
                      for name in ("save_every_steps", "samples_every_steps"))  # fmt: skip
    cases = [
        ({"steps_per_dispatch": 0}, "steps_per_dispatch must be a whole number of at least 1, got 0"),
        ({"num_steps": 10}, "num_steps is 10, .*steps_per_dispatch = 4: make it 8 or 12"),
        ({"num_steps": 3}, "num_steps is 3, .*: make it 4, or"),
        ({"recording": saves}, "Recording.save_every_steps is 6, .*: make it 4 or 8"),
        ({"recording": samples}, "Recording.samples_every_steps is 6"),
        ({"evaluations": (held_out,)}, "every_steps of the evaluation of 'held_out' is 6"),
        ({"reward_fn": worlds.first_digit}, "steps_per_dispatch is 4, but the reward is on the host"),
        ({"mesh": functools.partial(meshes.mesh, data=1, tensor=8), "rollout_mesh": meshes.rearranged},
         "rollouts are on another mesh"),
    ]  # fmt: skip
    for changes, words in cases:
        with pytest.raises(Refused, match=words):
            online.prepare(sums(**{"steps_per_dispatch": 4, **changes}))
    never = runs.Recording(save_every_steps=0, samples_every_steps=0)
    online.prepare(sums(steps_per_dispatch=4, recording=never, evaluations=()))


def test_the_description_says_how_many_steps_are_dispatched():
    text = online.describe(online.prepare(sums(steps_per_dispatch=4)))
    assert "the whole step 4 times in one program" in text
    assert "times in one program" not in online.describe(online.prepare(sums()))


def test_a_dispatch_gives_each_steps_metrics_and_only_the_last_batch():
    def step(state, prompts):
        state = state.replace(bad_updates=state.bad_updates + prompts)
        return state, {"given": prompts}, {"row": prompts * 10}

    state = TrainState(jnp.int32(0), jax.random.key(0), (), (), (), (), (), {}, bad_updates=jnp.int32(0))
    steps = dispatch.dispatched(step, lambda state: state.bad_updates, 3)
    state, metrics, batch = jax.jit(steps)(state, jnp.int32(1))
    assert metrics["given"].tolist() == [1, 1, 2] and metrics["bad_updates"].tolist() == [1, 2, 4]
    assert int(batch["row"]) == 20 and int(state.bad_updates) == 4
