"""Importance weights between two policies on the same tokens, bounded, and what to reject.

`log_ratio` is always log p_new - log p_old of the token taken: a log is never called a ratio. Sums of logs are taken
first and the exponential once. Weights are constants: no gradient flows through them.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mlrl import reductions
from mlrl.types import Array

MAX_LOG = 20.0  # nats; beyond it a weight is astronomically out of any bound, and exp would overflow


def log_ratio(log_probs: Array, other_log_probs: Array, mask: Array) -> Array:
    """log_probs - other_log_probs inside the mask, 0 outside, where NaN and inf reach neither value nor gradient.

    Args:
        log_probs: [B,L] numerator.
        other_log_probs: [B,L] denominator.
        mask: [B,L] bool.

    Returns:
        [B,L] in nats.
    """
    return jnp.where(mask, log_probs, 0.0) - jnp.where(mask, other_log_probs, 0.0)


def sequence_sum(log_ratio: Array, mask: Array) -> Array:
    """Log-ratio of whole rows at every token: the sum over the row (product-TIS): [B,L] -> [B,L]."""
    return jnp.where(mask, reductions.row_sum(log_ratio, mask)[:, None], 0.0)


def sequence_mean(log_ratio: Array, mask: Array) -> Array:
    """Length-normalized log-ratio of whole rows at every token (GSPO, geometric weights): [B,L] -> [B,L]."""
    return jnp.where(mask, reductions.row_mean(log_ratio, mask)[:, None], 0.0)


def per_token(log_ratio: Array, mask: Array) -> Array:
    """The log-ratio of each token by itself: [B,L] -> [B,L]."""
    return jnp.where(mask, log_ratio, 0.0)


def truncate(weights: Array, *, low: float, high: float) -> Array:
    """Holds weights within [low, high] (truncated importance sampling)."""
    return jnp.clip(weights, low, high)


def zero_outside(weights: Array, *, low: float, high: float) -> Array:
    """Sets weights outside [low, high] to 0 (masked importance sampling)."""
    return jnp.where((weights >= low) & (weights <= high), weights, 0.0)


def weights(
    log_ratio: Array,
    mask: Array,
    *,
    level: Callable[[Array, Array], Array] = per_token,
    bound: Callable[..., Array] = truncate,
    low: float = 0.0,
    high: float = 2.0,
) -> Array:
    """Importance weights w = bound(exp(level(log_ratio))), constants under differentiation.

    Args:
        log_ratio: [B,L] target policy minus sampling policy, in nats.
        mask: [B,L] bool.
        level: per_token, sequence_sum (product) or sequence_mean (geometric).
        bound: truncate or zero_outside.
        low: lower bound of a weight.
        high: upper bound of a weight.

    Returns:
        [B,L] float32, 0 outside the mask.

    Reference: Yao et al. 2025 (truncated importance sampling between sampler and trainer).
    """
    logs = jnp.clip(level(jnp.where(mask, log_ratio, 0.0), mask), -MAX_LOG, MAX_LOG)
    return jax.lax.stop_gradient(jnp.where(mask, bound(jnp.exp(logs), low=low, high=high), 0.0))


def within(log_ratio: Array, mask: Array, *, estimator: Callable[[Array], Array], limit: float) -> Array:
    """Keeps rows whose mean |estimate| of divergence is at most `limit`, for rejection sampling.

    Args:
        log_ratio: [B,L] in nats.
        mask: [B,L] bool.
        estimator: divergences.k1, k2 or k3, or any elementwise function of the log-ratio.
        limit: in nats.

    Returns:
        [B] bool. A row without actions is kept.
    """
    estimates = estimator(jnp.clip(jnp.where(mask, log_ratio, 0.0), -MAX_LOG, MAX_LOG))
    return jnp.abs(reductions.row_mean(estimates, mask)) <= limit


def effective_sample_size(weights: Array, mask: Array) -> Array:
    """Share of the sample that the weights leave in effect: (sum w)^2 / (n sum w^2), in (0, 1].

    Args:
        weights: importance weights of any shape.
        mask: same shape, bool.

    Returns:
        scalar; 0 if nothing is masked in.
    """
    w = jnp.where(mask, weights, 0.0)
    return jnp.square(w.sum()) / jnp.maximum(mask.sum() * jnp.square(w).sum(), 1e-30)
