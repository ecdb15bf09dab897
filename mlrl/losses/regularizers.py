"""Terms that hold a policy back or keep it open: KL penalties, entropy, and masks by entropy and covariance.

A term whose coefficient is the Python number 0.0 reads nothing, so that a loop can skip computing its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mlrl import divergences, importance, reductions
from mlrl.divergences import Estimator
from mlrl.losses import policy
from mlrl.types import Array, Batch, LossFn, Metrics, Refused, Scores


def is_off(coef: float | Array) -> bool:
    """Whether a coefficient is the Python number 0; a traced one never is."""
    return isinstance(coef, (int, float)) and coef == 0


def kl_penalty(
    scores: Scores,
    batch: Batch,
    *,
    kl_coef: float | Array = 0.0,
    estimator: Estimator = divergences.k3,
    limit: float = 20.0,
) -> tuple[Array, Metrics]:
    """KL to the frozen reference in the loss: kl_coef * sum(weights * estimator(log_probs - reference_log_probs)).

    Not together with a KL in the reward (`advantages.kl_in_reward`). k1 here has no gradient in expectation.

    Args:
        scores: of the current policy.
        batch: reads reference_log_probs, mask, weights.
        kl_coef: 0.0 is off; may be traced (a controller's).
        estimator: from `divergences`.
        limit: the log-ratio is held within +-limit nats, without gradient beyond.

    Returns:
        (loss, {"loss/kl", "kl/reference": the raw token mean of k1, neither limited nor scaled}).

    Reference: Shao et al. 2024, "DeepSeekMath".
    """
    if is_off(kl_coef):
        return jnp.zeros((), jnp.float32), {}
    log_ratio = importance.log_ratio(scores.log_probs, batch.reference_log_probs, batch.mask)
    per_token = divergences.limited(log_ratio, estimator=estimator, limit=limit)
    loss = kl_coef * jnp.sum(batch.weights * per_token)
    raw = jnp.sum(batch.token_weights * jax.lax.stop_gradient(log_ratio))
    return loss, {"loss/kl": jax.lax.stop_gradient(loss), "kl/reference": raw}


def kl_by_turn(
    scores: Scores,
    batch: Batch,
    *,
    kl_coefs: Sequence[float] = (0.0,),
    estimator: Estimator = divergences.k2,
    limit: float = 20.0,
) -> tuple[Array, Metrics]:
    """`kl_penalty` with a coefficient for each turn: sum(kl_coefs[turn] * weights * estimator(log-ratio)).

    SCoRe's stage I holds the first attempt at the initial model by a large kl_coefs[0]. With
    `reductions.sequence_mean_token_sum` it is the KL of an attempt, summed over its tokens. For rows that the policy
    has just sampled k2 has the gradient of each token's KL(policy || reference), given the tokens before it; what a
    token does to the KL of later ones is left out (`mlrl.divergences`).

    Args:
        scores: of the current policy.
        batch: reads reference_log_probs, rollout.turn, mask, weights.
        kl_coefs: of the first turns; the last one is that of all further. All 0.0 is off.
        estimator: from `divergences`.
        limit: as in `kl_penalty`.

    Returns:
        (loss, {"loss/kl", "kl/reference", "kl/turn_0" to "kl/turn_<n>", one for each coefficient: the turns'
        shares of the token mean}).

    Raises:
        Refused: without coefficients.

    Reference: Kumar et al. 2024, "Training Language Models to Self-Correct via Reinforcement Learning".
    """
    if not kl_coefs:
        raise Refused("regularizers.kl_by_turn.kl_coefs is empty: give a coefficient for each turn, as (1.0, 0.1)")
    if all(is_off(coef) for coef in kl_coefs):
        return jnp.zeros((), jnp.float32), {}
    log_ratio = importance.log_ratio(scores.log_probs, batch.reference_log_probs, batch.mask)
    per_token = divergences.limited(log_ratio, estimator=estimator, limit=limit)
    turn = jnp.minimum(batch.rollout.turn, len(kl_coefs) - 1)
    loss = jnp.sum(jnp.asarray(kl_coefs, jnp.float32)[turn] * batch.weights * per_token)
    raw = batch.token_weights * jax.lax.stop_gradient(log_ratio)
    of_turns = {f"kl/turn_{k}": jnp.sum(jnp.where(turn == k, raw, 0.0)) for k in range(len(kl_coefs))}
    return loss, {"loss/kl": jax.lax.stop_gradient(loss), "kl/reference": jnp.sum(raw), **of_turns}


def entropy_bonus(scores: Scores, batch: Batch, *, entropy_coef: float | Array = 0.0) -> tuple[Array, Metrics]:
    """Rewards entropy: -entropy_coef * sum(weights * entropy).

    Args:
        scores: reads entropy.
        batch: reads mask, weights.
        entropy_coef: 0.0 is off; may be traced (a controller's).

    Returns:
        (loss, {"loss/entropy", "entropy": token mean in nats}).
    """
    if is_off(entropy_coef):
        return jnp.zeros((), jnp.float32), {}
    entropy = jnp.where(batch.mask, scores.entropy, 0.0)
    loss = -entropy_coef * jnp.sum(batch.weights * entropy)
    mean = jnp.sum(batch.token_weights * jax.lax.stop_gradient(entropy))
    return loss, {"loss/entropy": jax.lax.stop_gradient(loss), "entropy": mean}


def top_share(x: Array, mask: Array, *, share: float) -> Array:
    """True for the ceil(share * n) highest of each row's n masked tokens: [B,L], [B,L] -> [B,L]. Earlier wins ties."""
    order = jnp.argsort(jnp.where(mask, -x, jnp.inf), axis=1, stable=True)
    place = jnp.argsort(order, axis=1, stable=True)
    return mask & (place < jnp.ceil(share * mask.sum(axis=1, keepdims=True) - 1e-6))


def high_entropy_only(
    scores: Scores, batch: Batch, *, loss_fn: LossFn = policy.ppo_clip, share: float = 0.2
) -> tuple[Array, Metrics]:
    """Any token loss on the tokens where the policy hesitated: the top `share` of each row by entropy.

    The denominator stays that of all tokens, as in TRL. The paper's quantile is over the minibatch; ours is over each
    row, so that micro-batches and shards only add up.

    Args:
        scores: reads entropy, without gradient.
        batch: reads mask, weights.
        loss_fn: the loss to mask.
        share: in (0, 1].

    Returns:
        loss_fn's.

    Reference: Wang et al. 2025, "Beyond the 80/20 Rule".
    """
    chosen = top_share(jax.lax.stop_gradient(scores.entropy), batch.mask, share=share)
    return loss_fn(scores, batch.replace(weights=jnp.where(chosen, batch.weights, 0.0)))


def covariance(log_probs: Array, advantages: Array, mask: Array) -> Array:
    """How far a token's likelihood and its advantage go together: (log p - mean of the row) * A, without gradient.

    The entropy of a softmax policy falls by this covariance. The papers centre both factors over the batch; group
    advantages are centred already, and the row's mean keeps the term a function of its own row.

    Args:
        log_probs: [B,L].
        advantages: [B,L].
        mask: [B,L] bool.

    Returns:
        [B,L], 0 outside the mask.
    """
    log_probs = jax.lax.stop_gradient(jnp.where(mask, log_probs, 0.0))
    centred = log_probs - reductions.row_mean(log_probs, mask)[:, None]
    return jnp.where(mask, centred * jnp.where(mask, advantages, 0.0), 0.0)


def clip_cov(
    scores: Scores, batch: Batch, *, loss_fn: LossFn = policy.ppo_clip, low: float = 1.0, high: float = 5.0
) -> tuple[Array, Metrics]:
    """Any token loss without the tokens whose covariance lies in [low, high]; they would collapse entropy.

    Args:
        scores: of the current policy.
        batch: reads advantages, mask, weights.
        loss_fn: the loss to mask.
        low: bounds of the covariance, in nats.
        high: same.

    Returns:
        loss_fn's, and "covariance/dropped_share".

    Reference: Cui et al. 2025, "The Entropy Mechanism". Left out: the random draw of a share among those tokens,
    and centring over the batch (see `covariance`).
    """
    cov = covariance(scores.log_probs, batch.advantages, batch.mask)
    drop = batch.mask & (cov >= low) & (cov <= high)
    loss, metrics = loss_fn(scores, batch.replace(weights=jnp.where(drop, 0.0, batch.weights)))
    return loss, metrics | {"covariance/dropped_share": jnp.sum(jnp.where(drop, batch.token_weights, 0.0))}


def kl_cov(scores: Scores, batch: Batch, *, kl_coef: float | Array = 0.0, low: float = 1.0) -> tuple[Array, Metrics]:
    """KL to the old policy on the tokens of highest covariance: kl_coef * sum over cov >= low of weights * |log_ratio|.

    Args:
        scores: of the current policy.
        batch: reads old_log_probs, advantages, mask, weights.
        kl_coef: 0.0 is off; the paper takes 1.
        low: covariance from which a token is held back, in nats; the paper takes a top share of 2e-4 to 2e-3.

    Returns:
        (loss, {"loss/kl_cov", "covariance/held_share"}).

    Reference: Cui et al. 2025, "The Entropy Mechanism". The threshold stands for the share, which no micro-batch knows.
    """
    if is_off(kl_coef):
        return jnp.zeros((), jnp.float32), {}
    cov = covariance(scores.log_probs, batch.advantages, batch.mask)
    held = batch.mask & (cov >= low)
    log_ratio = importance.log_ratio(scores.log_probs, batch.old_log_probs, batch.mask)
    loss = kl_coef * jnp.sum(jnp.where(held, batch.weights, 0.0) * divergences.absolute(log_ratio))
    share = jnp.sum(jnp.where(held, batch.token_weights, 0.0))
    return loss, {"loss/kl_cov": jax.lax.stop_gradient(loss), "covariance/held_share": share}
