"""Advantage functions: batch -> (advantages [B,L], returns [B,L]), over the whole batch and before it is split.

The mathematics is in `mlrl.groups` (across rows) and `mlrl.returns` (along rows). A row's score is the sum of its
reward tokens. Advantages are 0 outside batch.mask; nothing is whitened unless the name says so. Returns are
undiscounted rewards-to-go wherever no value function defines them better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mlrl import divergences, groups, importance, reductions
from mlrl import returns as along
from mlrl.types import AdvantageFn, Array, Batch, Refused

Pair = tuple[Array, Array]


def row_scores(batch: Batch) -> Array:
    """A row's score: the sum of its reward tokens, 0 for an unscored row: [B]."""
    return _rewards(batch).sum(axis=1)


def _rewards(batch: Batch) -> Array:
    return jnp.where(batch.rewards.scored[:, None] & batch.rollout.valid, batch.rewards.tokens, 0.0)


def _spread(batch: Batch, advantages: Array) -> Pair:
    """Gives every token of a row the row's advantage; returns are rewards-to-go."""
    rewards = _rewards(batch)
    to_go = rewards.sum(axis=1, keepdims=True) - jnp.cumsum(rewards, axis=1) + rewards
    return jnp.where(batch.mask, advantages[:, None], 0.0), jnp.where(batch.mask, to_go, 0.0)


# Relative to other rows.


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
    return _spread(batch, relative)


def rloo(batch: Batch) -> Pair:
    """Score minus the mean of the group's other rows; a row alone gets 0.

    Reference: Ahmadian et al. 2024, "Back to Basics".
    """
    return grpo(batch, baseline=groups.leave_one_out_mean, scale=groups.no_scale, eps=0.0)


def opo(batch: Batch) -> Pair:
    """Score minus the group's length-weighted mean, sum(n_j R_j) / sum(n_j) with n_j actions; no scale.

    Reference: Hao et al. 2025, "On-Policy RL with Optimal Reward Baseline". Meant for strictly on-policy updates.
    """
    scores, group, scored = row_scores(batch), batch.rollout.group, batch.rewards.scored
    lengths = batch.rollout.action_mask.sum(axis=1).astype(jnp.float32)
    weighted = groups.total(lengths * scores, group, scored)
    difference = scores - weighted / jnp.maximum(groups.total(lengths, group, scored), 1.0)
    alone = groups.zero_spread(scores, group, scored)
    return _spread(batch, jnp.where(scored & ~alone, difference, 0.0))


def maxrl(batch: Batch, *, eps: float = 1e-6) -> Pair:
    """(R - m) / (m + eps) with the group mean m; groups with m <= 0 get 0. For non-negative scores.

    Reference: Tajwar et al. 2026, "Maximum Likelihood Reinforcement Learning".
    """
    scores, group, scored = row_scores(batch), batch.rollout.group, batch.rewards.scored
    mean = groups.group_mean(scores, group, scored)
    centred = groups.group_relative(scores, group, scored, scale=groups.no_scale, eps=0.0)
    return _spread(batch, jnp.where(mean > 0, centred / jnp.where(mean > 0, mean + eps, 1.0), 0.0))


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
    advantages, returns = _spread(batch, total)
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
    to_go = along.reward_to_go(_rewards(batch), batch.mask)
    return jnp.where(batch.mask & usable[:, None], to_go - baseline[:, None], 0.0), to_go


def role_relative(batch: Batch, *, ddof: int = 1, eps: float = 1e-8) -> Pair:
    """Scores standardized over all rows of the same role (TRR++ with one task), each row counting once.

    Reference: Zhao et al. 2025, "Absolute Zero", whose statistics count tokens rather than rows.
    """
    role = batch.rollout.role
    ids = jnp.argmax(role[:, None] == role[None, :], axis=1)  # the first row of the role: an id below B
    relative = groups.group_relative(row_scores(batch), ids, batch.rewards.scored, ddof=ddof, eps=eps)
    return _spread(batch, relative)


class RoleBaseline(NamedTuple):
    """A stateful advantage: init() -> state; update(state, batch, game [B]) -> ((advantages, returns), state)."""

    init: Callable[[], Any]
    update: Callable[..., tuple[Pair, Any]]


