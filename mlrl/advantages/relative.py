"""Advantages of a row relative to other rows: of its group, of its role, or of the past."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from mlrl import groups
from mlrl import returns as along
from mlrl.advantages.rows import Pair, reward_tokens, row_scores, spread, whiten
from mlrl.types import Array, Batch, Refused, StatefulAdvantage, require_whole


def grpo(
    batch: Batch,
    *,
    baseline: groups.Statistic = groups.group_mean,
    scale: groups.Statistic = groups.group_std,
    ddof: int = 1,
    eps: float = 1e-6,
    alone: Callable[[Array, Array], Array] = groups.alone_zero,
    tolerance: float = 1e-6,
) -> Pair:
    """Group-relative advantages, one per row: `groups.group_relative` of the row scores, arguments as there.

    Dr. GRPO: scale=groups.no_scale, eps=0.0. REINFORCE with a batch baseline: baseline=groups.batch_mean,
    alone=groups.alone_as_computed.

    Returns:
        (advantages, returns).

    Reference: Shao et al. 2024, "DeepSeekMath".
    """
    relative = groups.group_relative(
        row_scores(batch),
        batch.rollout.group,
        batch.rewards.scored,
        baseline=baseline,
        scale=scale,
        ddof=ddof,
        eps=eps,
        alone=alone,
        tolerance=tolerance,
    )
    return spread(batch, relative)


def rloo(batch: Batch) -> Pair:
    """Score minus the mean of the group's other rows; a row alone gets 0.

        A_i = R_i - sum over j != i of R_j / (n - 1),   n scored rows in the group

    Reference: Ahmadian et al. 2024, "Back to Basics".
    """
    return grpo(batch, baseline=groups.leave_one_out_mean, scale=groups.no_scale, eps=0.0)


def reinforce_pp_baseline(batch: Batch) -> Pair:
    """REINFORCE++-baseline: score minus the group mean, whitened over the tokens of the batch.

    Reference: Hu 2025, "REINFORCE++".
    """
    advantages, returns = grpo(batch, scale=groups.no_scale, eps=0.0)
    return whiten(advantages, batch.mask), returns


def opo(batch: Batch) -> Pair:
    """Score minus the group's length-weighted mean, sum(n_j R_j) / sum(n_j) with n_j actions; no scale.

    Reference: Hao et al. 2025, "On-Policy RL with Optimal Reward Baseline". Meant for strictly on-policy updates.
    """
    scores, group, scored = row_scores(batch), batch.rollout.group, batch.rewards.scored
    lengths = batch.rollout.action_mask.sum(axis=1).astype(jnp.float32)
    weighted = groups.total(lengths * scores, group, scored)
    difference = scores - weighted / jnp.maximum(groups.total(lengths, group, scored), 1.0)
    alone = groups.zero_spread(scores, group, scored)
    return spread(batch, jnp.where(scored & ~alone, difference, 0.0))


def maxrl(batch: Batch, *, eps: float = 1e-6) -> Pair:
    """(R - m) / (m + eps) with the group mean m; groups with m <= 0 get 0. For non-negative scores.

    Reference: Tajwar et al. 2026, "Maximum Likelihood Reinforcement Learning".
    """
    scores, group, scored = row_scores(batch), batch.rollout.group, batch.rewards.scored
    mean = groups.group_mean(scores, group, scored)
    centred = groups.group_relative(scores, group, scored, scale=groups.no_scale, eps=0.0)
    return spread(batch, jnp.where(mean > 0, centred / jnp.where(mean > 0, mean + eps, 1.0), 0.0))


def gdpo(batch: Batch, *, weights: Mapping[str, float], ddof: int = 1, eps: float = 1e-4) -> Pair:
    """Each reward part is standardized in its group by itself, then summed with weights and whitened over tokens.

    Args:
        batch: reads rewards.parts.
        weights: weight of each part, by name.
        ddof: of the group's standard deviation, and of the whitening.
        eps: added to the group's standard deviation.

    Returns:
        (advantages, returns).

    Raises:
        Refused: if a named part is missing.

    Reference: Liu et al. 2026, "GDPO".
    """
    group, scored = batch.rollout.group, batch.rewards.scored
    total = jnp.zeros(group.shape, jnp.float32)
    for name, weight in weights.items():
        if name not in batch.rewards.parts:
            have = ", ".join(sorted(batch.rewards.parts)) or "none"
            raise Refused(f"advantages.gdpo: weights names the reward part {name!r}, but the parts are {have}")
        part = batch.rewards.parts[name]
        total = total + weight * groups.group_relative(part, group, scored, ddof=ddof, eps=eps)
    advantages, returns = spread(batch, total)
    return whiten(advantages, batch.mask, ddof=ddof), returns


def remax(batch: Batch, *, greedy_role: int = 1) -> Pair:
    """Reward-to-go minus the score of the group's greedy row.

    Args:
        batch: its greedy rows have role `greedy_role` and share the group of their samples; they get 0 here, and
            `selection.keep_role` takes them out of the loss. A group without one gets 0.
        greedy_role: role of the greedy rows.

    Returns:
        (advantages, returns).

    Reference: Li et al. 2023, "ReMax".
    """
    greedy = batch.rewards.scored & (batch.rollout.role == greedy_role)
    baseline = groups.group_mean(row_scores(batch), batch.rollout.group, greedy)
    usable = (groups.count(batch.rollout.group, greedy) > 0) & ~greedy & batch.rewards.scored
    to_go = along.reward_to_go(reward_tokens(batch), batch.mask)
    return jnp.where(batch.mask & usable[:, None], to_go - baseline[:, None], 0.0), to_go


def by_score(batch: Batch, *, tolerance: float = 1e-6) -> Array:
    """P(row i beats row j) by the rows' own scores: 1 for the higher, 1/2 for a tie within the tolerance: [B,B]."""
    difference = row_scores(batch)[:, None] - row_scores(batch)[None, :]
    return jnp.where(jnp.abs(difference) <= tolerance, 0.5, (difference > 0).astype(jnp.float32))


