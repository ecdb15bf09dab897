"""Layouts: which tensor of a Hugging Face checkpoint lies where in the parameters of the transformer.

A layout serves import and export alike. A kernel here often holds several tensors there (queries, keys and values; gate
and up), so each tensor is given as a view of its leaf: import assigns to the view, export reads it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mlrl.models.transformer import Config

Path = tuple[str, ...]  # of a leaf in the nested dict of parameters
View = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint.

    name   as in the file
    shape  as in the file
    leaf   path of the parameter that holds it
    view   leaf -> the part of it that is the tensor, with the tensor's elements in its order, in any shape
    """

    name: str
    shape: tuple[int, ...]
    leaf: Path
    view: View


def whole(leaf: np.ndarray) -> np.ndarray:
    """All of the leaf as it is."""
    return leaf


def outputs_first(leaf: np.ndarray) -> np.ndarray:
    """A kernel [in, out] as PyTorch's Linear stores it, [out, in]."""
    return leaf.T


def judging(tensors: list[Tensor], width: int) -> list[Tensor]:
    """A layout's sequence classifier of one label: its score of a hidden state, [1, D], is the value head."""
    return [*tensors, Tensor("score.weight", (1, width), ("value", "kernel"), outputs_first)]


Experts = Callable[[Config, str, str], list[Tensor]]  # (config, layer's name there, MLP's name here)


def _experts(c: Config, block: str, names: tuple[str, str, str], mlp: str) -> list[Tensor]:
    """The router and every expert's gate, up and down, by these names, in a block of the checkpoint."""
    d, width = c.width, c.mlp_width
    tensors = [Tensor(f"{block}.gate.weight", (c.experts, d), (mlp, "router", "kernel"), outputs_first)]
    for e in range(c.experts):
        for j, name in enumerate(names[:2]):
            view = lambda leaf, e=e, j=j: leaf[e, :, j].T
            tensors.append(Tensor(f"{block}.experts.{e}.{name}.weight", (width, d), (mlp, "gate_up"), view))
        view = lambda leaf, e=e: leaf[e].T
        tensors.append(Tensor(f"{block}.experts.{e}.{names[2]}.weight", (d, width), (mlp, "down"), view))
    return tensors


def qwen_experts(c: Config, layer: str, mlp: str) -> list[Tensor]:
    """A layer's experts by the names of Qwen3-MoE."""
    return _experts(c, f"{layer}.mlp", ("gate_proj", "up_proj", "down_proj"), mlp)


def mixtral_experts(c: Config, layer: str, mlp: str) -> list[Tensor]:
    """A layer's experts by the names of Mixtral."""
    return _experts(c, f"{layer}.block_sparse_moe", ("w1", "w3", "w2"), mlp)


def decoder(c: Config, *, experts: Experts = qwen_experts) -> list[Tensor]:
    """The layout that Llama began and Qwen, Mistral and Gemma keep: the same names, where a model has the part."""
    d, q, kv, width = c.width, c.heads * c.head_width, c.kv_heads * c.head_width, c.mlp_width
    tensors = [Tensor("model.embed_tokens.weight", (c.vocabulary_size, d), ("embedding", "embedding"), whole)]

    def vector(name: str, size: int, *leaf: str, view: View = whole) -> None:
        tensors.append(Tensor(name, (size,), leaf, view))

    def linear(name: str, shape: tuple[int, int], module: Path, kernel: View, bias: View, biased: bool) -> None:
        tensors.append(Tensor(f"{name}.weight", shape, (*module, "kernel"), kernel))
        if biased:
            vector(f"{name}.bias", shape[0], *module, "bias", view=bias)

    for i in range(c.layers):
        layer, attention, mlp = f"model.layers.{i}", f"attentions_{i}", f"mlps_{i}"
        for name, which in (("q", slice(None, -2)), ("k", slice(-2, -1)), ("v", slice(-1, None))):
            shape = (q if name == "q" else kv, d)
            linear(f"{layer}.self_attn.{name}_proj", shape, (attention, "qkv"), *_heads(which), c.qkv_bias)
        linear(f"{layer}.self_attn.o_proj", (d, q), (attention, "out"), _from_heads, whole, c.out_bias)
        if c.qk_norm:
            for short, long in (("q", "query"), ("k", "key")):
                vector(f"{layer}.self_attn.{short}_norm.weight", c.head_width, attention, f"{long}_norm", "scale")
        if c.experts:
            tensors.extend(experts(c, layer, mlp))
        else:
            for j, name in enumerate(("gate", "up")):
                linear(f"{layer}.mlp.{name}_proj", (width, d), (mlp, "gate_up"), *_half(j), c.mlp_bias)
            linear(f"{layer}.mlp.down_proj", (d, width), (mlp, "down"), outputs_first, whole, c.mlp_bias)
        norms = {"input_layernorm": "attention_norms", "post_attention_layernorm": "mlp_norms"}
        if c.post_norms:
            norms = {"input_layernorm": "attention_norms", "post_attention_layernorm": "attention_post_norms",
                     "pre_feedforward_layernorm": "mlp_norms",
                     "post_feedforward_layernorm": "mlp_post_norms"}  # fmt: skip
        for theirs, ours in norms.items():
            vector(f"{layer}.{theirs}.weight", d, f"{ours}_{i}", "scale")
    vector("model.norm.weight", d, "final_norm", "scale")
    if not c.tied_head:
        tensors.append(Tensor("lm_head.weight", (c.vocabulary_size, d), ("head", "kernel"), outputs_first))
    return tensors


