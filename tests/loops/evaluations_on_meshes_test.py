"""Evaluations sample where rollouts do, their rows split over the devices, and measure what one device measures."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from mlrl import meshes
from mlrl.loops import iterated, online, stages
from mlrl.sampling import Sampling

MODEL = dataclasses.replace(worlds.TINY, vocabulary_size=24)


def even(rollout, prompts):
    """1 for completions whose tokens have an even sum: half of what a random model says."""
    return (jnp.sum(rollout.tokens * rollout.action_mask, axis=1) % 2 == 0).astype(jnp.float32)


# 6 prompts and 12 samples, which 8 devices do not divide. Hot, so that samples are not one answer.
MEASURED = dataclasses.replace(worlds.EVALUATION, prompts=6, reward_fn=even, sampling=Sampling(temperature=2.0))
ELSEWHERE = dict(mesh=functools.partial(meshes.mesh, data=2, fsdp=4),
                 rollout_mesh=functools.partial(meshes.rearranged, data=4, tensor=2))  # fmt: skip
PLACES = {"one mesh": dict(mesh=functools.partial(meshes.mesh, data=2, fsdp=4)), "rollouts elsewhere": ELSEWHERE}


def prepared(**changes):
    return online.prepare(worlds.sums(model=MODEL, evaluations=(MEASURED,), **changes))


def measured(parts):
    """The results, and the tokens that were judged."""
    seen = []

    def watched(model, params, prompts, key, **how):
        rollout = worlds.ROLLOUT(model, params, prompts, key, **how)
        jax.debug.callback(lambda tokens: seen.append(np.asarray(tokens)), rollout.tokens)
        return rollout

    with meshes.use(parts.experiment.mesh()):
        state = online.initial_state(parts)
        each = [dataclasses.replace(MEASURED, rollout_fn=watched)]
        found = online.evaluator(parts, each)(state.params, 0, 1)
        jax.effects_barrier()
    return found, seen


@pytest.fixture(scope="module")
def alone():
    return measured(prepared())


@pytest.mark.parametrize("where", PLACES)
def test_a_mesh_measures_what_one_device_does(where, alone):
    found, tokens = measured(prepared(**PLACES[where]))
    assert found == alone[0] and 0 < found["held_out"]["mean@2"]["value"] < 1
    for of_mesh, of_one in zip(tokens, alone[1], strict=True):
        rows = len(of_one)
        np.testing.assert_array_equal(of_mesh[:rows], of_one)
        assert len(of_mesh) == math.ceil(rows / 8) * 8 or where == "rollouts elsewhere"
        assert len({row.tobytes() for row in of_one}) > rows // 2  # rows that are in another's place are seen


@pytest.mark.parametrize("where", PLACES)
def test_rows_are_split_over_the_mesh_of_rollouts(where):
    parts = prepared(**PLACES[where])
    parts = dataclasses.replace(parts, experiment=dataclasses.replace(parts.experiment, evaluations=(
        dataclasses.replace(MEASURED, prompts=8, samples=1),)))  # fmt: skip
    greedy, sampled = stages.evaluations(parts).items()
    assert (greedy[0], sampled[0]) == ("evaluation of held_out, 8 rows", "evaluation of held_out, 8 rows (2)")
    program = greedy[1]
    assert program.mesh == stages.checks.meshes_of(parts.experiment)[1]
    with meshes.use(program.mesh):
        tokens = program.function.lower(*program.arguments).compile().output_shardings.tokens
    assert tokens.shard_shape((8, 5))[0] == 8 // meshes.row_shards(program.mesh)


def test_rounds_sample_on_another_mesh_too():
    parts = iterated.prepare(worlds.round_of_sums(model=MODEL, rows_per_step=16, **ELSEWHERE))
    with meshes.use(parts.experiment.mesh()):
        state = iterated.initial_state(parts)
        prompts = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stages.abstract_rows(parts)[0])
        rollout = iterated.jitted(parts)["rollout"](state, prompts, 1)
    assert rollout.tokens.sharding.mesh.shape["fsdp"] == 4 and rollout.action_mask.any()