def spo(batch: Batch, *, preference_fn: Callable[[Batch], Array] = by_score) -> Pair:
    """How often a row beats the other rows of its group, minus their mean (1/2 if the judge is symmetric); no scale.

    Args:
        batch: the rows.
        preference_fn: batch -> [B,B], the probability that row i beats row j; by_score, or a judge's.

    Returns:
        (advantages, returns).

    Reference: Swamy et al. 2024, "A Minimaximalist Approach to RLHF"; the rate itself is `groups.win_rate`.
    """
    group, scored = batch.rollout.group, batch.rewards.scored
    rate = jax.lax.stop_gradient(groups.win_rate(preference_fn(batch), group, scored))
    return spread(batch, groups.group_relative(rate, group, scored, scale=groups.no_scale, eps=0.0))


def role_relative(batch: Batch, *, ddof: int = 1, eps: float = 1e-8) -> Pair:
    """Scores standardized over all rows of the same role (TRR++ with one task), each row counting once.

    Reference: Zhao et al. 2025, "Absolute Zero", whose statistics count tokens rather than rows.
    """
    role = batch.rollout.role
    ids = jnp.argmax(role[:, None] == role[None, :], axis=1)  # the first row of the role: an id below B
    relative = groups.group_relative(row_scores(batch), ids, batch.rewards.scored, ddof=ddof, eps=eps)
    return spread(batch, relative)


def task_relative(batch: Batch, *, eps: float = 1e-8) -> Pair:
    """TRR++: scores whitened over all tokens of the rows with the same role, which says task and role at once.

        A = (R - m) / sqrt(v + eps),   m = sum(n_i R_i) / sum(n_i),   v = sum(n_i (R_i - m)^2) / sum(n_i)

    over the rows i of that role, with n_i actions: long rows weigh more, as in the authors' code,
    whose variance has one less below.

    Args:
        batch: rows of rollout.role in any numbers, such as those of rollouts.propose_and_solve.
        eps: added to the variance. A role whose scores are all equal gets 0.

    Returns:
        (advantages, returns).

    Reference: Zhao et al. 2025, "Absolute Zero". `role_relative` counts every row once.
    """
    role, scored, scores = batch.rollout.role, batch.rewards.scored, row_scores(batch)
    ids = jnp.argmax(role[:, None] == role[None, :], axis=1)  # the first row of the role: an id below B
    lengths = batch.rollout.action_mask.sum(axis=1).astype(jnp.float32)
    over_tokens = lambda x: groups.total(lengths * x, ids, scored) / jnp.maximum(  # noqa: E731
        groups.total(lengths, ids, scored), 1.0)  # fmt: skip
    difference = scores - over_tokens(scores)
    relative = difference * jax.lax.rsqrt(over_tokens(jnp.square(difference)) + eps)
    alone = groups.zero_spread(scores, ids, scored)
    return spread(batch, jnp.where(scored & ~alone, relative, 0.0))


def own_role(batch: Batch) -> Array:
    """The role of each row, [B]."""
    return batch.rollout.role


def one_role(batch: Batch) -> Array:
    """0 for each row, [B]: all roles are one."""
    return jnp.zeros_like(batch.rollout.role)


def role_conditioned(
    *, roles: int = 2, decay: float = 0.95, role_fn: Callable[[Batch], Array] = own_role
) -> StatefulAdvantage:
    """Score minus a running mean kept for each role: A = R - b, then b <- decay^n b + (1 - decay^n) mean R.

    n is how many scored rows of the batch have that role. All rows see the old b (the authors update row by row), so
    the order of rows does not matter. A role is a player; a rollout of several games numbers the players of each apart.

    Args:
        roles: how many roles; they lie in [0, roles).
        decay: per row.
        role_fn: own_role, or one_role for a single running mean that all players share.

    Returns:
        StatefulAdvantage; its state is [roles] float32, from 0.

    Raises:
        Refused: roles below 1, or decay outside [0, 1).

    Reference: Liu et al. 2025, "SPIRAL".
    """
    require_whole("role_conditioned", "roles", roles, 1)
    if not 0.0 <= decay < 1.0:
        raise Refused(f"role_conditioned: decay must lie in [0, 1), got {decay}")

    def update(state: Array, batch: Batch) -> tuple[Pair, Array]:
        scores, scored, role = row_scores(batch), batch.rewards.scored, role_fn(batch)
        n = jnp.zeros((roles,), jnp.float32).at[role].add(scored)
        mean = jnp.zeros((roles,), jnp.float32).at[role].add(scores) / jnp.maximum(n, 1.0)
        kept = decay**n
        relative = jnp.where(scored, scores - state[role], 0.0)
        return spread(batch, relative), kept * state + (1.0 - kept) * mean

    return StatefulAdvantage("role_conditioned", lambda: jnp.zeros((roles,), jnp.float32), update)
