"""The transformer's layers: one after the other, or one program that is run in turn over layers of a kind.

A period is the shortest run of layers that the following ones repeat: one layer where all are of a kind, two where
every other has a window. A model that is scanned (Config.scan_layers) has
  layers/attentions_j/...  the parameters of layer j of every period, stacked: their first axis is the period's
  rest/attentions_j/...    those of the layers that do not fill a period
and one that is not has attentions_i/... for layer i. `place` and `stacked` say what of the one is what of the other.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from mlrl import meshes
from mlrl.models import remat
from mlrl.models.attention import Attention, Cache
from mlrl.models.mlp import ExpertsMLP, GatedMLP, PlainMLP
from mlrl.models.projections import Projection, float_dtype
from mlrl.models.rope import rotary, unrotated
from mlrl.types import Array, Params

Path = tuple[str, ...]  # of a leaf, or of a module, in the nested dict of parameters
LISTS = ("attention_norms", "attentions", "attention_post_norms", "mlp_norms", "mlps", "mlp_post_norms")  # one a layer
Carry = tuple[Array, tuple[Cache, ...]]  # the residual stream, and the caches


class Layers(nn.Module):
    """Layers `first` to `first + count - 1` of a transformer, one after the other.

    config  a transformer.Config
    """

    config: Any
    first: int
    count: int

    def setup(self):
        c = self.config
        norm = functools.partial(c.norm, c.norm_eps, float_dtype(c.param_dtype))
        norms = lambda: [norm() for _ in range(self.count)]  # noqa: E731
        self.attention_norms, self.mlp_norms = norms(), norms()
        self.attentions = [_attention(c, self.first + j, norm) for j in range(self.count)]
        self.mlps = [_mlp(c) for _ in range(self.count)]
        if c.post_norms:
            self.attention_post_norms, self.mlp_post_norms = norms(), norms()

    def __call__(self, carry: Carry, period: tuple[Array, ...], positions: Array, masks: dict[int, Array],
                 column: Array | int) -> tuple[Carry, tuple[()]]:  # fmt: skip
        """The residual stream [B,L,D] after the layers, and their caches with new columns. See Transformer.__call__.

        Args:
          period: (index,) of the period in the caches' first axis, or () if they have none.
          masks: by the window that they keep.
        """
        (x, caches), written = carry, []
        for j in range(self.count):
            mask, cache = masks[_window(self.config, self.first + j)], caches[j] if caches else None
            if caches and x.shape[1] == 1:  # as in decoding: in place, with nothing worth computing twice
                x, cache = self._layer(j, x, positions, mask, cache, column, period)
            else:
                x, new = self._kept(j, bool(period))(self, x, positions, mask, _cut(cache, period), column)
                cache = _put(cache, new, period)
            written.append(cache)
        return (x, tuple(written) if caches else ()), ()

    def _kept(self, j: int, in_scan: bool) -> remat.Layer:
        """Layer j as a function of (self, x, positions, mask, cache, column) to (x, cache), with what it keeps as
        Config.remat has it.
        """
        layer = lambda self, *inputs: self._layer(j, *inputs, ())  # noqa: E731
        if self.is_initializing():
            return layer
        # In a scan the compiler cannot take what is computed again for what was computed before.
        return self.config.remat(layer, prevent_cse=not in_scan)

    def _layer(self, j: int, x: Array, positions: Array, mask: Array, cache: Cache | None, column: Array | int,
               period: tuple[Array, ...]) -> tuple[Array, Cache | None]:  # fmt: skip
        post_norms = self.config.post_norms
        mixed, cache = self.attentions[j](self.attention_norms[j](x), positions, mask, cache, column, period)
        x = stream(x + (self.attention_post_norms[j](mixed) if post_norms else mixed))
        mixed = self.mlps[j](self.mlp_norms[j](x))
        return stream(x + (self.mlp_post_norms[j](mixed) if post_norms else mixed)), cache


def _cut(cache: Cache | None, period: tuple[Array, ...]) -> Cache | None:
    """A period's cache out of the stacked ones: what is kept of a layer is then its own."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, *period, keepdims=False), cache) if period else cache


def _put(cache: Cache | None, new: Cache | None, period: tuple[Array, ...]) -> Cache | None:
    """The stacked caches with a period's new one."""
    put = lambda x, own: jax.lax.dynamic_update_index_in_dim(x, own, *period, 0)  # noqa: E731
    return jax.tree.map(put, cache, new) if period else new


