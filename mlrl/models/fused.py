"""Attention through fused kernels, for long rows: their memory grows with a row's length, and not with its square.

A fused kernel knows causal masks, windows and lengths, but no mask of any other form. What the mask of a row without a
cache says beside that is which columns are valid: so the valid tokens of each row are first moved to its front, in
their order, and back after. A window then counts tokens, as `attention.within_window` does, and holes cost nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from mlrl.axes import divided, spec_of
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

    A mesh's `sequence` axis splits the queries: each device has its part of a row's, and all of its keys and values.
    The last part looks at the most keys, and the others wait for it.

    Tested in interpret mode on a CPU, values and gradients, and lowered for a TPU; it has not been run on one.

    Args:
      interpret: runs the kernel as plain JAX, on any platform.
    Reference: Dao et al. 2022, FlashAttention; jax.experimental.pallas.ops.tpu.splash_attention.
    """
    heads, parts = queries.shape[2] * queries.shape[3], _sequence_parts(queries.shape[1])
    heads //= math.prod(_sizes(divided("kv_heads", queries.shape[2], _mesh())))
    made = _splash_kernel(queries.shape[1], heads, parts, cap, window, interpret)
    specs = made.manual_sharding_spec(NamedSharding(_mesh(), PartitionSpec(None, "sequence"))) if parts > 1 else (
        jax.tree.map(lambda _: PartitionSpec(), made))  # fmt: skip
    return _on_valid_tokens(_splash, queries * scale, keys, values, mask, made=(made, specs), parts=parts)


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


def _on_valid_tokens(kernel: Callable[..., Array], queries: Array, keys: Array, values: Array, mask: Array, *,
                     made: tuple[Any, Any] = ((), ()), parts: int = 1) -> Array:  # fmt: skip
    """A kernel (queries [B,M,K*H,W], keys and values [B,L,K,W], lengths [B], first, made) on the valid tokens of rows.

    The queries are those of the columns from `first` on. On a mesh each device has its rows and heads, and the whole
    length, or one of `parts` parts of the queries: no compiler splits such a kernel by itself.

    Args:
      made: what else the kernel is given, and how a mesh splits it.
    """
    def of_device(queries: Array, keys: Array, values: Array, valid: Array, made: Any) -> Array:
        b, length, k, h, width = queries.shape
        order = jnp.argsort(~valid, axis=1, stable=True)
        take = lambda x, order: jnp.take_along_axis(x, order[:, :, None, None], axis=1)  # noqa: E731
        keys, values = jnp.moveaxis(keys, 3, 1), jnp.swapaxes(values, 1, 2)
        rows = [take(x, order) for x in (queries.reshape(b, length, k * h, width), keys, values)]
        mine, first = length // parts, 0
        if parts > 1:
            first = mine * jax.lax.axis_index("sequence")
            rows[0] = jax.lax.dynamic_slice_in_dim(rows[0], first, mine, axis=1)
        out = kernel(*rows, jnp.sum(valid, axis=1, dtype=jnp.int32), first, made).astype(values.dtype)
        if parts > 1:
            out = jax.lax.all_gather(out, "sequence", axis=1, tiled=True)
        back = jax.lax.dynamic_slice_in_dim(jnp.argsort(order, axis=1), first, mine, axis=1)
        return take(out, back).reshape(b, mine, k, h, width)

    given = (queries, keys, values, jnp.diagonal(mask, axis1=1, axis2=2))
    mesh = _mesh()
    if mesh.empty or mesh.size == 1:
        return of_device(*given, made[0])
    axes = (("rows", "", "kv_heads"), ("rows", "kv_heads"), ("rows", "kv_heads"), ("rows",))
    specs = tuple(spec_of(names, x.shape, mesh) for names, x in zip(axes, given))
    out = spec_of(("rows", "columns" if parts > 1 else "", "kv_heads"), queries.shape, mesh)
    return jax.shard_map(of_device, in_specs=(*specs, made[1]), out_specs=out, check_vma=False)(*given, made[0])


def _mesh() -> Any:
    return jax.sharding.get_abstract_mesh()


def _sizes(axes: Sequence[str]) -> list[int]:
    return [_mesh().shape[name] for name in axes]


def _sequence_parts(length: int) -> int:
    """Into how many parts a mesh splits the columns of rows; 1 where they would not be whole blocks of a kernel."""
    parts = math.prod(_sizes(divided("columns", length, _mesh())))
    return parts if length % (parts * _LANES) == 0 else 1


def _splash_kernel(length: int, heads: int, parts: int, cap: float, window: int, interpret: bool) -> Any:
    """The kernel of a device, for rows of `length` columns, with what it knows of the mask for each of the parts."""
    # Inside, since Pallas takes a second to import.
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    padded = -(-length // _LANES) * _LANES
    block = next(size for size in (4 * _LANES, 2 * _LANES, _LANES) if padded // parts % size == 0)
    sizes = kernels.BlockSizes(**{name: block for name in (
        "block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq",
        "block_kv_dq")})  # fmt: skip
    square = (padded, padded)
    seen = kernels.LocalMask(square, (window - 1, 0), 0, parts) if window else kernels.CausalMask(square, 0, parts)
    return kernels.make_splash_mha(
        kernels.MultiHeadMask([seen] * heads), head_shards=1, q_seq_shards=parts, block_sizes=sizes,
        attn_logits_soft_cap=cap or None, interpret=interpret,
    )  # fmt: skip


def _splash(queries: Array, keys: Array, values: Array, lengths: Array, first: Array | int, made: Any) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    def row(queries: Array, keys: Array, values: Array, length: Array) -> Array:
        # Padding sees padding, and no token does.
        real = lambda x, first: (first + jnp.arange(x.shape[1]) < length).astype(jnp.int32)  # noqa: E731
        return made(queries, keys, values, segment_ids=SegmentIds(real(queries, first), real(keys, 0)))

    def heads_first(x: Array) -> Array:
        return jnp.pad(jnp.swapaxes(x, 1, 2), [(0, 0), (0, 0), (0, -x.shape[1] % _LANES), (0, 0)])

    out = jax.vmap(row)(*map(heads_first, (queries, keys, values)), lengths)
    return jnp.swapaxes(out[:, :, : queries.shape[1]], 1, 2)


def _dot_product(queries: Array, keys: Array, values: Array, lengths: Array, first: int, made: tuple, *, scale: float,
                 window: int, implementation: str) -> Array:  # fmt: skip
    del first, made
    return jax.nn.dot_product_attention(
        queries, keys, values, scale=scale, is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths,
        local_window_size=(window - 1, 0) if window else None, implementation=implementation,
    )  # fmt: skip
