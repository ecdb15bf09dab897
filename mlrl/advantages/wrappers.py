"""Advantage functions around another one: whitened, without outliers, with a KL in the reward."""

from __future__ import annotations

import jax.numpy as jnp

from mlrl import divergences, importance
from mlrl.advantages.rows import Pair, whiten
from mlrl.types import AdvantageFn, Array, Batch


def whitened(
    batch: Batch, *, advantage_fn: AdvantageFn, ddof: int = 1, eps: float = 1e-8, centre: bool = True
) -> Pair:
    """Any advantages, whitened over the tokens of the batch: `whiten`. Returns are left alone."""
    advantages, returns = advantage_fn(batch)
    return whiten(advantages, batch.mask, ddof=ddof, eps=eps, centre=centre), returns


def without_outliers(batch: Batch, *, advantage_fn: AdvantageFn, limit: float = 3.0, ddof: int = 1) -> Pair:
    """Any advantages, whitened, with those beyond +-limit standard deviations set to 0 (StableReinforce's filter).

    Reference: Zhang et al. 2025, "R1-Reward".
    """
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

    Reference: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", with k1.
    """
    if isinstance(kl_coef, (int, float)) and kl_coef == 0:
        return advantage_fn(batch)
    actions = batch.rollout.action_mask
    log_ratio = importance.log_ratio(batch.old_log_probs, batch.reference_log_probs, actions)
    penalty = kl_coef * jnp.where(actions, divergences.limited(log_ratio, estimator=estimator, limit=limit), 0.0)
    rewards = batch.rewards.replace(tokens=batch.rewards.tokens - penalty)
    return advantage_fn(batch.replace(rewards=rewards))
