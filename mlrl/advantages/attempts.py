"""Advantages of attempts at the same prompt (SCoRe): each attempt is credited with its own score only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp

from mlrl import groups
from mlrl.advantages.along import at_turn, by_turn
from mlrl.advantages.rows import Pair
from mlrl.types import Array, Batch, Refused


def attempt_scores(rewards: Array, *, weights: Sequence[float] = (1.0,), bonus: float = 0.0) -> Array:
    """What each attempt is worth: s_k = weights[k] * r_k + bonus * (r_k - r_{k-1}), and s_0 = weights[0] * r_0.

    The bonus is in the score of the attempt that improved alone. In that of the attempt before it, it would pay
    -bonus * r for being right, and teach to fail first.

    Args:
        rewards: [B,K], by attempt.
        weights: of the first attempts; the last one is that of all further.
        bonus: alpha. With rewards of 0 and 1, weights of 1 and alpha 10 a second attempt scores +11 where it mends, +1
            where it keeps a right answer, -10 where it spoils one, 0 where it stays wrong.

    Returns:
        [B,K].

    Raises:
        Refused: without weights.
    """
    if not weights:
        raise Refused("advantages.attempts.weights is empty: give the weight of each attempt's reward, as (1.0, 1.0)")
    weight = jnp.asarray([weights[min(k, len(weights) - 1)] for k in range(rewards.shape[1])], jnp.float32)
    better = jnp.diff(rewards, axis=1, prepend=rewards[:, :1])
    return weight * rewards + bonus * better


def attempts(
    batch: Batch,
    *,
    weights: Sequence[float] = (1.0,),
    bonus: float = 0.0,
    baseline: groups.Statistic = groups.group_mean,
    scale: groups.Statistic = groups.no_scale,
    ddof: int = 1,
    eps: float = 0.0,
    alone: Callable[[Array, Array], Array] = groups.alone_zero,
) -> Pair:
    """`attempt_scores` of a row's turns, each on its own turn's tokens, centred on the same attempt of the group.

    Nothing flows back: what the second attempt earns is not in the first one's advantage. For `retry.always`, where
    every row has every attempt. SCoRe's stage I is weights=(0.0, 1.0); stage II is weights=(1.0, 1.0), bonus=10.0.

    Args:
        batch: reads rollout.turn.
        weights, bonus: as in `attempt_scores`.
        baseline: and the rest as in `groups.group_relative`, over rows of one group and turn.
        scale: same.
        ddof: same.
        eps: same.
        alone: same.

    Returns:
        (advantages, returns); returns are the scores.

    Reference: Kumar et al. 2024, "Training Language Models to Self-Correct via Reinforcement Learning" (SCoRe). The
    paper's baseline is not known to us; centring each attempt by itself is ours.
    """
    b, l = batch.mask.shape
    rewards, present = by_turn(batch)
    scores = attempt_scores(rewards, weights=weights, bonus=bonus)
    ids = (batch.rollout.group[:, None] * l + jnp.arange(l)[None, :]).reshape(-1)
    relative = groups.group_relative(
        scores.reshape(-1), ids, present.reshape(-1), baseline=baseline, scale=scale, ddof=ddof, eps=eps, alone=alone
    ).reshape(b, l)
    turn = batch.rollout.turn
    return at_turn(relative, turn, batch.mask), at_turn(scores, turn, batch.mask)