def role_conditioned(*, games: int, roles: int, decay: float = 0.95) -> RoleBaseline:
    """Score minus a running mean kept for each game and role: A = R - b, then b <- decay^n b + (1 - decay^n) mean R.

    n is how many rows of the batch belong to that game and role. All rows see the old b (the authors update row by
    row), so the order of rows does not matter.

    Args:
        games: how many games; ids lie in [0, games).
        roles: how many roles.
        decay: per row.

    Returns:
        RoleBaseline; its state is [games, roles] float32, from 0.

    Reference: Liu et al. 2025, "SPIRAL".
    """

    def update(state: Array, batch: Batch, game: Array) -> tuple[Pair, Array]:
        scores, scored = row_scores(batch), batch.rewards.scored
        where = (game, batch.rollout.role)
        n = jnp.zeros((games, roles), jnp.float32).at[where].add(scored)
        mean = jnp.zeros((games, roles), jnp.float32).at[where].add(scores) / jnp.maximum(n, 1.0)
        kept = decay**n
        relative = jnp.where(scored, scores - state[where], 0.0)
        return _spread(batch, relative), kept * state + (1.0 - kept) * mean

    return RoleBaseline(init=lambda: jnp.zeros((games, roles), jnp.float32), update=update)


# Along the row.


def no_bootstrap(batch: Batch) -> Array:
    """A truncated episode is treated as ended: 0 for every row."""
    return jnp.zeros(batch.mask.shape[0], jnp.float32)


def last_value(batch: Batch) -> Array:
    """A truncated episode would have gone on: the value before its last action stands for the value after it."""
    action = batch.rollout.action_mask
    position = jnp.max(jnp.where(action, jnp.arange(action.shape[1]), -1), axis=1)
    value = jnp.take_along_axis(batch.values, jnp.maximum(position, 0)[:, None], axis=1)[:, 0]
    return jnp.where(batch.rollout.truncated & (position >= 0), value, 0.0)


def reinforce(batch: Batch, *, discount: float = 1.0) -> Pair:
    """Reward-to-go, without any baseline."""
    to_go = along.reward_to_go(_rewards(batch), batch.mask, discount=discount)
    return to_go, to_go


def reinforce_pp(batch: Batch, *, discount: float = 1.0) -> Pair:
    """REINFORCE++: reward-to-go, whitened over the tokens of the batch.

    Reference: Hu 2025, "REINFORCE++". Its KL goes into the reward: `kl_in_reward`.
    """
    to_go = along.reward_to_go(_rewards(batch), batch.mask, discount=discount)
    return whiten(to_go, batch.mask), to_go


def reinforce_pp_baseline(batch: Batch) -> Pair:
    """REINFORCE++-baseline: score minus the group mean, whitened over the tokens of the batch.

    Reference: Hu 2025, "REINFORCE++".
    """
    return whitened(batch, advantage_fn=lambda b: grpo(b, scale=groups.no_scale, eps=0.0))


def gae(
    batch: Batch,
    *,
    discount: float = 1.0,
    gae_lambda: float = 0.95,
    value_lambda: float = 0.95,
    bootstrap: Callable[[Batch], Array] = no_bootstrap,
) -> Pair:
    """Generalized advantage estimation with batch.values: `returns.gae`; the value targets may have their own lambda.

    Args:
        batch: reads values.
        discount: per action.
        gae_lambda: of the advantages.
        value_lambda: of the returns; 1.0 makes them Monte Carlo (VAPO).
        bootstrap: no_bootstrap or last_value.

    Returns:
        (advantages, returns).

    Reference: Schulman et al. 2015.
    """
    run = lambda lam: along.gae(
        _rewards(batch), batch.values, batch.mask, discount=discount, gae_lambda=lam, bootstrap=bootstrap(batch)
    )
    advantages, returns = run(gae_lambda)
    return advantages, returns if value_lambda == gae_lambda else run(value_lambda)[1]


def length_adaptive_gae(
    batch: Batch,
    *,
    alpha: float = 0.05,
    discount: float = 1.0,
    value_lambda: float = 1.0,
    bootstrap: Callable[[Batch], Array] = no_bootstrap,
) -> Pair:
    """GAE whose lambda grows with the row: `returns.length_adaptive_lambda`. Other arguments as in `gae`.

    Reference: Yue et al. 2025, "VAPO".
    """
    run = lambda lam: along.gae(
        _rewards(batch), batch.values, batch.mask, discount=discount, gae_lambda=lam, bootstrap=bootstrap(batch)
    )
    return run(along.length_adaptive_lambda(batch.mask, alpha=alpha))[0], run(value_lambda)[1]


def fixed_chunks(batch: Batch, *, tokens: int = 5) -> Array:
    """Macro actions of a fixed number of tokens: `returns.chunks_of`."""
    return along.chunks_of(batch.mask, tokens=tokens)


def turns(batch: Batch) -> Array:
    """Macro actions that are turns."""
    return batch.rollout.turn


