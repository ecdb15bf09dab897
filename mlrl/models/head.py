"""The output head: hidden states to logits, and to what is asked of them without an array of [B,T,V].

A chunk is a run of tokens of the vocabulary. The log-sum-exp and the entropy of a position are accumulated from chunk
to chunk, with the largest logit so far taken out, so that [B,T,chunk] is all that is held; the backward pass makes the
logits of each chunk once more.

Reference: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"; Wijmans et al. 2024, "Cut Your Losses
in Large-Vocabulary Language Models" (left out: skipping blocks whose gradients round to zero).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from mlrl import axes, meshes
from mlrl.models.attention import soft_cap
from mlrl.types import Array, Refused

_NEVER = jnp.finfo(jnp.float32).min


class Head(NamedTuple):
    """How logits are made of hidden states, beside the kernel.

    temperature  divides the logits; above 0
    cap          the soft cap of logits before that; 0.0: none
    chunk        so many tokens of the vocabulary at a time; 0: all
    """

    temperature: float = 1.0
    cap: float = 0.0
    chunk: int = 0


class Kernel(nn.Module):
    """A kernel [D,V] that is not tied to the embedding; called, it gives itself."""

    shape: tuple[int, int]
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> Array:
        return self.param("kernel", nn.linear.default_kernel_init, self.shape, self.param_dtype)


def logits(hidden: Array, kernel: Array, cap: float = 0.0) -> Array:
    """soft_cap(h W^T), summed in float32. hidden [...,D], kernel [V,D], in one dtype -> [...,V].

    On a mesh every device has the whole width of its tokens for the product, as of other kernels.
    """
    kernel = meshes.split(kernel, "vocabulary")
    out = jnp.einsum("...d,vd->...v", hidden, kernel, preferred_element_type=jnp.float32)
    return soft_cap(out, cap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def chosen(hidden: Array, kernel: Array, tokens: Array, head: Head) -> tuple[Array, Array]:
    """Log-probs of given tokens, and entropies in nats, of the distributions that hidden states lead to.

    With l = soft_cap(h W^T) / temperature and z = log sum_v exp(l_v):  log p = l_token - z,  H = z - sum_v p_v l_v

    Args:
      hidden: [B,T,D].
      kernel: [V,D], in the dtype of `hidden`; V need not be a multiple of the chunk.
      tokens: [B,T] int32.
    Returns: log-probs and entropies, [B,T] float32.
    """
    return _forward(hidden, kernel, tokens, head)[0]


def likeliest(hidden: Array, kernel: Array, head: Head, count: int) -> tuple[Array, Array]:
    """The `count` likeliest tokens of every position and their log-probs: ([B,T,count] int32, float32).

    In order of probability; of equals the one with the lower id is first. No gradient is taken through it.

    Raises: Refused, if the vocabulary has fewer tokens.
    """
    if count > kernel.shape[0]:
        raise Refused(f"the {count} likeliest tokens are asked for, of a vocabulary of {kernel.shape[0]}: set "
                      "Experiment.reference_tokens to fewer, or to 0 for all")  # fmt: skip
    shape = (*hidden.shape[:-1], count)
    best = (jnp.full(shape, _NEVER), jnp.zeros(shape, jnp.int32))

    def merge(carry: tuple, chunk: Array, ids: Array) -> tuple:
        (values, found), sums = carry[:2], carry[2:]
        both = jnp.concatenate([values, chunk], axis=-1)
        ids = jnp.concatenate([found, jnp.broadcast_to(ids, chunk.shape)], axis=-1)
        top, where = lax.top_k(both, count)
        return top, jnp.take_along_axis(ids, where, axis=-1), *_add(sums, chunk)

    top, ids, most, total, _ = _over_chunks(hidden, kernel, head, merge, (*best, *_nothing_yet(hidden)))
    return ids, top - (most + jnp.log(total))[..., None]


def _forward(hidden: Array, kernel: Array, tokens: Array, head: Head) -> tuple[tuple[Array, Array], tuple]:
    def look(carry: tuple, chunk: Array, ids: Array) -> tuple:
        said, sums = carry[0], carry[1:]
        here = jnp.sum(jnp.where(ids == tokens[..., None], chunk, 0.0), axis=-1)
        return said + here, *_add(sums, chunk)

    start = (jnp.zeros(tokens.shape, jnp.float32), *_nothing_yet(hidden))
    said, most, total, weighted = _over_chunks(hidden, kernel, head, look, start)
    normalizer = most + jnp.log(total)
    entropy = normalizer - weighted / total
    return (said - normalizer, entropy), (hidden, kernel, tokens, normalizer, entropy)


def _backward(head: Head, kept: tuple, cotangents: tuple[Array, Array]) -> tuple[Array, Array, None]:
    """With p the distribution, d log p_token / dl = 1[token] - p and dH / dl = -p (log p + H)."""
    hidden, kernel, tokens, normalizer, entropy = kept
    of_log_prob, of_entropy = (x[..., None] for x in cotangents)

    def add(carry: tuple, chunk: Array, ids: Array, rows: Array, start: Array) -> tuple:
        to_hidden, to_kernel = carry
        real = chunk > _NEVER
        chunk = jnp.where(real, chunk, 0.0)
        log_p = chunk - normalizer[..., None]
        p = jnp.exp(log_p)
        slope = of_log_prob * ((ids == tokens[..., None]) - p) - of_entropy * p * (log_p + entropy[..., None])
        if head.cap:
            slope = slope * (1.0 - jnp.square(chunk * head.temperature / head.cap))
        slope = jnp.where(real, slope / head.temperature, 0.0)
        slope = slope.astype(hidden.dtype)
        to_hidden += jnp.einsum("btv,vd->btd", slope, rows, preferred_element_type=jnp.float32)
        more = jnp.einsum("btv,btd->vd", slope, hidden, preferred_element_type=jnp.float32)
        return to_hidden, _add_rows(to_kernel, more, start)

    to_kernel = meshes.split(jnp.zeros(_by_shard(kernel).shape, jnp.float32), "vocabulary", "", "width")
    zeros = jnp.zeros(hidden.shape, jnp.float32), to_kernel
    to_hidden, to_kernel = _over_chunks(hidden, kernel, head, add, zeros, with_rows=True)
    return to_hidden.astype(hidden.dtype), to_kernel.reshape(kernel.shape).astype(kernel.dtype), None


chosen.defvjp(_forward, _backward)


def _nothing_yet(hidden: Array) -> tuple[Array, Array, Array]:
    """(largest logit, sum of exp, sum of exp times logit), the latter two relative to the largest."""
    zeros = jnp.zeros(hidden.shape[:-1], jnp.float32)
    return jnp.full_like(zeros, _NEVER), zeros, zeros


def _add(sums: tuple[Array, Array, Array], chunk: Array) -> tuple[Array, Array, Array]:
    most, total, weighted = sums
    new = jnp.maximum(most, jnp.max(chunk, axis=-1))
    powers, shrink = jnp.exp(chunk - new[..., None]), jnp.exp(most - new)
    # exp(_NEVER - new) is 0, and 0 * _NEVER is -0.0: what is masked adds nothing.
    return new, total * shrink + jnp.sum(powers, -1), weighted * shrink + jnp.sum(powers * chunk, -1)


def _over_chunks(hidden: Array, kernel: Array, head: Head, function, carry: tuple, with_rows: bool = False) -> tuple:
    """carry = function(carry, logits / temperature [B,T,C], ids [C], ...) for each chunk of the vocabulary.

    A vocabulary that a mesh splits is cut within each part, so that a chunk takes some of every device's tokens. The
    last chunk ends with the vocabulary; what it shares with the one before it is masked: _NEVER, and of id -1.
    """
    parts = _by_shard(kernel)
    shards, size, _ = parts.shape
    wide = min(-(-head.chunk // shards), size) if head.chunk else size

    def visit(carry: tuple, number: Array | int) -> tuple[tuple, None]:
        first = number * wide
        start = jnp.minimum(first, size - wide)
        rows = lax.dynamic_slice_in_dim(parts, start, wide, axis=1)
        rows = meshes.split(rows, "vocabulary").reshape(shards * wide, -1)  # gathered along its width, but no more
        column = start + jnp.arange(wide)
        ids = (jnp.arange(shards)[:, None] * size + column).reshape(-1)
        new = jnp.broadcast_to(column >= first, (shards, wide)).reshape(-1)
        chunk = jnp.where(new, logits(hidden, rows, head.cap) / head.temperature, _NEVER)
        return function(carry, chunk, jnp.where(new, ids, -1), *((rows, start) if with_rows else ())), None

    count = math.ceil(size / wide)
    if count == 1:
        return visit(carry, 0)[0]
    return lax.scan(visit, carry, jnp.arange(count))[0]


def _by_shard(kernel: Array) -> Array:
    """[V,D] -> [parts, V / parts, D], with a part for each that the mesh cuts the vocabulary into."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = math.prod(mesh.shape[name] for name in axes.divided("vocabulary", kernel.shape[0], mesh))
    return kernel.reshape(shards, kernel.shape[0] // shards, kernel.shape[1])


def _add_rows(total: Array, more: Array, start: Array) -> Array:
    """Adds [parts * C, D] to the rows of [parts, V / parts, D] from `start` on."""
    more = more.reshape(total.shape[0], -1, total.shape[2])
    more = meshes.split(more, "vocabulary", "", "width")  # so that no device sums the gradient of the whole kernel
    there = lax.dynamic_slice_in_dim(total, start, more.shape[1], axis=1)
    return lax.dynamic_update_slice_in_dim(total, there + more, start, axis=1)