def scanned(periods: int) -> type[nn.Module]:
    """Layers that are run `periods` times, each with its own parameters, whose first axis is the period's.

    The caches of all periods are carried from each to the next, and not cut up and put together again.
    """
    whole = nn.broadcast
    return nn.scan(Layers, variable_axes={"params": 0}, split_rngs={"params": True}, length=periods,
                   in_axes=(0, whole, whole, whole))  # fmt: skip


def stream(x: Array) -> Array:
    """The residual stream [B,L,D], split over a mesh by rows and columns.

    Left to itself, a compiler may well split it along the width, as the kernels are, and move it about.
    """
    return meshes.split(x, "rows", "columns")


def place(config: Any, path: Path) -> tuple[Path, int | None]:
    """Where the policy's parameter at `path` in an unrolled model lies in that of `config`: path, and period there.

    The period is None for a parameter that is not stacked.
    """
    periods, period = config.scanned
    name, _, number = path[0].rpartition("_")
    if not periods or name not in LISTS:
        return path, None
    index, j = divmod(int(number), period)
    if index < periods:
        return ("layers", f"{name}_{j}", *path[1:]), index
    return ("rest", f"{name}_{int(number) - periods * period}", *path[1:]), None


def stacked(params: Params, config: Any) -> Params:
    """Parameters of an unrolled model, or their gradients, as the scanned one of `config` holds them: with a copy."""
    if "critic" in params:
        trunk = dataclasses.replace(config, layers=config.critic_layers, critic_layers=0)
        params = params | {"critic": stacked(params["critic"], trunk)}
    found: dict[Path, dict[int | None, Any]] = {}
    for name, module in params.items():
        path, index = place(config, (name,))
        found.setdefault(path, {})[index] = module
    # By their numbers, since 10 comes before 9 among names.
    together = lambda parts: jax.tree.map(lambda *x: jnp.stack(x), *[parts[i] for i in sorted(parts)])  # noqa: E731
    return traverse_util.unflatten_dict(
        {path: parts[None] if None in parts else together(parts) for path, parts in found.items()})  # fmt: skip


def _window(c: Any, layer: int) -> int:
    return c.windows[layer % len(c.windows)]


def _attention(c: Any, layer: int, norm: Callable[..., nn.Module]) -> Attention:
    return Attention(
        kv_heads=c.kv_heads, heads_per_kv=c.heads // c.kv_heads, head_width=c.head_width, rotate=_rotation(c, layer),
        norm=norm, qk_norm=c.qk_norm, qkv_bias=c.qkv_bias, out_bias=c.out_bias,
        scale=(c.scale_width or c.head_width) ** -0.5, cap=c.attention_cap, window=_window(c, layer),
        attention=c.attention, out_init_scale=_small(c), project=functools.partial(_projection, c),
    )  # fmt: skip


def _mlp(c: Any) -> nn.Module:
    """A layer's MLP: of experts, gated, or plain."""
    if c.experts:
        return ExpertsMLP(c.mlp_width, c.experts, c.experts_per_token, c.experts_renormalized, c.activation, _small(c),
                          jnp.dtype(c.dtype), jnp.dtype(c.param_dtype))  # fmt: skip
    kind = GatedMLP if c.gated_mlp else PlainMLP
    return kind(c.mlp_width, c.activation, c.mlp_bias, _small(c), functools.partial(_projection, c))


def _small(c: Any) -> float:
    """Residual branches start small, so that the depth does not blow up the residual stream (GPT-2)."""
    return 1.0 / (2 * c.layers)


def _projection(c: Any, features: tuple[int, ...], *, name: str, **given: Any) -> Projection:
    """A kernel by its name in Config.kernels, with an adapter if it is to have one."""
    rank = c.lora_rank if name in (c.lora_kernels or c.kernels) else 0
    return Projection(features, jnp.dtype(c.dtype), jnp.dtype(c.param_dtype), rank=rank, alpha=c.lora_alpha, name=name,
                      **given)  # fmt: skip


def _rotation(c: Any, layer: int) -> Callable[[Array, Array], Array]:
    """How a layer rotates queries and keys: (x, positions) -> x."""
    if c.learned_positions:
        return unrotated
    if _window(c, layer) and c.window_rope_theta:
        return functools.partial(rotary, theta=c.window_rope_theta)
    return functools.partial(rotary, theta=c.rope_theta, scaling=c.rope_scaling)
