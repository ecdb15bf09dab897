"""The state that a loop starts from: made of an experiment's parts, or only its shapes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mlrl import controllers, meshes
from mlrl.loops.start import FrozenModel, random_parameters
from mlrl.models import lora
from mlrl.models.transformer import Transformer
from mlrl.types import Params, TrainState


class Parts(Protocol):
    """What every loop's parts have: an experiment closed over its models and checked.

    reward_models  those that rewards may ask, each with its Transformer
    reads      the fields that losses, advantages and selection look at, and "TrainState.reference" where something
               else does; nothing else is computed or kept
    """

    experiment: Any
    model: Transformer
    reference_model: Transformer
    reward_models: tuple[tuple[FrozenModel, Transformer], ...]
    reads: frozenset[str]

    def stateful(self) -> Mapping[str, Any]:
        """First states of whatever else remembers: fields of TrainState by name, such as "curriculum"."""


class Program(NamedTuple):
    """A function that a loop compiles, and what it calls it with: for whoever compiles it without running the loop.

    function    jitted
    arguments   arrays, or only their shapes and dtypes: the state, then rows
    mesh        that it runs on
    beside      a state that lies in memory meanwhile, on the mesh of the update; () if the arguments are all of it
    """

    function: jax.stages.Wrapped
    arguments: tuple[Any, ...]
    mesh: Mesh
    beside: Any = ()


def reads_reference(parts: Parts) -> bool:
    """Whether anything looks at what the frozen reference says of the rows."""
    return any(name.startswith("Batch.reference_") for name in parts.reads)


def keeps_reference(parts: Parts) -> bool:
    """Whether the state holds the frozen reference: rows are annotated with it, or a reward or a round asks for it."""
    return reads_reference(parts) or any(name.startswith("TrainState.reference") for name in parts.reads)


def initial_state(parts: Parts) -> TrainState:
    """The state before the first step, in arrays of its own, split over the current mesh from the beginning."""
    key = jax.random.fold_in(jax.random.key(parts.experiment.seed), 0x73746172)
    params = meshes.placed(parts.experiment.start(parts.model, key))
    reference = ()
    if keeps_reference(parts):
        reference = meshes.placed(parts.experiment.reference.params(params, parts.reference_model, key))
    judges = reward_model_params(parts, params, key)
    # In one program, since what an optimizer makes of parameters would else be whole on every device.
    return jax.jit(lambda *models: meshes.split_state(state_from(parts, *models)))(params, reference, judges)


def reward_model_params(parts: Parts, first: Params, key: jax.Array) -> tuple[Params, ...]:
    """The parameters of each reward model, split over the current mesh; `first` are the policy's."""
    return tuple(meshes.placed(judge.params(first, model, key)) for judge, model in parts.reward_models)


def abstract_state(parts: Parts) -> TrainState:
    """Shapes and dtypes of the state, without computing any of it."""
    return jax.eval_shape(functools.partial(_made_of, parts), jax.random.key(0))


def random_state(parts: Parts) -> TrainState:
    """A state of step 0 around random parameters, on the current mesh: for a program's time rather than its result."""
    return jax.jit(lambda key: meshes.split_state(_made_of(parts, key)))(jax.random.key(0))


def _made_of(parts: Parts, key: jax.Array) -> TrainState:
    reference = ()
    if keeps_reference(parts):
        reference = parts.experiment.reference.held(random_parameters(parts.reference_model, key))
    judges = tuple(judge.held(random_parameters(own, key)) for judge, own in parts.reward_models)
    return state_from(parts, random_parameters(parts.model, key), reference, judges)


def state_from(parts: Parts, params: Params, reference: Params,
               reward_models: tuple[Params, ...] = ()) -> TrainState:  # fmt: skip
    """The state of step 0 around the policy's first parameters and those that frozen models hold."""
    experiment = parts.experiment
    trained, frozen = lora.split(params)
    fields = {"curriculum": (), "reward": ()} | dict(parts.stateful())
    return TrainState(
        step=jnp.int32(0), key=jax.random.key(experiment.seed), params=trained,
        opt_state=experiment.optimizer.init(trained), reference=reference,
        controllers=controllers.initial(experiment), bad_updates=jnp.int32(0), frozen=frozen,
        reward_models=reward_models, **fields,
    )  # fmt: skip
