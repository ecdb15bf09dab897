"""Off-policy corrections: any token loss, weighted from the policy that sampled to the one that is improved."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mlrl import importance
from mlrl.losses import policy
from mlrl.types import Array, Batch, LossFn, Metrics, Scores


def corrected(
    scores: Scores,
    batch: Batch,
    *,
    loss_fn: LossFn = policy.ppo_clip,
    weight_fn: Callable[[Array, Array], Array] = importance.weights,
) -> tuple[Array, Metrics]:
    """Any token loss with importance weights from the sampler to the old policy (off-policy correction).

    Multiplies batch.weights by weight_fn(old_log_probs - behavior_log_probs, mask). The denominator stays that of the
    reduction, so a rejected token still counts in it.

    Args:
        scores: of the current policy.
        batch: reads also rollout.behavior_log_probs.
        loss_fn: the loss to weigh.
        weight_fn: (log_ratio, mask) -> [B,L]; `importance.weights` with its knobs set.

    Returns:
        loss_fn's, and "importance/mean", the mean weight.
    """
    lr = importance.log_ratio(batch.old_log_probs, batch.rollout.behavior_log_probs, batch.mask)
    w = jax.lax.stop_gradient(weight_fn(lr, batch.mask))
    loss, metrics = loss_fn(scores, batch.replace(weights=batch.weights * w))
    return loss, metrics | {"importance/mean": jnp.sum(batch.token_weights * w)}


def decoupled_ppo(
    scores: Scores, batch: Batch, *, clip_low: float = 0.2, clip_high: float = 0.2, max_weight: float = 5.0
) -> tuple[Array, Metrics]:
    """PPO around a proximal policy (old_log_probs), weighted from the policy that sampled (behavior_log_probs).

    loss = -min(p_old / p_behavior, max_weight) * min(r A, clip(r) A), r = p / p_old; the first factor is constant.

    Args:
        scores: of the current policy.
        batch: reads old_log_probs (recomputed by the proximal policy), rollout.behavior_log_probs, advantages.
        clip_low: as in PPO.
        clip_high: as in PPO.
        max_weight: truncation of the behavior weight.

    Returns:
        (loss, metrics).

    Reference: Hilton et al. 2021, "Batch size-invariance for policy optimization"; Fu et al. 2025, "AReaL".
    """
    return corrected(
        scores,
        batch,
        loss_fn=lambda s, b: policy.ppo_clip(s, b, clip_low=clip_low, clip_high=clip_high),
        weight_fn=lambda lr, mask: importance.weights(lr, mask, high=max_weight),
    )
