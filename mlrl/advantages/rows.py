"""What every advantage function needs of a batch: rows' scores, tokens' rewards, one number for a whole row."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlrl.types import Array, Batch

Pair = tuple[Array, Array]  # (advantages [B,L], returns [B,L])


def row_scores(batch: Batch) -> Array:
    """A row's score: the sum of its reward tokens, 0 for an unscored row: [B]."""
    return reward_tokens(batch).sum(axis=1)


def reward_tokens(batch: Batch) -> Array:
    """The reward at each token, 0 in unscored rows and where nothing is valid: [B,L]."""
    return jnp.where(batch.rewards.scored[:, None] & batch.rollout.valid, batch.rewards.tokens, 0.0)


def spread(batch: Batch, advantages: Array) -> Pair:
    """Gives every token of a row the row's advantage; returns are rewards-to-go."""
    rewards = reward_tokens(batch)
    to_go = rewards.sum(axis=1, keepdims=True) - jnp.cumsum(rewards, axis=1) + rewards
    return jnp.where(batch.mask, advantages[:, None], 0.0), jnp.where(batch.mask, to_go, 0.0)


def whiten(x: Array, mask: Array, *, ddof: int = 1, eps: float = 1e-8, centre: bool = True) -> Array:
    """(x - mean) / sqrt(var + eps) over all masked entries of the batch.

    Args:
        x: [B,L].
        mask: [B,L] bool.
        ddof: subtracted from the count under the variance.
        eps: added to the variance, not to the standard deviation.
        centre: False only divides: x / sqrt(var + eps). (verl's shift_mean=False keeps the mean itself.)

    Returns:
        [B,L], 0 outside the mask.
    """
    x = jnp.where(mask, x, 0.0)
    n = mask.sum().astype(jnp.float32)
    mean = x.sum() / jnp.maximum(n, 1.0)
    variance = jnp.where(mask, jnp.square(x - mean), 0.0).sum() / jnp.maximum(n - ddof, 1.0)
    scaled = (x - mean) * jax.lax.rsqrt(variance + eps)
    return jnp.where(mask, scaled if centre else x * jax.lax.rsqrt(variance + eps), 0.0)
