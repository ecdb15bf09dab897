"""Functions with a knob that a controller turns, and advantages that remember; TrainState.controllers has their state.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from mlrl.divergences import Controller
from mlrl.types import Array, Batch, Metrics, Refused, StatefulAdvantage


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


def of(experiment: Any) -> dict[str, Controlled | StatefulAdvantage]:
    """What has a state among an experiment's losses and its advantage function, by name.

    Raises: Refused, if two have one name.
    """
    places = (*experiment.losses, getattr(experiment, "advantage_fn", None))
    found = [place for place in places if isinstance(place, Controlled | StatefulAdvantage)]
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise Refused(f"two controllers turn the same knob, {', '.join(sorted(names))}: keep one of them")
    return dict(zip(names, found))


def initial(experiment: Any) -> dict[str, Array]:
    """The first state of every controller, by name."""
    return {name: one.init() for name, one in of(experiment).items()}


def require_no_memory(experiment: Any) -> None:
    """Raises Refused if the advantage function remembers, where nobody hands it the rows of every step."""
    if isinstance(experiment.advantage_fn, StatefulAdvantage):
        raise Refused(f"Experiment.advantage_fn is {experiment.advantage_fn.name}, which remembers from step to step, "
                      "as only the online loop lets it: choose another, such as @advantages.role_relative")  # fmt: skip


def bound(function: Callable | Controlled | StatefulAdvantage, states: Mapping[str, Array]) -> Callable:
    """The plain function: with its knob, or what it remembers, as the state has it."""
    if isinstance(function, StatefulAdvantage):
        return lambda batch: function.update(states[function.name], batch)[0]
    return function.bind(states[function.name]) if isinstance(function, Controlled) else function


def turned(experiment: Any, states: Mapping[str, Array], metrics: Metrics,
           batch: Batch | None = None) -> dict[str, Array]:  # fmt: skip
    """The states after a step with these metrics, and these rows where there is an advantage that remembers."""
    after = lambda one, state: (  # noqa: E731
        one.update(state, batch)[1] if isinstance(one, StatefulAdvantage) else one.update(state, metrics))
    return {name: after(one, states[name]) for name, one in of(experiment).items()}


def as_metrics(states: Mapping[str, Array]) -> Metrics:
    """What the knobs stood at, for the logs; a state of several numbers is shown by their places."""
    shown = {f"controller/{name}": value for name, value in states.items() if not jnp.ndim(value)}
    for name, value in states.items():
        if jnp.ndim(value):
            shown |= {f"controller/{name}/{i}": one for i, one in enumerate(jnp.ravel(value))}
    return shown
