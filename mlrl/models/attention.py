"""Grouped-query attention over the row itself or over a cache, with positions from outside."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from mlrl.types import Array

# Keys [B, K, head_width, M] and values [B, K, M, head_width] over M columns. Both products of a decode step then
# run along contiguous memory; with the keys' columns outermost, decoding on a CPU took 1.4 times as long.
# In int8, the scales of keys [B, K, 1, M] and of values [B, K, M, 1] come after them; see `to_int8`.
Cache = tuple[Array, ...]


def columnwise(function: Callable[[Array, int], Array], cache: Cache) -> Cache:
    """function(array, its axis of columns, from the last) of each array of a cache."""
    return tuple(function(x, -1 if i % 2 == 0 else -2) for i, x in enumerate(cache))


def to_int8(x: Array, axis: int) -> tuple[Array, Array]:
    """Keys or values in 8 bits: symmetric, one scale for each token and head.

    scale = max |x| / 127 over the head's width;  integer = round(x / scale), so that |x - integer * scale| <= scale / 2

    Args:
      axis: of the head's width.
    Returns: int8 of the shape of x, and float32 scales of length 1 in `axis`.
    """
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=axis, keepdims=True) / 127.0
    return jnp.round(wide / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int8), scale


def attend(queries: Array, keys: Array, values: Array, mask: Array, *, scale: float, cap: float = 0.0,
           window: int = 0, scales: tuple[Array, ...] = ()) -> Array:  # fmt: skip
    """Softmax attention, the softmax in fp32.

    out = softmax(soft_cap(scale * q k^T) + log mask) v

    Args:
      queries: [B, L, K, H, head_width], H query heads to each of the K key/value heads.
      keys: [B, K, head_width, M].
      values: [B, K, M, head_width].
      mask: [B, L, M] bool, True where a query may look. A query that may look nowhere (padding) gets a
        mean of the values: finite, and never read by a valid token.
      scale: usually head_width ** -0.5.
      cap: the bound of `soft_cap`; 0.0: none.
      window: what the mask keeps already; for kernels that make masks of their own, see mlrl.models.fused.
      scales: of int8 keys [B, K, 1, M] and values [B, K, M, 1]. Integers are multiplied, and the scale of a key is
        taken times its logit, that of a value times its weight: nothing as large as the cache is made in a wider dtype
        where the compiler widens integers inside the product.
    Returns: [B, L, K, H, head_width].
    """
    del window
    b, length, k, h, width = queries.shape
    queries = jnp.moveaxis(queries * scale, 1, 3).reshape(b, k, h * length, width)
    if scales:
        keys, values = keys.astype(queries.dtype), values.astype(queries.dtype)
    logits = jnp.matmul(queries, keys, preferred_element_type=jnp.float32)
    if scales:
        logits = logits * scales[0]
    logits = logits.reshape(b, k, h, length, -1)
    logits = jnp.where(mask[:, None, None], soft_cap(logits, cap), jnp.finfo(jnp.float32).min)
    weights = nn.softmax(logits, axis=-1).reshape(b, k, h * length, -1)
    if scales:
        weights = weights * jnp.swapaxes(scales[1], 2, 3)
    mixed = jnp.matmul(weights.astype(values.dtype), values).reshape(b, k, h, length, width)
    return jnp.moveaxis(mixed, 3, 1)


def soft_cap(x: Array, cap: float) -> Array:
    """cap * tanh(x / cap), which lies within +-cap; x itself where cap is 0.0. Reference: Gemma 2."""
    return cap * jnp.tanh(x / cap) if cap else x


def within_window(mask: Array, window: int) -> Array:
    """Of the columns that a query may look at, the last `window`; all where `window` is 0. [B,L,M] -> [B,L,M] bool.

    Padding and holes do not count: the window is one of tokens, its own included, as in a row without them.
    """
    if not window:
        return mask
    at_or_behind = jnp.flip(jnp.cumsum(jnp.flip(mask, -1).astype(jnp.int32), axis=-1), -1)
    return mask & (at_or_behind <= window)


def written(cache: Cache, keys: Array, values: Array, column: Array | int, period: tuple[Array, ...] = ()) -> Cache:
    """The cache with keys [B,K,W,L] and values [B,K,L,W] in its columns from `column` on, as int8 if it is in int8.

    Args:
      period: (index,), which of the cache's periods is written, or () if it has no axis of these. Only the new columns
        are written, so that a scan that carries the whole stack changes it in place and copies no layer.
    """
    def write(x: Array, new: Array, *at: Array | int) -> Array:
        return lax.dynamic_update_slice(x, new.astype(x.dtype).reshape((1,) * len(period) + new.shape), (*period, *at))

    new = (keys, values)
    if len(cache) == 4:
        (keys, of_keys), (values, of_values) = to_int8(keys, -2), to_int8(values, -1)
        new = (keys, values, of_keys, of_values)
    at = columnwise(lambda _, axis: (0, 0, 0, column) if axis == -1 else (0, 0, column, 0), cache)
    return tuple(write(x, more, *where) for x, more, where in zip(cache, new, at, strict=True))


class Attention(nn.Module):
    """One fused projection to queries, keys and values; attention; one projection back.

    The fused kernel is [D, K, H + 2, head_width]: each key/value head sits beside its own query heads, so a
    tensor axis can split K.
    """

    kv_heads: int
    heads_per_kv: int
    head_width: int
    rotate: Callable[[Array, Array], Array]  # (x, positions) -> x
    norm: Callable[..., nn.Module]  # (name=) -> a norm, for `qk_norm`
    qk_norm: bool
    qkv_bias: bool
    out_bias: bool
    scale: float
    cap: float
    window: int
    attention: Callable[..., Array]  # in the place of `attend`, where there is no cache
    out_init_scale: float
    project: Callable[..., nn.Module]  # (features, name=, ...) -> a Projection

    @nn.compact
    def __call__(self, x: Array, positions: Array, mask: Array, cache: Cache | None, column: Array | int,
                 period: tuple[Array, ...] = ()):  # fmt: skip
        """x [B,L,D] -> ([B,L,D], cache). See Transformer.__call__, and for `period` `written`."""
        features = (self.kv_heads, self.heads_per_kv + 2, self.head_width)
        qkv = self.project(features, use_bias=self.qkv_bias, name="qkv")(x)
        heads = qkv[:, :, :, :-1]
        if self.qk_norm:
            queries, keys = heads[:, :, :, :-1], heads[:, :, :, -1:]
            heads = jnp.concatenate([self.norm(name="query_norm")(queries), self.norm(name="key_norm")(keys)], axis=3)
        rotated = self.rotate(heads, positions)
        queries = rotated[:, :, :, :-1]
        keys = jnp.moveaxis(rotated[:, :, :, -1], 1, 3)  # [B, K, head_width, L]
        values = jnp.swapaxes(qkv[:, :, :, -1], 1, 2)  # [B, K, L, head_width]
        attention = self.attention
        if cache is not None:
            cache = written(cache, keys, values, column, period)
            keys, values, *scales = (
                lax.dynamic_index_in_dim(x, *period, keepdims=False) if period else x for x in cache)  # fmt: skip
            attention = functools.partial(attend, scales=tuple(scales))
        mixed = attention(queries, keys, values, mask, scale=self.scale, cap=self.cap, window=self.window)
        init = nn.initializers.variance_scaling(self.out_init_scale, "fan_in", "normal")
        out = self.project(x.shape[-1:], summed=3, use_bias=self.out_bias, kernel_init=init, name="out")
        return out(mixed), cache