def macro_gae(
    batch: Batch,
    *,
    chunk_fn: Callable[[Batch], Array] = fixed_chunks,
    discount: float = 1.0,
    gae_lambda: float = 0.95,
    bootstrap: Callable[[Batch], Array] = no_bootstrap,
    reward_of: Callable[..., Array] = along.chunk_sum,
) -> Pair:
    """GAE over macro actions: `returns.macro_gae`. With chunk_fn=turns it is turn-level GAE.

    Args:
        batch: reads values.
        chunk_fn: batch -> [B,L] chunk numbers: fixed_chunks or turns.
        discount: per chunk.
        gae_lambda: per chunk.
        bootstrap: no_bootstrap or last_value.
        reward_of: returns.chunk_sum or returns.chunk_mean.

    Returns:
        (advantages, returns).
    """
    return along.macro_gae(
        _rewards(batch),
        batch.values,
        batch.mask,
        chunk_fn(batch),
        discount=discount,
        gae_lambda=gae_lambda,
        bootstrap=bootstrap(batch),
        reward_of=reward_of,
    )


def turn_level(
    batch: Batch,
    *,
    discount: float = 1.0,
    baseline: groups.Statistic = groups.group_mean,
    scale: groups.Statistic = groups.group_std,
    ddof: int = 1,
    eps: float = 1e-6,
    alone: Callable[[Array, Array], Array] = groups.alone_zero,
) -> Pair:
    """Each turn's reward-to-go, relative to the same turn of the group's other rows.

    Args:
        batch: reads rollout.turn.
        discount: per turn.
        baseline: and the rest as in `groups.group_relative`, over rows of one group and turn.
        scale: same.
        ddof: same.
        eps: same.
        alone: same.

    Returns:
        (advantages, returns).
    """
    b, l = batch.mask.shape
    turn = batch.rollout.turn
    rewards, present = _by_turn(batch)
    to_go = along.reward_to_go(rewards, present, discount=discount)
    ids = (batch.rollout.group[:, None] * l + jnp.arange(l)[None, :]).reshape(-1)
    relative = groups.group_relative(
        to_go.reshape(-1), ids, present.reshape(-1), baseline=baseline, scale=scale, ddof=ddof, eps=eps, alone=alone
    ).reshape(b, l)
    return _at_turn(relative, turn, batch.mask), _at_turn(to_go, turn, batch.mask)


def step_level(batch: Batch, *, ddof: int = 1, eps: float = 1e-6) -> Pair:
    """GRPO with process rewards: step rewards standardized over all steps of the group, then summed to go.

    Steps are turns. A_t = sum over steps s >= step(t) of (r_s - mean) / (std + eps).

    Reference: Shao et al. 2024, "DeepSeekMath", section 4.1.3.
    """
    b, l = batch.mask.shape
    turn = batch.rollout.turn
    rewards, present = _by_turn(batch)
    ids = jnp.repeat(batch.rollout.group, l)
    relative = groups.group_relative(rewards.reshape(-1), ids, present.reshape(-1), ddof=ddof, eps=eps).reshape(b, l)
    to_go = along.reward_to_go(relative, present)
    return _at_turn(to_go, turn, batch.mask), _at_turn(along.reward_to_go(rewards, present), turn, batch.mask)


def _by_turn(batch: Batch) -> Pair:
    """Rewards summed by turn, and which turns hold an action: [B,L], indexed by turn."""
    acts = along.chunk_sum(batch.mask.astype(jnp.float32), batch.mask, batch.rollout.turn)
    return along.chunk_sum(_rewards(batch), batch.mask, batch.rollout.turn), acts > 0


def _at_turn(x: Array, turn: Array, mask: Array) -> Array:
    return jnp.where(mask, jnp.take_along_axis(x, turn, axis=1), 0.0)


# Targets that some losses read as advantages.


def trajectory_balance(batch: Batch, *, kl_coef: float = 1.0) -> Pair:
    """Minus the old policy's trajectory-balance residual, centred in the group (VarGrad's estimate of log Z).

    A = mean_g(d) - d,  d = sum_t(old_log_probs - reference_log_probs) - score / kl_coef: the policy that makes d
    equal everywhere samples in proportion to reference * exp(score / kl_coef). For `losses.policy.trajectory_balance`.

    Args:
        batch: reads old_log_probs, reference_log_probs.
        kl_coef: the temperature of the target.

    Returns:
        (advantages, returns).

    Reference: Malkin et al. 2022; Zhang et al. 2023 (VarGrad).
    """
    log_ratio = importance.log_ratio(batch.old_log_probs, batch.reference_log_probs, batch.mask)
    residual = reductions.row_sum(log_ratio, batch.mask) - row_scores(batch) / kl_coef
    mean = groups.group_mean(residual, batch.rollout.group, batch.rewards.scored)
    return _spread(batch, jnp.where(batch.rewards.scored, mean - residual, 0.0))


