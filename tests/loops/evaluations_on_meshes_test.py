"""Evaluations sample where rollouts do, their rows split over the devices, and measure what one device measures."""

import dataclasses
import functools

import pytest
import worlds

from mlrl import meshes
from mlrl.loops import online, stages
from mlrl.sampling import Sampling

MODEL = dataclasses.replace(worlds.TINY, vocabulary_size=24)
# 6 prompts and 12 samples, which 8 devices do not divide. Hot, so that samples are not one answer.
MEASURED = dataclasses.replace(worlds.EVALUATION, prompts=6, sampling=Sampling(temperature=2.0))
ELSEWHERE = dict(mesh=functools.partial(meshes.mesh, data=2, fsdp=4),
                 rollout_mesh=functools.partial(meshes.rearranged, data=4, tensor=2))  # fmt: skip
PLACES = {"one mesh": dict(mesh=functools.partial(meshes.mesh, data=2, fsdp=4)), "rollouts elsewhere": ELSEWHERE}


def prepared(**changes):
    return online.prepare(worlds.sums(model=MODEL, evaluations=(MEASURED,), **changes))


def measured(parts):
    with meshes.use(parts.experiment.mesh()):
        state = online.initial_state(parts)
        return online.evaluator(parts, parts.experiment.evaluations)(state.params, 0, 1)


@pytest.fixture(scope="module")
def alone():
    return measured(prepared())


@pytest.mark.parametrize("where", PLACES)
def test_a_mesh_measures_what_one_device_does(where, alone):
    assert measured(prepared(**PLACES[where])) == alone


@pytest.mark.parametrize("where", PLACES)
def test_rows_are_split_over_the_mesh_of_rollouts(where):
    parts = prepared(**PLACES[where])
    parts = dataclasses.replace(parts, experiment=dataclasses.replace(parts.experiment, evaluations=(
        dataclasses.replace(MEASURED, prompts=8, samples=0),)))  # fmt: skip
    (name, program), = stages.evaluations(parts).items()
    assert name == "evaluation of held_out, 8 rows" and program.mesh == stages.checks.meshes_of(parts.experiment)[1]
    with meshes.use(program.mesh):
        tokens = program.function.lower(*program.arguments).compile().output_shardings.tokens
    assert tokens.shard_shape((8, 5))[0] == 8 // meshes.row_shards(program.mesh)
