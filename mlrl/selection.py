"""Which rows stay: functions batch -> keep [B] bool. They look at the unshaped outcome, and but for `above` never at
shaped rewards.

A dropped row leaves the mask and with it every denominator; whether it still counts in its group's baseline is decided
by running the selection before or after the advantages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp

from mlrl import groups, importance
from mlrl.types import Array, Batch, SelectFn


def keep_all(batch: Batch) -> Array:
    """Every scored row."""
    return batch.rewards.scored


def all_of(batch: Batch, *, select_fns: Sequence[SelectFn]) -> Array:
    """Rows that every one of the given functions keeps."""
    keep = keep_all(batch)
    for select_fn in select_fns:
        keep = keep & select_fn(batch)
    return keep


def with_spread(batch: Batch, *, tolerance: float = 1e-6) -> Array:
    """Rows of groups whose outcomes differ (DAPO's dynamic sampling, without the refill).

    Args:
        batch: reads rewards.outcome.
        tolerance: outcomes within it are equal.

    Returns:
        [B] bool.

    Reference: Yu et al. 2025, "DAPO".
    """
    scored = batch.rewards.scored
    return scored & ~groups.zero_spread(batch.rewards.outcome, batch.rollout.group, scored, tolerance=tolerance)


def not_truncated(batch: Batch) -> Array:
    """Scored rows that the policy ended itself (DAPO's overlong filter)."""
    return batch.rewards.scored & ~batch.rollout.truncated


def at_most(batch: Batch, *, limit_tokens: int) -> Array:
    """Scored rows with at most `limit_tokens` actions."""
    return batch.rewards.scored & (batch.rollout.action_mask.sum(axis=1) <= limit_tokens)


def keep_roles(batch: Batch, *, roles: Sequence[int] = (0,)) -> Array:
    """Scored rows of any of some roles."""
    return batch.rewards.scored & jnp.isin(batch.rollout.role, jnp.asarray(tuple(roles)))


def keep_role(batch: Batch, *, role: int = 0) -> Array:
    """Scored rows of one role: leaves out ReMax's greedy rows, a frozen opponent's, a judge's."""
    return batch.rewards.scored & (batch.rollout.role == role)


def keep_correct(batch: Batch, *, threshold: float = 0.5) -> Array:
    """Scored rows whose outcome is above the threshold (STaR, rejection sampling, RFT)."""
    return batch.rewards.scored & (batch.rewards.outcome > threshold)


def best_of_n(batch: Batch, *, keep: int = 1) -> Array:
    """The `keep` scored rows of each group with the highest outcome; ties go to the earlier row (RAFT: 1)."""
    place = groups.rank(batch.rewards.outcome, batch.rollout.group, batch.rewards.scored)
    return batch.rewards.scored & (place < keep)


def above(batch: Batch, *, threshold: float | Array = 0.0, keep: int = 4) -> Array:
    """Different completions whose reward is above the threshold, at most `keep` of a group, the highest first (B-STaR).

    It reads the shaped reward, unlike its neighbours: the verifier that it stands for gives degrees. Of equal
    completions of a group the first counts; so do ties.

    Args:
        batch: reads rewards.tokens, whose sum over a row is its reward, and rollout.tokens.
        threshold: in units of the reward.
        keep: the most that a group may give.

    Returns:
        [B] bool.

    Reference: Zeng et al. 2024, "B-STaR". Left out: the human solution beside every prompt's samples, and a `keep`
    that grows until the selection has a given size.
    """
    rollout, scored = batch.rollout, batch.rewards.scored
    reward = jnp.where(rollout.action_mask, batch.rewards.tokens, 0.0).sum(axis=1)
    said = jnp.where(rollout.action_mask, rollout.tokens, -1)
    useful = groups.first_of_equals(said, rollout.group, scored) & (reward > threshold)
    return useful & (groups.rank(reward, rollout.group, useful) < keep)


def best_and_worst(batch: Batch, *, tolerance: float = 1e-6) -> Array:
    """The best and the worst scored row of each group with spread: the pairs of online DPO."""
    scored, group, outcome = batch.rewards.scored, batch.rollout.group, batch.rewards.outcome
    best = groups.rank(outcome, group, scored) == 0
    worst = groups.rank(-outcome, group, scored) == 0
    return with_spread(batch, tolerance=tolerance) & (best | worst)


def with_role(batch: Batch, *, select_fn: SelectFn = best_and_worst, role: int = 1) -> Array:
    """What `select_fn` keeps among the rows of other roles, and the rows of `role` in the groups where it keeps any.

    SELM: the best and the worst sample, and beside them the greedy row, which is in no pair.

    Args:
        batch: rows of several roles; `select_fn` sees those of `role` as unscored.
        select_fn: a selection.
        role: of the rows that come along, if they are scored.

    Returns:
        [B] bool.
    """
    own = batch.rewards.scored & (batch.rollout.role == role)
    others = batch.rewards.replace(scored=batch.rewards.scored & ~own)
    keep = select_fn(batch.replace(rewards=others))
    return keep | (own & (groups.count(batch.rollout.group, keep) > 0))


def accept(batch: Batch, *, estimator: Callable[[Array], Array], limit: float) -> Array:
    """Scored rows whose old policy is near the one that sampled them: `importance.within`, for stale rollouts.

    Args:
        batch: reads old_log_probs, rollout.behavior_log_probs.
        estimator: divergences.k1, k2 or k3 of old - behavior, averaged over the row's actions.
        limit: in nats per token.

    Returns:
        [B] bool.
    """
    actions = batch.rollout.action_mask
    log_ratio = importance.log_ratio(batch.old_log_probs, batch.rollout.behavior_log_probs, actions)
    return batch.rewards.scored & importance.within(log_ratio, actions, estimator=estimator, limit=limit)


def balance_score(outcome: Array, selected: Array, group: Array, *, target: float = 8.0, threshold: float = 0.5):
    """B-STaR's measure of a selection: the mean over groups of min(c / target, 1) c / n.

    n selected rows of a group, c of them correct; groups without a selected row are left out. The temperature and
    reward threshold of a round are those that maximize it.

    Args:
        outcome: [B] unshaped score.
        selected: [B] bool.
        group: [B] ids in [0, B).
        target: how many useful rows a group should give.
        threshold: an outcome above it is correct.

    Returns:
        scalar in [0, 1]; 0 if nothing is selected.

    Reference: Zeng et al. 2024, "B-STaR".
    """
    n = groups.count(group, selected)
    c = groups.total((outcome > threshold).astype(jnp.float32), group, selected)
    score = jnp.minimum(c / target, 1.0) * c / jnp.maximum(n, 1.0)
    per_group = selected / jnp.maximum(n, 1.0)  # a group's selected rows share one vote
    return jnp.sum(score * per_group) / jnp.maximum(jnp.sum(per_group), 1.0)


def overlong_penalty(lengths: Array, *, limit_tokens: int, buffer_tokens: int) -> Array:
    """DAPO's soft penalty, to be added to a reward: 0 up to limit - buffer, then falling linearly to -1 at the limit.

    Args:
        lengths: [B] actions.
        limit_tokens: the longest a completion may be; -1 from there on.
        buffer_tokens: width of the slope.

    Returns:
        [B] float32 in [-1, 0].
    """
    return jnp.clip((limit_tokens - buffer_tokens - lengths) / buffer_tokens, -1.0, 0.0)