def kto(batch: Batch, *, threshold: float = 0.5, reference_role: int = 0) -> Pair:
    """What KTO needs: +1 or -1 for desirable and undesirable rows, and its reference point z0 as the return.

    z0 = max(0, mean of sum_t(old_log_probs - reference_log_probs)) over the rows of role `reference_role`, computed
    over the whole batch. The authors take it on mismatched pairs of prompt and completion: give such rows a role of
    their own, scored=False so that they stay out of the loss, and name that role here.

    Args:
        batch: reads old_log_probs, reference_log_probs, rewards.outcome.
        threshold: an outcome above it is desirable.
        reference_role: whose rows define z0; role 0 is every ordinary row.

    Returns:
        (sign [B,L], z0 [B,L]), both 0 outside the mask.

    Reference: Ethayarajh et al. 2024, "KTO".
    """
    actions = batch.rollout.action_mask
    log_ratio = importance.log_ratio(batch.old_log_probs, batch.reference_log_probs, actions)
    rows = (batch.rollout.role == reference_role) & actions.any(axis=1)
    mean = jnp.where(rows, log_ratio.sum(axis=1), 0.0).sum() / jnp.maximum(rows.sum(), 1)
    sign = jnp.where(batch.rewards.outcome > threshold, 1.0, -1.0)
    return jnp.where(batch.mask, sign[:, None], 0.0), jnp.where(batch.mask, jnp.maximum(mean, 0.0), 0.0)


# Around another advantage function.


def whiten(x: Array, mask: Array, *, ddof: int = 1, eps: float = 1e-8, centre: bool = True) -> Array:
    """(x - mean) / sqrt(var + eps) over all masked entries of the batch.

    Args:
        x: [B,L].
        mask: [B,L] bool.
        ddof: subtracted from the count under the variance.
        eps: added to the variance, not to the standard deviation.
        centre: False leaves the mean in the result.

    Returns:
        [B,L], 0 outside the mask.
    """
    x = jnp.where(mask, x, 0.0)
    n = mask.sum().astype(jnp.float32)
    mean = x.sum() / jnp.maximum(n, 1.0)
    variance = jnp.where(mask, jnp.square(x - mean), 0.0).sum() / jnp.maximum(n - ddof, 1.0)
    scaled = (x - mean) * jax.lax.rsqrt(variance + eps)
    return jnp.where(mask, scaled if centre else x * jax.lax.rsqrt(variance + eps), 0.0)


def whitened(
    batch: Batch, *, advantage_fn: AdvantageFn, ddof: int = 1, eps: float = 1e-8, centre: bool = True
) -> Pair:
    """Any advantages, whitened over the tokens of the batch: `whiten`. Returns are left alone."""
    advantages, returns = advantage_fn(batch)
    return whiten(advantages, batch.mask, ddof=ddof, eps=eps, centre=centre), returns


def without_outliers(batch: Batch, *, advantage_fn: AdvantageFn, limit: float = 3.0, ddof: int = 1) -> Pair:
    """Any advantages, whitened, with those beyond +-limit standard deviations set to 0 (StableReinforce's filter)."""
    advantages, returns = whitened(batch, advantage_fn=advantage_fn, ddof=ddof)
    return jnp.where(jnp.abs(advantages) <= limit, advantages, 0.0), returns


def kl_in_reward(
    batch: Batch,
    *,
    advantage_fn: AdvantageFn,
    kl_coef: float | Array = 0.0,
    estimator: divergences.Estimator = divergences.k1,
    limit: float = 20.0,
) -> Pair:
    """Any advantages of rewards less a KL to the reference: r_t - kl_coef * estimator(old - reference log-prob).

    Not together with a KL in the loss (`losses.regularizers.kl_penalty`).

    Args:
        batch: reads old_log_probs, reference_log_probs, unless kl_coef is the number 0.0.
        advantage_fn: what to compute from those rewards.
        kl_coef: 0.0 is off; may be traced (a controller's).
        estimator: from `divergences`.
        limit: the log-ratio is held within +-limit nats.

    Returns:
        (advantages, returns).
    """
    if isinstance(kl_coef, (int, float)) and kl_coef == 0:
        return advantage_fn(batch)
    actions = batch.rollout.action_mask
    log_ratio = importance.log_ratio(batch.old_log_probs, batch.reference_log_probs, actions)
    penalty = kl_coef * jnp.where(actions, divergences.limited(log_ratio, estimator=estimator, limit=limit), 0.0)
    rewards = batch.rewards.replace(tokens=batch.rewards.tokens - penalty)
    return advantage_fn(batch.replace(rewards=rewards))
