"""Policy losses in the form a loop sums: (scores, batch, *, knobs) -> (scalar, metrics).

Each picks a log-ratio and an equation of `losses.surrogates`, and adds up with batch.weights. Metrics are means over
the minibatch's tokens, as plain sums with batch.token_weights:
    loss/<name>           what was added to the loss
    ratio/mean            mean of exp(log_ratio) as the loss sees it
    ratio/clipped_share   share of tokens that the equation clipped
    kl/old                k3 estimate of KL(old || current): mean of exp(log_ratio) - 1 - log_ratio, per token
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mlrl import divergences, importance, reductions
from mlrl.losses import surrogates
from mlrl.types import Array, Batch, Metrics, Scores


def _log_ratio(scores: Scores, batch: Batch) -> Array:
    log_ratio = _raw_log_ratio(scores, batch)  # an infinite ratio would turn the gradient of its neighbours into NaN
    return jnp.clip(log_ratio, -importance.MAX_LOG, importance.MAX_LOG)


def _raw_log_ratio(scores: Scores, batch: Batch) -> Array:
    return importance.log_ratio(scores.log_probs, batch.old_log_probs, batch.mask)


def _advantages(batch: Batch) -> Array:
    return jax.lax.stop_gradient(jnp.where(batch.mask, batch.advantages, 0.0))


def _add_up(name: str, result: tuple[Array, Array], token_log_ratio: Array, log_ratio: Array, batch: Batch):
    per_token, clipped = result
    loss = jnp.sum(batch.weights * jnp.where(batch.mask, per_token, 0.0))
    stopped = jax.lax.stop_gradient
    mean = lambda x: jnp.sum(batch.token_weights * jnp.where(batch.mask, x, 0.0))
    metrics = {
        f"loss/{name}": stopped(loss),
        "ratio/mean": mean(jnp.exp(stopped(log_ratio))),
        "ratio/clipped_share": mean(clipped.astype(jnp.float32)),
        "kl/old": mean(divergences.k3(-stopped(token_log_ratio))),
    }
    return loss, metrics


def ppo_clip(
    scores: Scores, batch: Batch, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> tuple[Array, Metrics]:
    """PPO's clipped surrogate on token ratios: `surrogates.clipped_surrogate`.

    Args:
        scores: of the current policy.
        batch: reads old_log_probs, advantages, mask, weights.
        clip_low: how far below 1 the ratio may fall.
        clip_high: how far above 1 it may rise; 0.28 in DAPO.

    Returns:
        (loss, metrics), both sums over rows.

    Reference: Schulman et al. 2017; Yu et al. 2025, "DAPO".
    """
    lr = _log_ratio(scores, batch)
    result = surrogates.clipped_surrogate(lr, _advantages(batch), clip_low=clip_low, clip_high=clip_high)
    return _add_up("policy", result, lr, lr, batch)


def dual_clip(
    scores: Scores, batch: Batch, *, clip_low: float = 0.2, clip_high: float = 0.2, clip_dual: float = 3.0
) -> tuple[Array, Metrics]:
    """PPO with a bounded loss on bad tokens: `surrogates.dual_clipped_surrogate`. Arguments as there."""
    lr = _log_ratio(scores, batch)
    result = surrogates.dual_clipped_surrogate(
        lr, _advantages(batch), clip_low=clip_low, clip_high=clip_high, clip_dual=clip_dual
    )
    return _add_up("policy", result, lr, lr, batch)


def gspo(
    scores: Scores, batch: Batch, *, clip_low: float = 3e-4, clip_high: float = 4e-4
) -> tuple[Array, Metrics]:
    """PPO's surrogate on one ratio per row, s = exp(mean of token log-ratios). Reduce by sequence_mean_token_mean.

    Args:
        scores: of the current policy.
        batch: reads old_log_probs, advantages, mask, weights.
        clip_low: below 1, for the length-normalized ratio.
        clip_high: above 1.

    Returns:
        (loss, metrics).

    Reference: Zheng et al. 2025, "Group Sequence Policy Optimization".
    """
    lr = _log_ratio(scores, batch)
    row = importance.sequence_mean(lr, batch.mask)
    result = surrogates.clipped_surrogate(row, _advantages(batch), clip_low=clip_low, clip_high=clip_high)
    return _add_up("policy", result, lr, row, batch)


def gspo_token(
    scores: Scores, batch: Batch, *, clip_low: float = 3e-4, clip_high: float = 4e-4
) -> tuple[Array, Metrics]:
    """GSPO's token form: the row's ratio in value, each token's own gradient: s_t = sg(s) p_t / sg(p_t).

    Equals `gspo` in value and gradient when a row's advantages are equal; otherwise each token has its own.
    Arguments and reference as in `gspo`.
    """
    lr = _log_ratio(scores, batch)
    row = jax.lax.stop_gradient(importance.sequence_mean(lr, batch.mask))
    token = lr - jax.lax.stop_gradient(lr) + row
    result = surrogates.clipped_surrogate(token, _advantages(batch), clip_low=clip_low, clip_high=clip_high)
    return _add_up("policy", result, lr, row, batch)


def cispo(
    scores: Scores, batch: Batch, *, clip_low: float = 1.0, clip_high: float = 0.2
) -> tuple[Array, Metrics]:
    """CISPO: REINFORCE with a clipped, constant importance weight: `surrogates.clipped_weight`. Arguments as there.

    MiniMax-M1 does not say its clip_high; 0.2 is verl's example.
    """
    lr = _log_ratio(scores, batch)
    log_probs = jnp.where(batch.mask, scores.log_probs, 0.0)
    result = surrogates.clipped_weight(log_probs, lr, _advantages(batch), clip_low=clip_low, clip_high=clip_high)
    return _add_up("policy", result, lr, lr, batch)


def reinforce(scores: Scores, batch: Batch) -> tuple[Array, Metrics]:
    """REINFORCE: -A log p, on-policy, no ratio; reads no old log-probs.

    GPG is this with `advantages.grpo(scale=no_scale)` on rows that `selection.with_spread` keeps: the shrunken
    denominator is the paper's alpha, which counts rows, where lengths do not depend on the group.

    Args:
        scores: of the current policy.
        batch: reads advantages, mask, weights.

    Returns:
        (loss, {"loss/policy"}).

    Reference: Williams 1992; Chu et al. 2025, "GPG".
    """
    log_probs = jnp.where(batch.mask, scores.log_probs, 0.0)
    loss = jnp.sum(batch.weights * surrogates.score_function(log_probs, _advantages(batch)))
    return loss, {"loss/policy": jax.lax.stop_gradient(loss)}


def sapo(
    scores: Scores, batch: Batch, *, temperature_positive: float = 1.0, temperature_negative: float = 1.05
) -> tuple[Array, Metrics]:
    """SAPO's soft gate instead of a clip: `surrogates.soft_gate`. Arguments as there.

    Reduce by `reductions.sequence_mean_token_mean`.
    """
    lr = _log_ratio(scores, batch)
    result = surrogates.soft_gate(
        lr,
        _advantages(batch),
        temperature_positive=temperature_positive,
        temperature_negative=temperature_negative,
    )
    return _add_up("policy", result, lr, lr, batch)


def vespo(
    scores: Scores,
    batch: Batch,
    *,
    power_positive: float = 2.0,
    decay_positive: float = 3.0,
    power_negative: float = 3.0,
    decay_negative: float = 2.0,
) -> tuple[Array, Metrics]:
    """VESPO: REINFORCE with one constant weight per row, a gamma kernel of its ratio: `surrogates.gamma_weight`.

    Arguments as there. A row's log-ratio is held within ln(1e-8) and 20.
    """
    lr = _log_ratio(scores, batch)
    row = jnp.clip(importance.sequence_sum(lr, batch.mask), math.log(1e-8), importance.MAX_LOG)
    result = surrogates.gamma_weight(
        jnp.where(batch.mask, scores.log_probs, 0.0),
        row,
        _advantages(batch),
        power_positive=power_positive,
        decay_positive=decay_positive,
        power_negative=power_negative,
        decay_negative=decay_negative,
    )
    return _add_up("policy", result, lr, row, batch)


def stable_reinforce(
    scores: Scores, batch: Batch, *, clip_low: float = 0.2, clip_high: float = 0.2, max_ratio: float = 1e3
) -> tuple[Array, Metrics]:
    """PPO on a log-ratio held within +-ln(max_ratio) *before* the exponential; beyond it there is no gradient.

    Args:
        scores: of the current policy.
        batch: reads old_log_probs, advantages, mask, weights.
        clip_low: as in PPO.
        clip_high: as in PPO.
        max_ratio: and 1 / max_ratio, the bounds of the pre-clip.

    Returns:
        (loss, metrics).

    Reference: Zhang et al. 2025, "R1-Reward". Its advantage filter is `advantages.without_outliers`.
    """
    limit = math.log(max_ratio)
    held = jnp.clip(_raw_log_ratio(scores, batch), -limit, limit)
    result = surrogates.clipped_surrogate(held, _advantages(batch), clip_low=clip_low, clip_high=clip_high)
    return _add_up("policy", result, held, held, batch)


def nft(
    scores: Scores,
    batch: Batch,
    *,
    negative_weight: float = 1.0,
    floor: float = 1.0,
    weight_of: Callable[[Array], Array] = surrogates.wrong_share,
    pass_rate_margin: float = 0.02,
) -> tuple[Array, Metrics]:
    """Negative-aware fine-tuning: `surrogates.implicit_negative`, arguments as there.

    Needs advantages R - q of a 0/1 reward: `advantages.grpo` with baseline=group_mean, scale=no_scale, eps=0.0.
    """
    lr = _log_ratio(scores, batch)
    result = surrogates.implicit_negative(
        lr,
        _advantages(batch),
        negative_weight=negative_weight,
        floor=floor,
        weight_of=weight_of,
        pass_rate_margin=pass_rate_margin,
    )
    return _add_up("policy", result, lr, lr, batch)


def dppo_tv(scores: Scores, batch: Batch, *, limit: float = 0.2, cap: float = 3.0) -> tuple[Array, Metrics]:
    """Divergence-gated policy gradient: `surrogates.total_variation_gate`, arguments as there."""
    lr = _log_ratio(scores, batch)
    log_probs = jnp.where(batch.mask, scores.log_probs, 0.0)
    old = jnp.where(batch.mask, batch.old_log_probs, 0.0)
    result = surrogates.total_variation_gate(log_probs, old, _advantages(batch), limit=limit, cap=cap)
    return _add_up("policy", result, lr, lr, batch)


def trajectory_balance(scores: Scores, batch: Batch) -> tuple[Array, Metrics]:
    """GFlowNet's squared residual per row: (sum_t log_ratio - A)^2 / 2, A from `advantages.trajectory_balance`.

    That A is minus the residual of the old policy, so the sum is the current residual log Z + log p - log target with
    log Z estimated by the group (VarGrad) before the update. On-policy the gradient is REINFORCE's with advantage A.
    A row weighs the sum of its tokens' weights: reduce by sequence_mean_token_mean.

    Args:
        scores: of the current policy.
        batch: reads old_log_probs, advantages, mask, weights.

    Returns:
        (loss, {"loss/policy"}).

    Reference: Malkin et al. 2022, "Trajectory Balance"; Richter et al. 2020 (VarGrad), used so by Zhang et al. 2023;
    Bartoldson et al. 2025, "Trajectory Balance with Asynchrony" (arXiv 2503.18929). Left out: a learned log Z and
    the backward policy, which is 1 for text written left to right.
    """
    moved = reductions.row_sum(_raw_log_ratio(scores, batch), batch.mask)
    residual = moved - reductions.row_mean(_advantages(batch), batch.mask)
    loss = jnp.sum(batch.weights.sum(axis=1) * 0.5 * jnp.square(residual))
    return loss, {"loss/policy": jax.lax.stop_gradient(loss)}
