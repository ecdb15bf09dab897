"""Functions with a knob that a controller turns: its value is state, and rides in TrainState.controllers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from mlrl.divergences import Controller
from mlrl.types import Array, Metrics, Refused


class Controlled(NamedTuple):
    """A loss or advantage function of which one knob is state. Stands wherever the function itself may stand.

    name     "function.knob", the key in TrainState.controllers and, behind "controller/", in the metrics
    init     () -> state
    bind     state -> the function, with the knob set
    update   (state, metrics of the step) -> state
    """

    name: str
    init: Callable[[], Array]
    bind: Callable[[Array], Callable]
    update: Callable[[Array, Metrics], Array]


def controlled(*, function: Callable, knob: str, controller: Controller, observed: str) -> Controlled:
    """A function whose `knob` is turned after every step by what the step's metrics say.

    A step in which the observed metric is not finite (a skipped update) turns nothing.

    Args:
      function: a loss or an advantage function, such as regularizers.kl_penalty or advantages.kl_in_reward.
      knob: the keyword argument that is turned, such as "kl_coef".
      controller: from `divergences`: adaptive_kl, annealed, entropy_target.
      observed: the metric that the controller sees, such as "kl/reference" or "entropy".
    Raises: Refused, if the function has no such knob; in the loop, if there is no such metric.
    """
    plain = function
    while isinstance(plain, functools.partial):
        plain = plain.func
    name = f"{plain.__name__}.{knob}"
    known = inspect.signature(function).parameters
    if knob not in known:
        knobs = ", ".join(p for p, kind in known.items() if kind.kind is kind.KEYWORD_ONLY)
        raise Refused(f"controlled: {name.partition('.')[0]} has no knob {knob!r}: it has {knobs}")

    def update(state: Array, metrics: Metrics) -> Array:
        if observed not in metrics:
            raise Refused(f"the controller of {name} observes {observed!r}, which this experiment does not measure: "
                          f"it has {', '.join(sorted(metrics))}")  # fmt: skip
        seen = metrics[observed]
        return jnp.where(jnp.isfinite(seen), controller.update(state, seen), state)

    return Controlled(name, controller.init, lambda state: functools.partial(function, **{knob: state}), update)


def of(experiment: Any) -> dict[str, Controlled]:
    """The controlled functions among an experiment's losses and its advantage function, by name."""
    places = (*experiment.losses, getattr(experiment, "advantage_fn", None))
    found = [place for place in places if isinstance(place, Controlled)]
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise Refused(f"two controllers turn the same knob, {', '.join(sorted(names))}: keep one of them")
    return dict(zip(names, found))


def initial(experiment: Any) -> dict[str, Array]:
    """The first state of every controller, by name."""
    return {name: one.init() for name, one in of(experiment).items()}


def bound(function: Callable | Controlled, states: Mapping[str, Array]) -> Callable:
    """The plain function: a controlled one with its knob as the state has it, any other as it is."""
    return function.bind(states[function.name]) if isinstance(function, Controlled) else function


def turned(experiment: Any, states: Mapping[str, Array], metrics: Metrics) -> dict[str, Array]:
    """The states after a step with these metrics."""
    return {name: one.update(states[name], metrics) for name, one in of(experiment).items()}


def as_metrics(states: Mapping[str, Array]) -> Metrics:
    """What the knobs stood at, for the logs."""
    return {f"controller/{name}": value for name, value in states.items()}
