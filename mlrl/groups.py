"""Statistics of rows within their group, and scores relative to them. Groups are found by id, never by stride.

Group ids lie in [0, B); groups may be partial and in any order. A row with scored=False is in no statistic and gets 0.
Baselines and scales are functions, `f(scores [B], group [B], scored [B]) -> [B]`, handed to `group_relative`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mlrl.types import Array

Statistic = Callable[..., Array]


def total(x: Array, group: Array, scored: Array) -> Array:
    """Sum of x over the scored rows of each row's group: [B], [B], [B] -> [B]."""
    return jax.ops.segment_sum(jnp.where(scored, x, 0.0), group, num_segments=group.shape[0])[group]


def count(group: Array, scored: Array) -> Array:
    """Number of scored rows in each row's group, as float32: [B], [B] -> [B]."""
    return total(jnp.ones(group.shape, jnp.float32), group, scored)


def zero_spread(scores: Array, group: Array, scored: Array, *, tolerance: float = 1e-6) -> Array:
    """True for rows whose group has max - min <= tolerance over its scored rows (also when it has none).

    Args:
        scores: [B]. The unshaped reward, where this decides what is filtered.
        group: [B] ids in [0, B).
        scored: [B] bool.
        tolerance: in units of the score; rewards that went through float32 sums are rarely equal bitwise.

    Returns:
        [B] bool.
    """
    n = group.shape[0]
    high = jax.ops.segment_max(jnp.where(scored, scores, -jnp.inf), group, num_segments=n)[group]
    low = jax.ops.segment_min(jnp.where(scored, scores, jnp.inf), group, num_segments=n)[group]
    return (count(group, scored) == 0) | (high - low <= tolerance)


def rank(scores: Array, group: Array, scored: Array) -> Array:
    """Place of each row in its group by falling score, from 0; unscored rows come last, ties go to the earlier row.

    Args:
        scores: [B].
        group: [B] ids in [0, B).
        scored: [B] bool.

    Returns:
        [B] int32.
    """
    n = group.shape[0]
    order = jnp.lexsort((jnp.arange(n), -jnp.where(scored, scores, -jnp.inf), group))
    sizes = jax.ops.segment_sum(jnp.ones(n, jnp.int32), group, num_segments=n)
    first = jnp.cumsum(sizes) - sizes
    return jnp.zeros(n, jnp.int32).at[order].set(jnp.arange(n, dtype=jnp.int32) - first[group[order]])


def fingerprint(rows: Array) -> tuple[Array, Array]:
    """Two hashes of each row of whole numbers: [B,L] -> [B], [B] uint32. Equal rows have equal ones."""
    length = rows.shape[1]
    multipliers = jax.random.bits(jax.random.key(0x726F7773), (2, length), jnp.uint32) | 1
    mixed = rows.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + jnp.arange(length, dtype=jnp.uint32)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA6B)
    first, second = jnp.sum((mixed ^ (mixed >> 13)) * multipliers[:, None], axis=-1, dtype=jnp.uint32)
    return first, second


def first_of_equals(rows: Array, group: Array, scored: Array) -> Array:
    """True for scored rows that no earlier scored row of their group equals.

    Rows are sorted by hashes and neighbours compared whole, so different rows are never taken for equal ones. That
    equal ones are missed takes a third row with both of their hashes.

    Args:
        rows: [B,L] whole numbers, such as tokens with -1 outside the action mask.
        group: [B] ids in [0, B).
        scored: [B] bool.

    Returns:
        [B] bool.
    """
    n = group.shape[0]
    place = place_of_first_equal(rows, jnp.where(scored, group, n))  # unscored rows are in a group of their own
    return scored & (place == jnp.arange(n))


def place_of_first_equal(rows: Array, home: Array) -> Array:
    """Which is the first row that a row equals, itself or an earlier one of the same home: [B,L], [B] -> [B] int32.

    Found as `first_of_equals` says.
    """
    n = home.shape[0]
    first, second = fingerprint(rows)
    order = jnp.lexsort((jnp.arange(n), second, first, home))
    rows, home = rows[order], home[order]
    same = jnp.all(rows[1:] == rows[:-1], axis=1) & (home[1:] == home[:-1])
    new = jnp.concatenate([jnp.ones(1, bool), ~same])
    start = jax.lax.cummax(jnp.where(new, jnp.arange(n), 0))  # of each run of equal rows, which are in their order
    return jnp.zeros(n, jnp.int32).at[order].set(order[start].astype(jnp.int32))


# Baselines.


def group_mean(scores: Array, group: Array, scored: Array) -> Array:
    """Mean over the scored rows of the group."""
    return total(scores, group, scored) / jnp.maximum(count(group, scored), 1.0)


def batch_mean(scores: Array, group: Array, scored: Array) -> Array:
    """Mean over all scored rows."""
    return group_mean(scores, jnp.zeros_like(group), scored)


def leave_one_out_mean(scores: Array, group: Array, scored: Array) -> Array:
    """Mean over the *other* scored rows of the group; 0 for a row that is alone."""
    others = count(group, scored) - 1.0
    return (total(scores, group, scored) - jnp.where(scored, scores, 0.0)) / jnp.maximum(others, 1.0)


def no_baseline(scores: Array, group: Array, scored: Array) -> Array:
    """Zero."""
    del group, scored
    return jnp.zeros_like(scores)


