"""Combinators: functions from rewards to a reward. Each argument may be whatever `lift` takes.

All keep the unshaped `outcome` (of the first part, unless said otherwise) and pass the parts on to the logs.
A row that is unscored in any needed part is unscored. A combination is in the graph if all of its rewards
are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mlrl.rewards.completions import check_distinct
from mlrl.rewards.lifting import at_last_action, lift
from mlrl.types import Array, Prompts, Refused, RewardFn, Rewards, Rollout

Reward = RewardFn | Callable | Sequence[Callable]


def weighted_sum(rewards: Sequence[Reward], weights: Sequence[float], *, outcome: int = 0) -> RewardFn:
    """The weighted sum of rewards, token by token: sum_i weights[i] * rewards[i].

    A reward of weight 0.0 is only logged: rows that it leaves unscored stay scored, unless it gives the
    outcome.

    Args:
      rewards: at least one.
      weights: one for each reward.
      outcome: which reward's outcome is the unshaped score of the sum (filters and pass rates read it).
    Raises:
      Refused: the numbers of rewards and weights differ, or two rewards report a part of the same name.
    """
    parts = tuple(lift(reward) for reward in rewards)
    if len(parts) != len(weights) or not parts:
        raise Refused(
            f"weighted_sum needs one weight for each reward, got {len(parts)} rewards, {len(weights)} weights"
        )
    if not 0 <= outcome < len(parts):
        raise Refused(
            f"weighted_sum: outcome={outcome} must be the number of a reward, 0 to {len(parts) - 1}"
        )
    needed = [not _is_off(weight) or number == outcome for number, weight in enumerate(weights)]

    def combine(results: list[Rewards], rollout: Rollout, prompts: Prompts) -> Rewards:
        scored = _all(r.scored for r, need in zip(results, needed) if need)
        tokens = sum(w * r.tokens for w, r, need in zip(weights, results, needed) if need)
        return _rewards(tokens, results[outcome].outcome, scored, results)

    return _combined(parts, combine)


def gate(reward: Reward, by: Reward, *, threshold: float = 0.0) -> RewardFn:
    """A reward that counts only in rows where another's outcome exceeds a threshold: reward * [by >
    threshold].

    The outcome stays that of `reward`.
    """

    def combine(results: list[Rewards], rollout: Rollout, prompts: Prompts) -> Rewards:
        gated, gating = results
        tokens = jnp.where((gating.outcome > threshold)[:, None], gated.tokens, 0.0)
        return _rewards(tokens, gated.outcome, gated.scored & gating.scored, results)

    return _combined((lift(reward), lift(by)), combine)


def scale(reward: Reward, factor: float) -> RewardFn:
    """A reward times a constant. The outcome stays unscaled."""

    def combine(results: list[Rewards], rollout: Rollout, prompts: Prompts) -> Rewards:
        (inner,) = results
        return _rewards(factor * inner.tokens, inner.outcome, inner.scored, results)

    return _combined((lift(reward),), combine)


def clip(reward: Reward, low: float, high: float) -> RewardFn:
    """A reward whose sum over the row is clipped to [low, high].

    What is cut off is taken from the last action token, where an outcome reward sits anyway. The outcome
    stays unclipped.

    Raises:
      Refused: low > high.
    """
    if not low <= high:
        raise Refused(f"clip needs low <= high, got low={low}, high={high}")

    def combine(results: list[Rewards], rollout: Rollout, prompts: Prompts) -> Rewards:
        (inner,) = results
        total = inner.tokens.sum(axis=1)
        tokens = inner.tokens + at_last_action(jnp.clip(total, low, high) - total, rollout.action_mask)
        return _rewards(tokens, inner.outcome, inner.scored, results)

    return _combined((lift(reward),), combine)


def chain(reward: Reward, transforms: Sequence[Callable[[RewardFn], RewardFn]]) -> RewardFn:
    """A reward through one-argument combinators, first to last: chain(r, (f, g)) is g(f(r)).

    In Gin, `chain.transforms = [@clip, @center]` with the knobs of each bound apart.
    """
    result = lift(reward)
    for transform in transforms:
        result = transform(result)
    return result


def center(reward: Reward, *, decay: float = 0.99) -> RewardFn:
    """A reward minus the running mean of its rows' sums, taken off at the last action token.

    The mean is over the scored rows of earlier steps, so what is subtracted does not depend on the row
    itself, and in the first step is 0. A step's rows weigh `decay` times those of the next step:

        total <- decay * total + sum of scored rows,   count <- decay * count + scored rows,   mean = total /
        count

    Args:
      decay: in (0, 1]; 1 gives the plain mean of everything so far.
    Raises:
      Refused: decay outside (0, 1].
    """
    if not 0 < decay <= 1:
        raise Refused(f"center: decay must lie in (0, 1], got {decay}")
    inner = lift(reward)

    def init() -> dict[str, Any]:
        return {"inner": inner.init(), "total": jnp.zeros(()), "count": jnp.zeros(())}

    def update(state, rollout, prompts, task, models):
        rewards, inner_state = inner.update(state["inner"], rollout, prompts, task, models)
        sums = jnp.where(rewards.scored, rewards.tokens.sum(axis=1), 0.0)
        mean = state["total"] / jnp.maximum(state["count"], 1e-30)
        tokens = rewards.tokens - at_last_action(jnp.broadcast_to(mean, sums.shape), rollout.action_mask)
        state = {
            "inner": inner_state,
            "total": decay * state["total"] + sums.sum(),
            "count": decay * state["count"] + rewards.scored.sum(),
        }
        return _finish(_rewards(tokens, rewards.outcome, rewards.scored, [rewards]), inner.in_graph), state

    return RewardFn(init, update, inner.in_graph, inner.names)


def potential_shaping(
    reward: Reward, potential: Callable[[Rollout, Prompts], Array], *, discount: float = 1.0
) -> RewardFn:
    """A reward plus the discounted difference of a potential, which leaves the optimal policy as it was.

        shaped[a_k] = reward[a_k] + discount * potential[a_(k+1)] - potential[a_k]

    for the row's actions a_1 .. a_n, with potential[a_(n+1)] = 0: what lies between two actions (a tool's
    answer, the other player's turn) belongs to one step. With the discount of the returns, and with discount
    = 1 too, the shaping of a row sums to -potential[a_1], whatever was done.

    Args:
      reward: the reward to shape. Its outcome stays unshaped.
      potential: jittable f(rollout, prompts) -> [B,L]; column t speaks of the state before token t is chosen,
        so it may depend on tokens[:, :t] only.
      discount: of the returns.
    Returns:
      A RewardFn. A row whose potential is not finite at an action is unscored.
    Raises:
      Refused: the potential has another shape than [B,L].
    Reference: Ng, Harada, Russell (1999), Policy invariance under reward transformations.
    """

    def combine(results: list[Rewards], rollout: Rollout, prompts: Prompts) -> Rewards:
        (inner,) = results
        mask = jnp.asarray(rollout.action_mask)
        before = jnp.asarray(potential(rollout, prompts), jnp.float32)
        if before.shape != mask.shape:
            raise Refused(f"potential_shaping: the potential must return shape [B,L]={list(mask.shape)}, "
                          f"got {list(before.shape)}")  # fmt: skip
        finite = jnp.all(jnp.isfinite(before) | ~mask, axis=1)
        before = jax.lax.stop_gradient(jnp.where(mask & finite[:, None], before, 0.0))
        shaping = jnp.where(mask, discount * _at_next_action(before, mask) - before, 0.0)
        return _rewards(inner.tokens + shaping, inner.outcome, inner.scored & finite, results)

    return _combined((lift(reward),), combine)


def _at_next_action(values: Array, mask: Array) -> Array:
    """For each column the value at the next action after it, 0 if there is none: [B,L] -> [B,L]."""
    rows, length = mask.shape
    columns = jnp.where(mask, jnp.arange(length), length)
    next_column = jax.lax.cummin(columns, axis=1, reverse=True)
    next_column = jnp.concatenate([next_column[:, 1:], jnp.full((rows, 1), length)], axis=1)
    padded = jnp.concatenate([values, jnp.zeros((rows, 1), values.dtype)], axis=1)
    return jnp.take_along_axis(padded, next_column, axis=1)


def _is_off(weight: Any) -> bool:
    return isinstance(weight, (int, float)) and weight == 0


def _all(masks) -> Array:
    first, *rest = masks
    for mask in rest:
        first = first & mask
    return first


def _rewards(tokens: Array, outcome: Array, scored: Array, results: Sequence[Rewards]) -> Rewards:
    """Rewards with zeros in unscored rows and the parts of all results."""
    parts = {name: part for result in results for name, part in result.parts.items()}
    return Rewards(jnp.where(scored[:, None], tokens, 0.0), jnp.where(scored, outcome, 0.0), scored, parts)


def _finish(rewards: Rewards, in_graph: bool) -> Rewards:
    return rewards if in_graph else jax.device_get(rewards)


def _combined(
    rewards: Sequence[RewardFn], combine: Callable[[list[Rewards], Rollout, Prompts], Rewards]
) -> RewardFn:
    """A RewardFn whose state is the tuple of its rewards' states, and whose result is `combine` of theirs."""
    names = tuple(name for reward in rewards for name in reward.names)
    check_distinct(names)
    in_graph = all(reward.in_graph for reward in rewards)

    def init():
        return tuple(reward.init() for reward in rewards)

    def update(state, rollout, prompts, task, models):
        steps = [r.update(s, rollout, prompts, task, models) for r, s in zip(rewards, state)]
        results = [result for result, _ in steps]
        return _finish(combine(results, rollout, prompts), in_graph), tuple(s for _, s in steps)

    return RewardFn(init, update, in_graph, names)
