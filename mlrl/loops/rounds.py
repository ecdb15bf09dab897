"""What the training of a round starts from, as functions (TrainState, optimizer) -> TrainState.

They are called once a round. The rows of the round are sampled by the policy as the last round left it, whatever
training starts from; where a loss reads the reference, it is the one that is set here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mlrl.loops.start import random_parameters
from mlrl.loops.states import state_from
from mlrl.types import Params, Refused, TrainState
from mlrl.updates import fields_read

RoundFn = Callable[[TrainState, optax.GradientTransformation], TrainState]


def go_on(state: TrainState, optimizer: optax.GradientTransformation) -> TrainState:
    """Training goes on from where the last round ended (RAFT)."""
    del optimizer
    return state


def restart(state: TrainState, optimizer: optax.GradientTransformation) -> TrainState:
    """Training starts again from the reference, with a fresh optimizer: a round passes on only its rows (STaR).

    The reference is the run's own start, start.own_start(). Values, which a reference has not, stay as they are.
    """
    params = dict(state.params) | jax.tree.map(jnp.copy, _own_start(state))
    return state.replace(params=params, opt_state=optimizer.init(params))


def move_reference(state: TrainState, optimizer: optax.GradientTransformation) -> TrainState:
    """Training goes on, and the policy that samples the round becomes the reference (iterated DPO, SELM)."""
    del optimizer
    return state.replace(reference={name: jax.tree.map(jnp.copy, state.params[name]) for name in _own_start(state)})


def _own_start(state: TrainState) -> Params:
    """What the reference has of its own, beside what it shares with the policy's frozen base."""
    if not state.reference:
        raise Refused("Experiment.begin_round needs a reference with parameters of its own: set Experiment.reference = "
                      "@start.own_start()")  # fmt: skip
    return dict(state.reference)


def reads(parts: Any, read: set[str]) -> set[str]:
    """What the round's beginning needs the state to keep, beside what is `read`: {"TrainState.reference"} or nothing.

    Raises: Refused, if it moves a reference that nothing looks at.
    """
    begin, optimizer = parts.experiment.begin_round, parts.experiment.optimizer

    def state(key: jax.Array) -> TrainState:
        held = parts.experiment.reference.held(random_parameters(parts.reference_model, key))
        return state_from(parts, random_parameters(parts.model, key), held)

    whole = jax.eval_shape(state, jax.random.key(0))
    needed = fields_read(lambda s: begin(s, optimizer).replace(key=(), reference=()), whole)
    moved = fields_read(lambda s: begin(s, optimizer).reference, whole)
    used = any(name.startswith(("Batch.reference_", "TrainState.reference")) for name in read | needed)
    if any(name.startswith("TrainState.params") for name in moved) and not used:
        raise Refused("Experiment.begin_round moves the reference, but no loss reads the reference: set it to "
                      "rounds.go_on, or choose a loss such as preference.dpo")  # fmt: skip
    return {"TrainState.reference"} if any(name.startswith("TrainState.reference") for name in needed) else set()


def same_shapes(state: TrainState, begun: Any) -> None:
    """Raises Refused unless a round begins with a state of the same shapes as the run's."""
    shapes = lambda tree: [(jax.tree_util.keystr(path), x.shape, x.dtype)  # noqa: E731
                           for path, x in jax.tree_util.tree_leaves_with_path(tree)]  # fmt: skip
    old, new = shapes(state), shapes(begun)
    if old != new:
        place = next((a[0] for a, b in zip(old, new) if a != b), "its leaves")
        raise Refused(f"Experiment.begin_round returns a state that differs in {place.lstrip('.')}: it must return a "
                      "TrainState of the same shapes; the reference must be start.own_start()")  # fmt: skip