def _heads(which: slice) -> tuple[View, View]:
    """Of a fused kernel [D, K, H + 2, W]: some of the heads as [K, H, W, D]; of its bias: [K, H, W]."""
    return lambda kernel: np.moveaxis(kernel[:, :, which], 0, -1), lambda bias: bias[:, which]


def _from_heads(kernel: np.ndarray) -> np.ndarray:
    """[K, H, W, D] as [D, K, H, W]."""
    return np.moveaxis(kernel, -1, 0)


def _half(j: int) -> tuple[View, View]:
    """Of a kernel [D, 2, M]: one half as [M, D]; of its bias: [M]."""
    return lambda kernel: kernel[:, j].T, lambda bias: bias[j]


def gpt2(c: Config) -> list[Tensor]:
    """GPT-2's layout: kernels [in, out], queries, keys and values side by side in one kernel, everything biased."""
    d, width = c.width, c.mlp_width
    tensors = [
        Tensor("transformer.wte.weight", (c.vocabulary_size, d), ("embedding", "embedding"), whole),
        Tensor("transformer.wpe.weight", (c.learned_positions, d), ("positions", "embedding"), whole),
    ]

    def biased(name: str, module: Path, kernel: str, shape: tuple[int, ...], views: tuple[View, View]) -> None:
        tensors.append(Tensor(f"{name}.weight", shape, (*module, kernel), views[0]))
        tensors.append(Tensor(f"{name}.bias", shape[-1:], (*module, "bias"), views[1]))

    as_is = (whole, whole)
    # One query head to each key and value: [D, K, 3, W] as [D, 3, K, W].
    fused = (lambda kernel: np.swapaxes(kernel, 1, 2), lambda bias: np.swapaxes(bias, 0, 1))
    for i in range(c.layers):
        layer = f"transformer.h.{i}"
        biased(f"{layer}.ln_1", (f"attention_norms_{i}",), "scale", (d,), as_is)
        biased(f"{layer}.attn.c_attn", (f"attentions_{i}", "qkv"), "kernel", (d, 3 * d), fused)
        biased(f"{layer}.attn.c_proj", (f"attentions_{i}", "out"), "kernel", (d, d), as_is)
        biased(f"{layer}.ln_2", (f"mlp_norms_{i}",), "scale", (d,), as_is)
        biased(f"{layer}.mlp.c_fc", (f"mlps_{i}", "up"), "kernel", (d, width), as_is)
        biased(f"{layer}.mlp.c_proj", (f"mlps_{i}", "down"), "kernel", (width, d), as_is)
    biased("transformer.ln_f", ("final_norm",), "scale", (d,), as_is)
    if not c.tied_head:
        tensors.append(Tensor("lm_head.weight", (c.vocabulary_size, d), ("head", "kernel"), outputs_first))
    return tensors


def covers(tensors: list[Tensor], leaf: Path, size: int) -> bool:
    """Whether the tensors fill all of a leaf."""
    return sum(math.prod(t.shape) for t in tensors if t.leaf == leaf) == size


class Overlap(NamedTuple):
    """Where a tensor and a part of its leaf meet: part[inside] = tensor.reshape(shape)[outside].transpose(order)."""

    shape: tuple[int, ...]
    outside: tuple[slice, ...]
    order: tuple[int, ...]
    inside: tuple[slice | int, ...]


def overlap(view: View, shape: tuple[int, ...], index: tuple[slice, ...]) -> Overlap | None:
    """Where a view of a leaf and the leaf's part at `index` meet; None where they do not.

    A view takes slices of a leaf, single indices, and orders its axes anew; which, is read off the strides and the
    offset that it gives an array whose axes all have strides of their own, and which has no memory.

    Args:
      shape: of the leaf.
      index: a slice of each of its axes, from start to stop.
    """
    base = max((*shape, 1)) + 1
    strides = [8 * base**axis for axis in range(len(shape))]
    leaf = np.lib.stride_tricks.as_strided(np.empty((), np.float64), shape, strides)
    seen = view(leaf)
    offset = seen.__array_interface__["data"][0] - leaf.__array_interface__["data"][0]
    starts = [offset // stride % base for stride in strides]
    axes = [strides.index(stride) for stride in seen.strides]
    outside: list[slice] = [slice(0)] * len(axes)
    inside: list[slice | int] = [0] * len(shape)
    for axis, (part, start) in enumerate(zip(index, starts)):
        size = seen.shape[axes.index(axis)] if axis in axes else 1
        low, high = max(part.start, start), min(part.stop, start + size)
        if low >= high:
            return None
        inside[axis] = low - part.start
        if axis in axes:
            outside[axes.index(axis)] = slice(low - start, high - start)
            inside[axis] = slice(low - part.start, high - part.start)
    return Overlap(seen.shape, tuple(outside), tuple(np.argsort(axes)), tuple(inside))
