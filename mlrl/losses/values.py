"""Losses of a value function, on a shared trunk or a critic of its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlrl.losses.regularizers import is_off
from mlrl.types import Array, Batch, Metrics, Scores


def value_loss(scores: Scores, batch: Batch, *, value_coef: float | Array = 0.5) -> tuple[Array, Metrics]:
    """Squared error: value_coef * sum(weights * (V - return)^2).

    Args:
        scores: reads values.
        batch: reads returns, mask, weights; not the old values.
        value_coef: 0.0 is off. The default carries the customary 1/2.

    Returns:
        (loss, {"loss/value", "value/mean"}).
    """
    if is_off(value_coef):
        return jnp.zeros((), jnp.float32), {}
    values, returns = _inside(scores.values, batch), _inside(batch.returns, batch)
    return _add_up(jnp.square(values - returns), values, value_coef, batch, {})


def clipped_value_loss(
    scores: Scores, batch: Batch, *, value_coef: float | Array = 0.5, value_clip: float = 0.2
) -> tuple[Array, Metrics]:
    """PPO's: value_coef * sum(weights * max((V - return)^2, (clip(V, V_old +- value_clip) - return)^2)).

    Args:
        scores: reads values.
        batch: reads values (before the update), returns, mask, weights.
        value_coef: 0.0 is off. The default carries the customary 1/2.
        value_clip: in units of the return.

    Returns:
        (loss, {"loss/value", "value/mean", "value/clipped_share"}).

    Reference: Schulman et al. 2017, in the form of OpenAI's baselines.
    """
    if is_off(value_coef):
        return jnp.zeros((), jnp.float32), {}
    values, old = _inside(scores.values, batch), jax.lax.stop_gradient(_inside(batch.values, batch))
    returns = _inside(batch.returns, batch)
    free = jnp.square(values - returns)
    held = jnp.square(jnp.clip(values, old - value_clip, old + value_clip) - returns)
    share = jnp.sum(batch.token_weights * (held > free))
    return _add_up(jnp.maximum(free, held), values, value_coef, batch, {"value/clipped_share": share})


def _inside(x: Array, batch: Batch) -> Array:
    return jnp.where(batch.mask, x, 0.0)


def _add_up(error: Array, values: Array, coef: float | Array, batch: Batch, metrics: Metrics):
    loss = coef * jnp.sum(batch.weights * error)
    mean = jnp.sum(batch.token_weights * jax.lax.stop_gradient(values))
    return loss, {"loss/value": jax.lax.stop_gradient(loss), "value/mean": mean} | metrics
