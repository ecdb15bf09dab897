"""Estimates of KL divergence from single samples, how each differentiates, and coefficients that adapt to them.

All take `log_ratio` = log_probs - reference_log_probs of tokens sampled by the policy, elementwise, and return a
non-averaged estimate of KL(policy || reference) of the same shape. Which one a run logs or trains on is always the
caller's choice; the two columns differ:

    estimator          value                                gradient, as a loss on the policy's own samples
    k1                 unbiased, can be negative            zero in expectation: use it in rewards
    k2                 biased, non-negative                 the unbiased gradient of each token's KL
    k3                 unbiased, non-negative               biased (that of the forward KL, at small distances alike)
    absolute           biased, non-negative                 sign only
    k3_with_k2_grad    k3                                   k2

A token's KL is that of its own distribution given the tokens before it. As a loss, none of these tells a token what it
does to the KL of later ones, which is part of the gradient of a row's KL; `advantages.kl_in_reward` does.

Reference: Schulman 2020, "Approximating KL Divergence"; Tang and Munos 2025, "On a few pitfalls in KL divergence
gradient estimation for RL" (arXiv 2506.09477).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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


class Controller(NamedTuple):
    """A coefficient that changes during a run: init() -> state; update(state, observed) -> state, once a step.

    The state is one float32 scalar, the coefficient itself. `mlrl.controllers` puts it in a loop.
    `observed` is the metric that is steered by.
    """

    init: Callable[[], Array]
    update: Callable[[Array, Array], Array]


def _controller(initial: float, update: Callable[[Array, Array], Array]) -> Controller:
    return Controller(init=lambda: jnp.float32(initial), update=update)


def fixed(coef: float) -> Controller:
    """Always `coef`."""
    return _controller(coef, lambda state, observed: state)


def adaptive_kl(initial: float = 0.2, *, target: float = 6.0, horizon: float = 10_000.0, rows: int = 256) -> Controller:
    """coef <- coef (1 + clip(observed / target - 1, -0.2, 0.2) rows / horizon).

    Args:
        initial: first coefficient.
        target: the KL to hold, in the units of what is observed.
        horizon: rows after which a full error has doubled its mark.
        rows: rows per step.

    Reference: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences".
    """

    def update(state: Array, observed: Array) -> Array:
        error = jnp.clip(observed / target - 1.0, -0.2, 0.2)
        return state * (1.0 + error * rows / horizon)

    return _controller(initial, update)


def annealed(initial: float = 5e-3, *, decrement: float = 5e-5, minimum: float = 1e-3) -> Controller:
    """Falls by `decrement` a step down to `minimum`, whatever is observed (KDRL)."""
    return _controller(initial, lambda state, observed: jnp.maximum(state - decrement, minimum))


def entropy_target(
    initial: float = 0.0, *, target: float = 0.2, step: float = 5e-3, maximum: float = 1.0
) -> Controller:
    """Raises the entropy coefficient by `step` while entropy is below the target, else lowers it, within [0, maximum].

    Args:
        initial: first coefficient.
        target: in nats per token.
        step: change per training step.
        maximum: ceiling.

    Reference: He et al. 2025, "Skywork Open Reasoner 1", which also switches the term off above the target.
    """

    def update(state: Array, observed: Array) -> Array:
        return jnp.clip(state + jnp.where(observed < target, step, -step), 0.0, maximum)

    return _controller(initial, update)
