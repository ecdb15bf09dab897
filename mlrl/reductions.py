"""Named averages: each turns a mask into weights, so that a loss is sum(weights * per_token).

The weights are computed once over the whole minibatch. Its micro-batches and data shards then only add up, and the
denominator is global by construction; nothing that is summed with them may average over the rows it sees.
Rows without a single masked token count in no denominator. A mask that is empty everywhere gives weights of zero.
"""

from __future__ import annotations

import jax.numpy as jnp

from mlrl.types import Array, Refused


def token_mean(mask: Array) -> Array:
    """Every masked token weighs the same: w[b,t] = m[b,t] / sum(m). Long rows weigh more (DAPO).

    Args:
        mask: [B,L] bool.

    Returns:
        [B,L] float32 weights that sum to 1, or to 0 if nothing is masked in.
    """
    m = _as_float(mask)
    return m / jnp.maximum(m.sum(), 1.0)


def sequence_mean_token_mean(mask: Array) -> Array:
    """Every row weighs the same, its tokens share it: w[b,t] = m[b,t] / (n_b R), R rows with n_b > 0 (GRPO, GSPO).

    Args:
        mask: [B,L] bool.

    Returns:
        [B,L] float32 weights that sum to 1, or to 0 if nothing is masked in.
    """
    m = _as_float(mask)
    return m / (jnp.maximum(m.sum(axis=1, keepdims=True), 1.0) * _rows(m))


def sequence_mean_token_sum(mask: Array) -> Array:
    """The mean over rows of sums over tokens: w[b,t] = m[b,t] / R, R rows with a masked token.

    Args:
        mask: [B,L] bool.

    Returns:
        [B,L] float32 weights that sum to the mean row length.
    """
    m = _as_float(mask)
    return m / _rows(m)


def constant_length(mask: Array, *, length: float) -> Array:
    """The mean over rows of sums over tokens by a constant: w[b,t] = m[b,t] / (length R) (Dr. GRPO).

    Args:
        mask: [B,L] bool.
        length: the constant, in tokens; Dr. GRPO takes the longest completion that may be generated.

    Returns:
        [B,L] float32 weights.

    Raises:
        Refused: if length is not positive.

    Reference: Liu et al. 2025, "Understanding R1-Zero-Like Training".
    """
    if length <= 0:
        raise Refused(f"reductions.constant_length: length must be positive, got {length}")
    return sequence_mean_token_sum(mask) / length


def row_sum(x: Array, mask: Array) -> Array:
    """Sums each row over its masked tokens: [B,L], [B,L] -> [B]. What is masked out reaches nothing, NaN included."""
    return jnp.where(mask, x, 0.0).sum(axis=1)


def row_mean(x: Array, mask: Array) -> Array:
    """Averages each row over its masked tokens: [B,L], [B,L] -> [B]. A row without any gives 0."""
    return row_sum(x, mask) / jnp.maximum(_as_float(mask).sum(axis=1), 1.0)


def row_last(x: Array, mask: Array) -> Array:
    """[B,L] -> [B]: each row's x at its last masked column; 0 for a row without one."""
    columns = jnp.arange(mask.shape[1])
    last = jnp.max(jnp.where(mask, columns, -1), axis=1, keepdims=True)
    return jnp.where(columns == last, x, 0.0).sum(axis=1)


def _as_float(mask: Array) -> Array:
    return jnp.asarray(mask).astype(jnp.float32)


def _rows(m: Array) -> Array:
    return jnp.maximum((m.sum(axis=1) > 0).sum(), 1).astype(jnp.float32)
