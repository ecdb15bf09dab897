"""Rollouts a step ahead: rows are those of the weights before, on the same devices or others, and nothing is lost."""

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
from worlds import assert_same, first_digit, logged  # noqa: E402

from mlrl import meshes, prompts, runs  # noqa: E402
from mlrl.loops import online, stages  # noqa: E402
from mlrl.types import Refused  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_once")
EACH = runs.Recording(save_every_steps=2, samples_every_steps=1, samples_rows=32, keep_last=9)
HERE = functools.partial(meshes.mesh, fsdp=2, data=1, devices=2)


def two_others(mesh):
    with meshes.on(jax.devices()[:4]):
        return meshes.others(mesh)


def sums(**changes):
    settings = {"num_steps": 4, "recording": EACH, "evaluations": (), "steps_ahead": 1, "reward_fn": first_digit}
    return worlds.sums(**{**settings, **changes})


def train(folder, **changes):
    experiment = sums(**changes)
    with runs.Run(folder, experiment.recording) as run:
        return online.train(experiment, run)


def samples(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def ahead(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ahead")
    return train(folder), folder


def test_rows_are_those_of_the_weights_before_the_last_update(ahead, tmp_path):
    state, folder = ahead
    parts = online.prepare(sums())
    now = online.initial_state(parts)
    learn = jax.jit(functools.partial(online.learn, parts))
    sample = jax.jit(functools.partial(stages.sample_rows, parts))
    before = now  # the weights before the last update
    for step in range(4):
        drawn = prompts.draw(parts.experiment.task, now.key, step, 8, jnp.ones(1))
        rollout, before = sample(before, drawn, stages.step_key(now, 0)), now
        assert set(np.asarray(rollout.policy_version)) == {max(0, step - 1)}
        rewards, reward_state = stages.reward_rows(parts, now, rollout, drawn)
        now, metrics, _ = learn(now.replace(reward=reward_state), drawn, rollout, rewards)
        said = [row["tokens"] for row in samples(folder) if row["step"] == step + 1]
        vocabulary = parts.experiment.task.vocabulary
        by_hand = [[vocabulary.decode([t]) for t in np.asarray(tokens)[np.asarray(mask)]]
                   for tokens, mask in zip(rollout.tokens, rollout.action_mask)]  # fmt: skip
        assert said == by_hand
        assert logged(folder)[step + 1]["loss"] == pytest.approx(float(metrics["loss"]), abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, now.params)
    assert [line["staleness_steps"] for line in logged(folder)[1:]] == [0.0, 1.0, 1.0, 1.0]


def test_a_run_that_goes_on_learns_from_the_rows_that_were_waiting(ahead, tmp_path):
    train(tmp_path, num_steps=2)
    assert_same(train(tmp_path), ahead[0])


def test_rollouts_with_devices_of_their_own_sample_the_same(ahead, tmp_path):
    state = train(tmp_path, mesh=HERE, rollout_mesh=two_others)
    assert {d.id for d in jax.tree.leaves(state.params)[0].devices()} == {0, 1}
    assert [row["tokens"] for row in samples(tmp_path)] == [row["tokens"] for row in samples(ahead[1])]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, ahead[0].params)

@pytest.mark.parametrize("sizes", [(4, 2), (2, 4), (4, 4)], ids=str)
def test_weights_go_to_other_devices_in_parts_and_by_no_host(sizes, monkeypatch):
    here, there = sizes
    devices = jax.devices()
    source = jax.sharding.Mesh(np.asarray(devices[:here]).reshape(1, here, 1, 1, 1), meshes.AXES)
    target = jax.sharding.Mesh(np.asarray(devices[here : here + there]).reshape(1, 1, there, 1, 1), meshes.AXES)
    spec = lambda mesh, *axes: jax.NamedSharding(mesh, jax.P(*axes))  # noqa: E731
    x = jax.device_put(jnp.arange(64.0).reshape(8, 8), spec(source, "fsdp"))
    move = meshes.mover({"x": spec(source, "fsdp")}, {"x": spec(target, None, "tensor")})

    def on_host(self):
        raise AssertionError("an array was made whole on the host")

    with monkeypatch.context() as patched:
        patched.setattr(type(x), "_value", property(on_host))
        moved = move({"x": x})["x"]
        jax.block_until_ready(moved)
    assert moved.sharding == spec(target, None, "tensor")
    np.testing.assert_array_equal(moved, np.arange(64.0).reshape(8, 8))


@pytest.mark.parametrize("changes, message", [
    ({"steps_ahead": 2}, "0 or 1 steps ahead"),
    ({"max_attempts": 2, "refill_fn": lambda batch: batch.rewards.outcome > 0}, "cannot be exchanged"),
    ({"steps_per_dispatch": 2, "reward_fn": worlds.noisy_verifier()}, "a step ahead"),
    ({"rollout_mesh": meshes.others, "mesh": meshes.mesh}, "set meshes.mesh.devices to fewer"),
    ({"rollout_mesh": meshes.others, "mesh": functools.partial(meshes.mesh, devices=3)}, "must divide the other"),
], ids=["two", "refill", "dispatch", "no others", "uneven"])  # fmt: skip
def test_what_cannot_be_ahead_is_refused(changes, message):
    with pytest.raises(Refused, match=message):
        online.prepare(sums(**changes))


def test_the_description_says_that_rows_are_older():
    assert "by weights one update old" in online.describe(online.prepare(sums()))
