"""Attention through fused kernels, for long rows: their memory grows with a row's length, and not with its square.

A fused kernel knows causal masks, windows and lengths, but no mask of any other form. What the mask of a row without a
cache says beside that is which columns are valid: so the valid tokens of each row are first moved to its front, in
their order, and back after. A window then counts tokens, as `attention.within_window` does, and holes cost nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mlrl.axes import spec_of
from mlrl.models.attention import attend
from mlrl.types import Array

_LANES = 128  # a TPU's vector: splash's blocks are multiples of it


def by_platform(queries: Array, keys: Array, values: Array, mask: Array, *, scale: float, cap: float = 0.0,
                window: int = 0, min_columns: int = 256) -> Array:  # fmt: skip
    """`splash` on TPUs, `cudnn` on GPUs, and elsewhere `attention.attend`; as `Config.attention`.

    The platform is that of the current mesh, which may be of a topology that is not here.

    Args:
      queries, keys, values, mask: as those of `attend`; mask must be `transformer.causal_mask(valid)`, or what
        `within_window` makes of it.
      window: that of `within_window`.
      min_columns: shorter rows go through `attend` on every platform. The number is a guess: it was not measured.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = device.platform if device is not None else jax.default_backend()
    chosen = {"tpu": splash, "gpu": cudnn, "cuda": cudnn}.get(platform, attend)
    if queries.shape[1] < min_columns:
        chosen = attend
    return chosen(queries, keys, values, mask, scale=scale, cap=cap, window=window)


def splash(queries: Array, keys: Array, values: Array, mask: Array, *, scale: float, cap: float = 0.0, window: int = 0,
           interpret: bool = False) -> Array:  # fmt: skip
    """`attend` through the kernel that JAX has for TPUs. See `by_platform`.

    Tested in interpret mode on a CPU, values and gradients, and lowered for a TPU; it has not been run on one.

    Args:
      interpret: runs the kernel as plain JAX, on any platform.
    Reference: Dao et al. 2022, FlashAttention; jax.experimental.pallas.ops.tpu.splash_attention.
    """
    kernel = functools.partial(_splash, cap=cap, window=window, interpret=interpret)
    return _on_valid_tokens(kernel, queries * scale, keys, values, mask)


def cudnn(queries: Array, keys: Array, values: Array, mask: Array, *, scale: float, cap: float = 0.0,
          window: int = 0) -> Array:  # fmt: skip
    """`attend` through cuDNN's kernel. See `by_platform`.

    It has neither fp32, nor soft caps, nor heads wider than 128: these go through `attend`. It has not been run: what
    is tested is that jax.nn.dot_product_attention, given the same arguments but its XLA form, equals `attend`.
    """
    width = queries.shape[-1]
    if cap or queries.dtype == jnp.float32 or width > 128 or width % 8:
        return attend(queries, keys, values, mask, scale=scale, cap=cap, window=window)
    kernel = functools.partial(_dot_product, scale=scale, window=window, implementation="cudnn")
    return _on_valid_tokens(kernel, queries, keys, values, mask)


def _on_valid_tokens(kernel: Callable[..., Array], queries: Array, keys: Array, values: Array, mask: Array) -> Array:
    """A kernel (queries [B,L,K*H,W], keys and values [B,L,K,W], lengths [B]) on the valid tokens of rows.

    On a mesh each device has its rows and heads, and the whole length: no compiler splits such a kernel by itself.
    """
    def of_device(queries: Array, keys: Array, values: Array, valid: Array) -> Array:
        b, length, k, h, width = queries.shape
        order = jnp.argsort(~valid, axis=1, stable=True)
        take = lambda x, order: jnp.take_along_axis(x, order[:, :, None, None], axis=1)  # noqa: E731
        keys, values = jnp.moveaxis(keys, 3, 1), jnp.swapaxes(values, 1, 2)
        rows = [take(x, order) for x in (queries.reshape(b, length, k * h, width), keys, values)]
        out = kernel(*rows, jnp.sum(valid, axis=1, dtype=jnp.int32)).astype(values.dtype)
        return take(out, jnp.argsort(order, axis=1)).reshape(b, length, k, h, width)

    given = (queries, keys, values, jnp.diagonal(mask, axis1=1, axis2=2))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return of_device(*given)
    axes = (("rows", "", "kv_heads"), ("rows", "kv_heads"), ("rows", "kv_heads"), ("rows",))
    specs = tuple(spec_of(names, x.shape, mesh) for names, x in zip(axes, given))
    return jax.shard_map(of_device, in_specs=specs, out_specs=specs[0], check_vma=False)(*given)


def _splash(queries: Array, keys: Array, values: Array, lengths: Array, *, cap: float, window: int,
            interpret: bool) -> Array:  # fmt: skip
    # Inside, since Pallas takes a second to import.
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    length, heads = queries.shape[1:3]
    padded = -(-length // _LANES) * _LANES
    block = next(size for size in (4 * _LANES, 2 * _LANES, _LANES) if padded % size == 0)
    sizes = kernels.BlockSizes(**{name: block for name in (
        "block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq",
        "block_kv_dq")})  # fmt: skip
    square = (padded, padded)
    seen = kernels.LocalMask(square, (window - 1, 0), 0) if window else kernels.CausalMask(square)
    attention = kernels.make_splash_mha_single_device(
        kernels.MultiHeadMask([seen] * heads), block_sizes=sizes, attn_logits_soft_cap=cap or None, interpret=interpret)

    def row(queries: Array, keys: Array, values: Array, length: Array) -> Array:
        segment = (jnp.arange(padded) < length).astype(jnp.int32)  # padding sees padding, and no token does
        return attention(queries, keys, values, segment_ids=kernels.SegmentIds(segment, segment))

    heads_first = lambda x: jnp.pad(jnp.swapaxes(x, 1, 2), [(0, 0), (0, 0), (0, padded - length), (0, 0)])  # noqa: E731
    out = jax.vmap(row)(*map(heads_first, (queries, keys, values)), lengths)
    return jnp.swapaxes(out[:, :, :length], 1, 2)


def _dot_product(queries: Array, keys: Array, values: Array, lengths: Array, *, scale: float, window: int,
                 implementation: str) -> Array:  # fmt: skip
    return jax.nn.dot_product_attention(
        queries, keys, values, scale=scale, is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths,
        local_window_size=(window - 1, 0) if window else None, implementation=implementation,
    )  # fmt: skip
