"""Likelihood of given tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlrl.types import Array, Batch, Metrics, Scores


def next_token(scores: Scores, batch: Batch) -> tuple[Array, Metrics]:
    """Cross-entropy of the tokens in the mask: -sum(weights * log_probs).

    Which tokens count, and how much, is what mask and weights say: masked turns need nothing here.

    Args:
        scores: reads log_probs.
        batch: reads mask, weights.

    Returns:
        (loss, {"loss/next_token", "log_prob/mean": token mean in nats}).
    """
    log_probs = jnp.where(batch.mask, scores.log_probs, 0.0)
    loss = -jnp.sum(batch.weights * log_probs)
    mean = jnp.sum(batch.token_weights * jax.lax.stop_gradient(log_probs))
    return loss, {"loss/next_token": jax.lax.stop_gradient(loss), "log_prob/mean": mean}


def last_turns(mask: Array, turn: Array, *, turns: int = 1) -> Array:
    """The part of a mask that lies in a row's last `turns` turns with actions: [B,L], [B,L] -> [B,L] bool."""
    last = jnp.max(jnp.where(mask, turn, -1), axis=1, keepdims=True)
    return mask & (turn > last - turns)
