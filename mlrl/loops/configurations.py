"""What a round samples and selects by: kept as the experiment has it, or chosen anew in every round.

They are called at the start of a round, before anything of it is sampled. What they choose is in
TrainState.configuration, from where the round reads it, and which is logged.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlrl import selection
from mlrl.loops import checks
from mlrl.rewards.completions import name_of
from mlrl.sampling import Sampling
from mlrl.types import Array, Batch, Metrics, Refused, SelectFn, TrainState

ExploreFn = Callable[[TrainState], Batch]  # what the state's policy answers to a few training prompts, on the host


class Configuration(NamedTuple):
    """What a round samples and selects by.

    temperature  [] float32   of the sampler; the learner keeps Sampling's
    threshold    [] float32   the knob of the selection
    balance      [] float32   the balance score that it had when it was chosen
    """

    temperature: Array
    threshold: Array
    balance: Array


class ConfigureFn(NamedTuple):
    """How a round's configuration is chosen, as a pair with explicit state.

    init() -> (), or the Configuration before the first round
    choose(state, explore, select_fn) -> the state with the round's configuration
    """

    init: Callable[[], Any]
    choose: Callable[[TrainState, ExploreFn, SelectFn], TrainState]


def fixed() -> ConfigureFn:
    """Every round samples and selects as the experiment says."""
    return ConfigureFn(tuple, lambda state, explore, select_fn: state)


def balanced(*, temperatures: Sequence[float] = (0.5, 0.7, 0.9, 1.1), thresholds: Sequence[float] = (-0.5, 0.0, 0.5),
             target: float = 8.0) -> ConfigureFn:  # fmt: skip
    """The temperature and threshold with the highest balance score on samples of a few training prompts (B-STaR).

    The samples are `group_size` completions of `prompts_per_step` prompts of the round at each temperature, with the
    same keys, and are not learned from. Ties go to the lower place in `temperatures`, then in `thresholds`. Only these
    samples' outcomes are read, so labels are needed for a few prompts of a round. A single entry leaves nothing to
    choose there.

    Args:
      temperatures: above 0.
      thresholds: in units of the reward; values of select_fn's knob `threshold`.
      target: n* of selection.balance_score, how many right rows a prompt should give.
    Raises: Refused, if a list is empty or out of range.
    Reference: Zeng et al. 2024, "B-STaR". Left out: choosing the threshold again on all samples of the round, and
      growing the number of rows a prompt may give until the selection has a given size.
    """
    for name, values in {"temperatures": temperatures, "thresholds": thresholds}.items():
        if not isinstance(values, Sequence) or not values or not all(isinstance(v, int | float) for v in values):
            raise Refused(f"balanced.{name} must be a tuple of numbers, such as (0.5, 1.0), got {values!r}")
    if min(temperatures) <= 0.0 or target <= 0.0:
        raise Refused(f"balanced needs temperatures and a target above 0, got {temperatures!r} and {target!r}")

    def init() -> Configuration:
        return Configuration(*map(jnp.float32, (temperatures[0], thresholds[0], 0.0)))

    def choose(state: TrainState, explore: ExploreFn, select_fn: SelectFn) -> TrainState:
        old = state.configuration
        at = lambda t: state.replace(configuration=old._replace(temperature=jnp.full_like(old.temperature, t)))  # noqa: E731
        limits = jnp.asarray(thresholds, jnp.float32)
        scores = np.stack([_balances(explore(at(t)), limits, target, select_fn=select_fn) for t in temperatures])
        i, j = np.unravel_index(np.argmax(scores), scores.shape)
        chosen = Configuration(temperatures[i], thresholds[j], scores[i, j])
        return state.replace(configuration=jax.tree.map(jnp.full_like, old, chosen))

    return ConfigureFn(init, choose)


@functools.partial(jax.jit, static_argnames="select_fn")
def _balances(rows: Batch, thresholds: Array, target: float, *, select_fn: SelectFn) -> Array:
    """The balance score of the selection at each threshold: [number of thresholds]."""
    outcome, group = rows.rewards.outcome, rows.rollout.group
    one = lambda limit: selection.balance_score(  # noqa: E731
        outcome, select_fn(rows, threshold=limit) & rows.rewards.scored, group, target=target)  # fmt: skip
    return jax.lax.map(one, thresholds)


def sampled_by(sampling: Sampling, configuration: Any) -> Sampling:
    """The experiment's sampling, at the configuration's temperature if there is one."""
    return dataclasses.replace(sampling, temperature=configuration.temperature) if configuration else sampling


def selected_by(select_fn: SelectFn, configuration: Any) -> SelectFn:
    """The experiment's selection, at the configuration's threshold if there is one."""
    return functools.partial(select_fn, threshold=configuration.threshold) if configuration else select_fn


def as_metrics(configuration: Any) -> Metrics:
    """What was chosen, for the logs."""
    names = ("temperature", "threshold", "balance") if configuration else ()
    return {f"configuration/{name}": getattr(configuration, name) for name in names}


def fits(experiment: Any) -> None:
    """Raises Refused where a configuration is chosen that the selection cannot follow."""
    if not isinstance(experiment.configure, ConfigureFn):
        raise Refused("Experiment.configure must be a ConfigureFn: call a function, as @configurations.balanced()")
    if experiment.configure.init() and "threshold" not in inspect.signature(experiment.select_fn).parameters:
        raise Refused(f"Experiment.configure chooses a threshold, but {name_of(experiment.select_fn)} has no knob of "
                      "that name: set Experiment.select_fn = @selection.above or @selection.keep_correct")  # fmt: skip


def one_temperature(experiment: Any, read: set[str]) -> None:
    """Raises Refused where a temperature is chosen and a loss compares the sampler with the learner."""
    if experiment.configure.init() and checks.compares_with_sampler(experiment.old_log_probs, read):
        raise Refused("Experiment.configure chooses the sampler's temperature, and a loss compares the sampler's "
                      "log-probs with the learner's: set Experiment.losses = (@supervised.next_token,)")  # fmt: skip


def in_words(experiment: Any) -> list[str]:
    """What is sampled beside the rows of a round, if anything, for the description of a run."""
    prompts = f"{experiment.prompts_per_step} prompts x {experiment.group_size} completions"
    chosen = f"temperature and threshold are chosen first, on {prompts} at each temperature that is tried"
    return [chosen] if experiment.configure.init() else []
