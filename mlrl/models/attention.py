"""Grouped-query attention with rotary positions, over the row itself or over a cache."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from mlrl.types import Array

# Keys [B, K, head_width, M] and values [B, K, M, head_width] over M columns. Both products of a decode step then
# run along contiguous memory; with the keys' columns outermost, decoding on a CPU took 1.4 times as long.
Cache = tuple[Array, Array]


def rotary(x: Array, positions: Array, *, theta: float = 10_000.0) -> Array:
    """Rotates pairs of features by angles that grow with the position (half-split convention).

    With x = [x1, x2] along the last axis and angle_i = position * theta ** (-2i / head_width):
        [x1 cos - x2 sin,  x2 cos + x1 sin]

    Args:
      x: [B, L, ..., head_width], any axes between.
      positions: [B, L] int32, 0 for the first token of a row.
      theta: the base of the geometric series of wavelengths.
    Returns: the rotated x, same shape and dtype; the rotation itself is computed in fp32.
    Reference: Su et al. 2021, RoFormer (the half-split layout is that of Llama and Qwen weights).
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[..., None] * frequency  # [B, L, half]
    angle = angle.reshape(angle.shape[:2] + (1,) * (x.ndim - 3) + (half,))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def attend(queries: Array, keys: Array, values: Array, mask: Array) -> Array:
    """Softmax attention, the softmax in fp32.

    out = softmax(q k^T / sqrt(head_width) + log mask) v

    Args:
      queries: [B, L, K, H, head_width], H query heads to each of the K key/value heads.
      keys: [B, K, head_width, M].
      values: [B, K, M, head_width].
      mask: [B, L, M] bool, True where a query may look. A query that may look nowhere (padding) gets a
        mean of the values: finite, and never read by a valid token.
    Returns: [B, L, K, H, head_width].
    """
    b, length, k, h, width = queries.shape
    queries = jnp.moveaxis(queries * width**-0.5, 1, 3).reshape(b, k, h * length, width)
    logits = jnp.matmul(queries, keys, preferred_element_type=jnp.float32).reshape(b, k, h, length, -1)
    logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = nn.softmax(logits, axis=-1).astype(values.dtype).reshape(b, k, h * length, -1)
    mixed = jnp.matmul(weights, values).reshape(b, k, h, length, width)
    return jnp.moveaxis(mixed, 3, 1)


class Attention(nn.Module):
    """One fused projection to queries, keys and values; attention; one projection back.

    The fused kernel is [D, K, H + 2, head_width]: each key/value head sits beside its own query heads, so a
    tensor axis can split K.
    """

    kv_heads: int
    heads_per_kv: int
    head_width: int
    rope_theta: float
    qkv_bias: bool
    out_init_scale: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, positions: Array, mask: Array, cache: Cache | None, column: Array | int):
        """x [B,L,D] -> ([B,L,D], cache). See Transformer.__call__."""
        features = (self.kv_heads, self.heads_per_kv + 2, self.head_width)
        qkv = nn.DenseGeneral(features, use_bias=self.qkv_bias, dtype=self.dtype, param_dtype=self.param_dtype,
                              name="qkv")(x)  # fmt: skip
        rotated = rotary(qkv[:, :, :, :-1], positions, theta=self.rope_theta)
        queries = rotated[:, :, :, :-1]
        keys = jnp.moveaxis(rotated[:, :, :, -1], 1, 3)  # [B, K, head_width, L]
        values = jnp.swapaxes(qkv[:, :, :, -1], 1, 2)  # [B, K, L, head_width]
        if cache is not None:
            keys = lax.dynamic_update_slice(cache[0], keys.astype(cache[0].dtype), (0, 0, 0, column))
            values = lax.dynamic_update_slice(cache[1], values.astype(cache[1].dtype), (0, 0, column, 0))
            cache = (keys, values)
        mixed = attend(queries, keys, values, mask)
        init = nn.initializers.variance_scaling(self.out_init_scale, "fan_in", "normal")
        out = nn.DenseGeneral(x.shape[-1], axis=(-3, -2, -1), use_bias=False, dtype=self.dtype,
                              param_dtype=self.param_dtype, kernel_init=init, name="out")(mixed)  # fmt: skip
        return out, cache
