"""Estimates of KL divergence from single samples, and how each behaves under differentiation.

All take `log_ratio` = log_probs - reference_log_probs of tokens sampled by the policy, elementwise, and return a
non-averaged estimate of KL(policy || reference) of the same shape. Which one a run logs or trains on is always the
caller's choice; the two columns differ:

    estimator          value                                gradient, as a loss on the policy's own samples
    k1                 unbiased, can be negative            zero in expectation: use it in rewards
    k2                 biased, non-negative                 the unbiased gradient of the KL
    k3                 unbiased, non-negative               biased (that of the forward KL, at small distances alike)
    absolute           biased, non-negative                 sign only
    k3_with_k2_grad    k3                                   k2

Reference: Schulman 2020, "Approximating KL Divergence".
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mlrl.types import Array

Estimator = Callable[[Array], Array]  # log_ratio [...] -> [...]


def k1(log_ratio: Array) -> Array:
    """k1 = log_ratio."""
    return log_ratio


def k2(log_ratio: Array) -> Array:
    """k2 = log_ratio^2 / 2."""
    return 0.5 * jnp.square(log_ratio)


def k3(log_ratio: Array) -> Array:
    """k3 = exp(-log_ratio) - 1 + log_ratio."""
    return jnp.expm1(-log_ratio) + log_ratio


def absolute(log_ratio: Array) -> Array:
    """|log_ratio|, what TRL and verl call "abs". Its gradient at 0 is 0."""
    return jnp.abs(log_ratio)


def k3_with_k2_grad(log_ratio: Array) -> Array:
    """The value of k3 with the gradient of k2, by a straight-through difference (verl's "k3+")."""
    return k2(log_ratio) + jax.lax.stop_gradient(k3(log_ratio) - k2(log_ratio))


def limited(log_ratio: Array, *, estimator: Estimator = k3, limit: float = 20.0) -> Array:
    """Applies an estimator to a log-ratio held within +-limit; beyond it no factor has a gradient.

    The clamp acts before the exponential, so k3 cannot overflow; and because the clamped log-ratio is a constant, no
    factor of the estimate leaks a gradient past it.

    Args:
        log_ratio: [...] in nats.
        estimator: what to apply.
        limit: in nats.

    Returns:
        [...] the estimate at the clamped log-ratio.
    """
    outside = jax.lax.stop_gradient(jnp.clip(log_ratio, -limit, limit))
    return estimator(jnp.where(jnp.abs(log_ratio) <= limit, log_ratio, outside))
