"""Targets that some losses read as advantages: each goes with the loss of the same name."""

from __future__ import annotations

import jax.numpy as jnp

from mlrl import groups, importance, reductions
from mlrl.advantages.rows import Pair, row_scores, spread
from mlrl.types import Batch


def trajectory_balance(batch: Batch, *, kl_coef: float = 1.0) -> Pair:
    """Minus the old policy's trajectory-balance residual, centred in the group (VarGrad's estimate of log Z).

    A = mean_g(d) - d,  d = sum_t(old_log_probs - reference_log_probs) - score / kl_coef: the policy that makes d
    equal everywhere samples in proportion to reference * exp(score / kl_coef). For `losses.policy.trajectory_balance`.

    Args:
        batch: reads old_log_probs, reference_log_probs.
        kl_coef: the temperature of the target.

    Returns:
        (advantages, returns).

    Reference: Malkin et al. 2022; Richter et al. 2020 (VarGrad); Zhang et al. 2023.
    """
    log_ratio = importance.log_ratio(batch.old_log_probs, batch.reference_log_probs, batch.mask)
    residual = reductions.row_sum(log_ratio, batch.mask) - row_scores(batch) / kl_coef
    mean = groups.group_mean(residual, batch.rollout.group, batch.rewards.scored)
    return spread(batch, jnp.where(batch.rewards.scored, mean - residual, 0.0))


def kto(batch: Batch, *, threshold: float = 0.5, reference_role: int = 0) -> Pair:
    """What KTO needs: +1 or -1 for desirable and undesirable rows, and its reference point z0 as the return.

    z0 = max(0, mean of sum_t(old_log_probs - reference_log_probs)) over the rows of role `reference_role`, computed
    over the whole batch. The authors take it on mismatched pairs of prompt and completion: give such rows a role of
    their own, scored=False so that they stay out of the loss, and name that role here. No task of mlrl makes such rows
    yet; the default takes the rows that are learned from.

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
