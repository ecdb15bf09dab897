"""The equations of the policy gradient: per-token losses from log-ratios and advantages.

Each takes arrays of one shape, usually [B,L], and returns (per-token loss, clipped), where `clipped` marks the tokens
whose gradient the equation stopped. Losses are minimized: they are minus the papers' objectives. `log_ratio` is
log_probs - old_log_probs, already 0 where masked. Advantages are constants.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mlrl.types import Array

stop = jax.lax.stop_gradient


def clipped_surrogate(
    log_ratio: Array, advantages: Array, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> tuple[Array, Array]:
    """PPO: loss = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(log_ratio).

    Args:
        log_ratio: per token, or a row's value broadcast to its tokens (GSPO).
        advantages: same shape.
        clip_low: how far below 1 the ratio may fall.
        clip_high: how far above 1 it may rise (DAPO: 0.28).

    Returns:
        (loss, clipped).

    Reference: Schulman et al. 2017, "Proximal Policy Optimization".
    """
    advantages = stop(advantages)
    ratio = jnp.exp(log_ratio)
    free = -ratio * advantages
    held = -jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages
    return jnp.maximum(free, held), held > free


def dual_clipped_surrogate(
    log_ratio: Array, advantages: Array, *, clip_low: float = 0.2, clip_high: float = 0.2, clip_dual: float = 3.0
) -> tuple[Array, Array]:
    """PPO whose loss on bad tokens is bounded: for A < 0, loss = min(PPO loss, -clip_dual A).

    Args:
        log_ratio: per token.
        advantages: same shape.
        clip_low: as in PPO.
        clip_high: as in PPO.
        clip_dual: the ratio at which a negative advantage stops growing; more than 1.

    Returns:
        (loss, clipped).

    Reference: Ye et al. 2019, "Mastering Complex Control in MOBA Games".
    """
    advantages = stop(advantages)
    loss, clipped = clipped_surrogate(log_ratio, advantages, clip_low=clip_low, clip_high=clip_high)
    ceiling = -clip_dual * advantages
    capped = (advantages < 0) & (loss > ceiling)
    return jnp.where(capped, ceiling, loss), clipped | capped


def score_function(log_probs: Array, advantages: Array) -> Array:
    """REINFORCE: loss = -A log p. No ratio, so nothing is clipped.

    Reference: Williams 1992.
    """
    return -stop(advantages) * log_probs


def clipped_weight(
    log_probs: Array, log_ratio: Array, advantages: Array, *, clip_low: float = 1.0, clip_high: float = 0.2
) -> tuple[Array, Array]:
    """CISPO: loss = -sg(clip(r, 1 - clip_low, 1 + clip_high)) A log p. Clipped tokens keep a gradient.

    Args:
        log_probs: current, with gradient.
        log_ratio: same shape.
        advantages: same shape.
        clip_low: 1.0 leaves the lower side open, as in verl's example (which says 10).
        clip_high: above 1.

    Returns:
        (loss, clipped): here `clipped` marks weights that were held, not gradients that were stopped.

    Reference: MiniMax 2025, "MiniMax-M1".
    """
    ratio = stop(jnp.exp(log_ratio))
    weight = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    return -weight * stop(advantages) * log_probs, weight != ratio


def soft_gate(
    log_ratio: Array, advantages: Array, *, temperature_positive: float = 1.0, temperature_negative: float = 1.05
) -> tuple[Array, Array]:
    """SAPO: loss = -A (4/tau) sigmoid(tau (r - 1)); a soft clip whose slope at r = 1 is -A.

    Args:
        log_ratio: per token.
        advantages: same shape.
        temperature_positive: tau where A > 0.
        temperature_negative: tau elsewhere; higher forgets outliers sooner.

    Returns:
        (loss, clipped): nothing is clipped.

    Reference: Gao et al. 2025, "Soft Adaptive Policy Optimization".
    """
    advantages = stop(advantages)
    tau = jnp.where(advantages > 0, temperature_positive, temperature_negative)
    loss = -advantages * (4.0 / tau) * jax.nn.sigmoid(tau * (jnp.exp(log_ratio) - 1.0))
    return loss, jnp.zeros(loss.shape, bool)


def gamma_weight(
    log_probs: Array,
    log_ratio: Array,
    advantages: Array,
    *,
    power_positive: float = 2.0,
    decay_positive: float = 3.0,
    power_negative: float = 3.0,
    decay_negative: float = 2.0,
) -> tuple[Array, Array]:
    """VESPO: loss = -sg(phi(w)) A log p, phi(w) = w^k exp(lambda (1 - w)), w = exp(log_ratio) of the whole row.

    phi(1) = 1, and phi vanishes for rows that have become much likelier or much less likely.

    Args:
        log_probs: current, with gradient.
        log_ratio: the row's sum, broadcast to its tokens.
        advantages: same shape.
        power_positive: k where A >= 0.
        decay_positive: lambda where A >= 0.
        power_negative: k elsewhere.
        decay_negative: lambda elsewhere.

    Returns:
        (loss, clipped): nothing is clipped.

    Reference: "VESPO: Variational Sequence-level Soft Policy Optimization", as in TRL's loss_type "vespo".
    """
    advantages, log_ratio = stop(advantages), stop(log_ratio)
    k = jnp.where(advantages >= 0, power_positive, power_negative)
    decay = jnp.where(advantages >= 0, decay_positive, decay_negative)
    weight = jnp.exp(decay + k * log_ratio - decay * jnp.exp(log_ratio))
    return -weight * advantages * log_probs, jnp.zeros(weight.shape, bool)


def wrong_share(pass_rate: Array) -> Array:
    """w(q) = 1 - q: hard prompts weigh more (NFT's default)."""
    return 1.0 - pass_rate


def inverse_odds(pass_rate: Array) -> Array:
    """w(q) = sqrt((1 - q) / q): as if advantages were divided by the population std."""
    return jnp.sqrt((1.0 - pass_rate) / pass_rate)


def implicit_negative(
    log_ratio: Array,
    advantages: Array,
    *,
    negative_weight: float = 1.0,
    floor: float = 1.0,
    weight_of: Callable[[Array], Array] = wrong_share,
    pass_rate_margin: float = 0.02,
) -> tuple[Array, Array]:
    """NFT: likelihood of right answers, and of wrong ones under the negative policy that the trained one implies.

    With A = R - q of a 0/1 reward R and the group's pass rate q (`advantages.grpo` with no_scale), a positive A is a
    right answer with q = 1 - A and a negative one is wrong with q = -A. Then, r = exp(log_ratio),
        right: L = -log r;   wrong: L = -log max((1 - q r) / (1 - q), floor), straight-through;
    and loss = w(q) L. On-policy, with w = 1 - q, its gradient is that of the surrogate -A r: Dr. GRPO.
    The straight-through maximum keeps the gradient where r > 1; a plain one would lose it. A = 0 gives 0.

    Args:
        log_ratio: per token; held below 10 nats.
        advantages: same shape, R - q.
        negative_weight: of wrong answers; 0 is rejection sampling (RFT).
        floor: the authors' c, in the forward pass.
        weight_of: w(q): wrong_share for Dr. GRPO, inverse_odds for GRPO with the population std, ones_like for 1.
        pass_rate_margin: q is held in [margin, 1 - margin].

    Returns:
        (loss, clipped): clipped marks tokens at the floor, whose gradient continues.

    Reference: Chen et al. 2025, "Bridging Supervised Learning and RL in Math Reasoning" (NFT).
    """
    advantages = stop(advantages)
    right, wrong = advantages > 0, advantages < 0
    q = jnp.clip(jnp.where(right, 1.0 - advantages, -advantages), pass_rate_margin, 1.0 - pass_rate_margin)
    log_ratio = jnp.minimum(log_ratio, 10.0)
    proxy = (1.0 - q * jnp.exp(log_ratio)) / (1.0 - q)
    held = proxy + stop(jnp.maximum(proxy, floor) - proxy)
    negative = -negative_weight * jnp.log(jnp.where(wrong, held, 1.0))
    loss = weight_of(q) * jnp.where(right, -log_ratio, jnp.where(wrong, negative, 0.0))
    return loss, wrong & (proxy < floor)


def total_variation_gate(
    log_probs: Array, old_log_probs: Array, advantages: Array, *, limit: float = 0.2, cap: float = 3.0
) -> tuple[Array, Array]:
    """DPPO-TV: loss = -A sg(min(r, cap)) log p M, M = 0 once p has moved more than `limit` in A's direction.

    Unlike the ratio, |p - p_old| does not punish rare tokens for being rare.

    Args:
        log_probs: current, with gradient.
        old_log_probs: same shape.
        advantages: same shape.
        limit: in probability.
        cap: of the ratio.

    Returns:
        (loss, clipped).

    Reference: verl's dppo_tv (core_algos.py).
    """
    advantages = stop(advantages)
    p, old = stop(jnp.exp(log_probs)), jnp.exp(old_log_probs)
    blocked = jnp.where(advantages > 0, p - old > limit, (advantages < 0) & (old - p > limit))
    ratio = jnp.minimum(stop(jnp.exp(log_probs - old_log_probs)), cap)
    return jnp.where(blocked, 0.0, -advantages * ratio * log_probs), blocked
