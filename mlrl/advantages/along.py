"""Advantages along a row: rewards-to-go and GAE over tokens, macro actions, turns and steps."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from mlrl import groups
from mlrl import returns as along
from mlrl.advantages.rows import Pair, reward_tokens, whiten
from mlrl.advantages.terminations import Termination, fixed_chunks
from mlrl.types import Array, Batch


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
    """Reward-to-go, without any baseline: `returns.reward_to_go`.

    Args:
        batch: reads rewards, mask.
        discount: per action.

    Reference: Williams 1992, "Simple Statistical Gradient-Following Algorithms" (REINFORCE).
    """
    to_go = along.reward_to_go(reward_tokens(batch), batch.mask, discount=discount)
    return to_go, to_go


def reinforce_pp(batch: Batch, *, discount: float = 1.0) -> Pair:
    """REINFORCE++: reward-to-go, whitened over the tokens of the batch.

    Args:
        batch: reads rewards, mask.
        discount: per action.

    Reference: Hu 2025, "REINFORCE++". Its KL goes into the reward: `kl_in_reward`.
    """
    to_go = along.reward_to_go(reward_tokens(batch), batch.mask, discount=discount)
    return whiten(to_go, batch.mask), to_go


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
        reward_tokens(batch), batch.values, batch.mask, discount=discount, gae_lambda=lam, bootstrap=bootstrap(batch)
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
        reward_tokens(batch), batch.values, batch.mask, discount=discount, gae_lambda=lam, bootstrap=bootstrap(batch)
    )
    return run(along.length_adaptive_lambda(batch.mask, alpha=alpha))[0], run(value_lambda)[1]


def macro_gae(
    batch: Batch,
    *,
    termination: Termination = fixed_chunks,
    discount: float = 1.0,
    gae_lambda: float = 0.95,
    bootstrap: Callable[[Batch], Array] = no_bootstrap,
    reward_of: Callable[..., Array] = along.chunk_sum,
    value_of: Callable[..., Array] = along.chunk_mean,
) -> Pair:
    """GAE over macro actions: `returns.macro_gae`. With termination=turns it is turn-level GAE.

    Args:
        batch: reads values.
        termination: batch -> [B,L] chunk numbers: one of `advantages.terminations`.
        discount: per chunk.
        gae_lambda: per chunk.
        bootstrap: no_bootstrap or last_value.
        reward_of: returns.chunk_sum or returns.chunk_mean.
        value_of: returns.chunk_mean, returns.chunk_first or returns.chunk_last.

    Returns:
        (advantages, returns).

    Reference: Chai et al. 2024, "MA-RLHF".
    """
    return along.macro_gae(
        reward_tokens(batch),
        batch.values,
        batch.mask,
        termination(batch),
        discount=discount,
        gae_lambda=gae_lambda,
        bootstrap=bootstrap(batch),
        reward_of=reward_of,
        value_of=value_of,
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

        A_k = (G_k - baseline) / (scale + eps),   G_k = sum over turns s >= k of discount^(s - k) r_s

    Every action of turn k gets A_k.

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
    rewards, present = by_turn(batch)
    to_go = along.reward_to_go(rewards, present, discount=discount)
    ids = (batch.rollout.group[:, None] * l + jnp.arange(l)[None, :]).reshape(-1)
    relative = groups.group_relative(
        to_go.reshape(-1), ids, present.reshape(-1), baseline=baseline, scale=scale, ddof=ddof, eps=eps, alone=alone
    ).reshape(b, l)
    return at_turn(relative, turn, batch.mask), at_turn(to_go, turn, batch.mask)


def step_level(batch: Batch, *, ddof: int = 1, eps: float = 1e-6) -> Pair:
    """GRPO with process rewards: step rewards standardized over all steps of the group, then summed to go.

    Steps are turns. A_t = sum over steps s >= step(t) of (r_s - mean) / (std + eps).

    Reference: Shao et al. 2024, "DeepSeekMath", section 4.1.3.
    """
    b, l = batch.mask.shape
    turn = batch.rollout.turn
    rewards, present = by_turn(batch)
    ids = jnp.repeat(batch.rollout.group, l)
    relative = groups.group_relative(rewards.reshape(-1), ids, present.reshape(-1), ddof=ddof, eps=eps).reshape(b, l)
    to_go = along.reward_to_go(relative, present)
    return at_turn(to_go, turn, batch.mask), at_turn(along.reward_to_go(rewards, present), turn, batch.mask)


def by_turn(batch: Batch) -> Pair:
    """Rewards summed by turn, and which turns hold an action: [B,L], indexed by turn."""
    acts = along.chunk_sum(batch.mask.astype(jnp.float32), batch.mask, batch.rollout.turn)
    return along.chunk_sum(reward_tokens(batch), batch.mask, batch.rollout.turn), acts > 0


def at_turn(x: Array, turn: Array, mask: Array) -> Array:
    """What stands at its turn in x, for every token of the mask: [B,L], [B,L], [B,L] -> [B,L]."""
    return jnp.where(mask, jnp.take_along_axis(x, turn, axis=1), 0.0)