# Scales.


def group_std(scores: Array, group: Array, scored: Array, *, ddof: int) -> Array:
    """Standard deviation over the scored rows of the group, divided by n - ddof; 0 where n <= ddof."""
    squares = total(jnp.square(scores - group_mean(scores, group, scored)), group, scored)
    n = count(group, scored)
    return jnp.where(n > ddof, jnp.sqrt(squares / jnp.maximum(n - ddof, 1.0)), 0.0)


def batch_std(scores: Array, group: Array, scored: Array, *, ddof: int) -> Array:
    """Standard deviation over all scored rows, divided by n - ddof; 0 where n <= ddof."""
    return group_std(scores, jnp.zeros_like(group), scored, ddof=ddof)


def leave_one_out_std(scores: Array, group: Array, scored: Array, *, ddof: int) -> Array:
    """Standard deviation over the *other* scored rows of the group; 0 where they are equal or too few.

    Equal means a variance below 1e-6 of the whole group's sum of squares: float32 sums cannot tell less from nothing.
    """
    n = count(group, scored) - 1.0
    deviation = jnp.where(scored, scores - group_mean(scores, group, scored), 0.0)
    squares = total(jnp.square(deviation), group, scored)
    shift = deviation / jnp.maximum(n, 1.0)  # how far the mean of the others lies from the group's, up to sign
    rest = squares - jnp.square(deviation) - n * jnp.square(shift)
    usable = (n > ddof) & (rest > 1e-6 * squares)
    return jnp.sqrt(jnp.where(usable, rest / jnp.maximum(n - ddof, 1.0), 0.0))


def no_scale(scores: Array, group: Array, scored: Array, *, ddof: int) -> Array:
    """One. Set eps=0.0 with it, or the result is divided by 1 + eps."""
    del group, scored, ddof
    return jnp.ones_like(scores)


# What a row without company gets.


def alone_zero(advantages: Array, scores: Array) -> Array:
    """A row that is the only scored one of its group learns nothing (RLOO, SkyRL)."""
    del advantages
    return jnp.zeros_like(scores)


def alone_score(advantages: Array, scores: Array) -> Array:
    """A row that is the only scored one of its group keeps its raw score (verl's GRPO: mean 0, std 1)."""
    del advantages
    return scores


def alone_as_computed(advantages: Array, scores: Array) -> Array:
    """No special rule: for baselines that reach beyond the group."""
    del scores
    return advantages


def group_relative(
    scores: Array,
    group: Array,
    scored: Array,
    *,
    baseline: Statistic = group_mean,
    scale: Statistic = group_std,
    ddof: int = 1,
    eps: float = 1e-6,
    alone: Callable[[Array, Array], Array] = alone_zero,
    tolerance: float = 1e-6,
) -> Array:
    """Scores relative to their group: A = (score - baseline) / (scale + eps).

    Differences of at most `tolerance` are 0 exactly, so equal rewards never turn rounding into a signal. Where the
    scale is 0 the difference is not divided (NeMo-RL's rule; elsewhere the difference is 0 there anyway). "GRPO" is a
    different number in every library; the settings that reproduce each are in tests/advantages_test.py.

    Args:
        scores: [B].
        group: [B] ids in [0, B).
        scored: [B] bool; an unscored row leaves every statistic and gets 0.
        baseline: group_mean, batch_mean, leave_one_out_mean or no_baseline.
        scale: group_std, batch_std, leave_one_out_std or no_scale.
        ddof: subtracted from the count under the variance.
        eps: added to the scale.
        alone: alone_zero, alone_score or alone_as_computed: the rule for a group with one scored row.
        tolerance: in units of the score.

    Returns:
        [B] advantages.

    Reference: Shao et al. 2024, "DeepSeekMath" (GRPO).
    """
    scores = jnp.where(scored, scores, 0.0)
    difference = scores - baseline(scores, group, scored)
    difference = jnp.where(jnp.abs(difference) <= tolerance, 0.0, difference)
    spread = scale(scores, group, scored, ddof=ddof)
    advantages = difference / jnp.where(spread > 0.0, spread + eps, 1.0)
    advantages = jnp.where(count(group, scored) == 1, alone(advantages, scores), advantages)
    return jnp.where(scored, advantages, 0.0)


def win_rate(preference: Array, group: Array, scored: Array) -> Array:
    """A row's reward is how often it beats the other rows of its group: R_i = mean over j != i of P(i beats j).

    Args:
        preference: [B,B] probability in [0,1] that row i beats row j; only pairs of one group are read. Asking a
            judge in both orders and averaging makes P(i,j) + P(j,i) = 1, and the group mean 1/2.
        group: [B] ids.
        scored: [B] bool.

    Returns:
        [B] float32 in [0,1]; 0.5 for a row without scored company, 0 for an unscored row.

    Reference: Swamy et al. 2024, "A Minimaximalist Approach to RLHF" (SPO). Left out: the queue of past rollouts.
    """
    b = group.shape[0]
    rivals = (group[:, None] == group[None, :]) & scored[:, None] & scored[None, :] & ~jnp.eye(b, dtype=bool)
    wins = jnp.where(rivals, preference, 0.0).sum(axis=1)
    n = rivals.sum(axis=1)
    return jnp.where(scored, jnp.where(n > 0, wins / jnp.maximum(n, 1), 0.5), 0.0)
