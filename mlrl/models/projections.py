"""The transformer's matrix products: kernels that are trained, or frozen in a narrow dtype under a low-rank adapter."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from mlrl.types import Array, Params

Int8 = dict[str, Array]  # {"int8": integers from -127 to 127, "scale": float32, of length 1 in each axis summed over}
Kernel = Array | Int8
LOW_RANK = ("lora_a", "lora_b")  # the two factors of an adapter, by name in its projection


class Projection(nn.Module):
    """y = x W + bias + s (x A) B over the last axes of x; B begins at zero, and so the product as x W + bias.

    A is [in, rank], B is [rank, out] and s = alpha / rank; they are float32. In W, several axes may be summed over, and
    several may come out: a fused kernel (queries, keys and values; gate and up) has one adapter, of one rank.

    features      the axes of y in place of those summed over
    summed        how many of the last axes of x are summed over
    param_dtype   of W: float32, bfloat16 or int8 (see `to_int8`); of the bias float_dtype(param_dtype)
    rank, alpha   of the adapter; rank 0: none. s lies beside it, so that a checkpoint says what A and B mean

    Reference: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
    """

    features: tuple[int, ...]
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    summed: int = 1
    use_bias: bool = False
    kernel_init: Callable[..., Array] = nn.linear.default_kernel_init
    rank: int = 0
    alpha: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.astype(self.dtype)
        into = x.shape[x.ndim - self.summed :]
        axes = tuple(range(self.summed))
        first = functools.partial(_flat, self.kernel_init, self.summed)
        kernel = self.param("kernel", stored(first, axes), (*into, *self.features), self.param_dtype)
        y = product(x, kernel, self.summed)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features, float_dtype(self.param_dtype))
            y = y + bias.astype(self.dtype)
        if self.rank:
            a, b = LOW_RANK
            spread = functools.partial(_flat, nn.initializers.lecun_normal(), self.summed)
            down = self.param(a, spread, (*into, self.rank), jnp.float32)
            up = self.param(b, nn.initializers.zeros, (self.rank, *self.features), jnp.float32)
            scale = self.param("lora_scale", nn.initializers.constant(self.alpha / self.rank), (), jnp.float32)
            y = y + product(product(x, down, self.summed) * scale.astype(self.dtype), up, 1)
        return y


def product(x: Array, kernel: Kernel, summed: int) -> Array:
    """x W over the last `summed` axes of x and the first of W, in the dtype of x.

    An int8 kernel is multiplied as integers, and the products of an output by its scale. It is widened in the forward
    pass and again in the backward pass, which keeps only the integers between the two.
    """
    if isinstance(kernel, dict):
        return _scaled_product(x, kernel["int8"], kernel["scale"], summed)
    return lax.dot_general(x, kernel.astype(x.dtype), _last_and_first(x, summed))


@functools.partial(jax.checkpoint, static_argnums=3)
def _scaled_product(x: Array, integers: Array, scale: Array, summed: int) -> Array:
    y = lax.dot_general(x, integers.astype(x.dtype), _last_and_first(x, summed), preferred_element_type=jnp.float32)
    return (y * scale.reshape(scale.shape[summed:])).astype(x.dtype)


def _last_and_first(x: Array, summed: int) -> tuple:
    return (tuple(range(x.ndim - summed, x.ndim)), tuple(range(summed))), ((), ())


@functools.partial(jax.jit, static_argnums=1)
def to_int8(kernel: Array, summed: tuple[int, ...]) -> Int8:
    """A kernel in 8 bits: symmetric, one scale for each output.

    scale = max |w| / 127 over the axes summed over;  integer = round(w / scale), so that |w - integer * scale| <=
    scale / 2 for every weight.

    Args:
      kernel: weights, of any floating-point dtype.
      summed: the axes that a product sums over.
    """
    wide = kernel.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=summed, keepdims=True) / 127.0
    integers = jnp.round(wide / jnp.where(scale > 0, scale, 1.0))
    return {"int8": integers.astype(jnp.int8), "scale": scale}


def to_float(kernel: Kernel, dtype: jnp.dtype) -> Array:
    """The weights of a kernel in a floating-point dtype, all at once."""
    if isinstance(kernel, dict):
        return (kernel["int8"].astype(jnp.float32) * kernel["scale"]).astype(dtype)
    return kernel.astype(dtype)


def as_multiplied(params: Params, dtype: jnp.dtype) -> Params:
    """Parameters with every kernel and embedding in the dtype of products, to which each is cast before it is used: a
    model says the same by them. Norms, value heads, biases and adapters stay as they are.
    """

    def cast(path: tuple, x: Array) -> Array:
        names = [str(getattr(part, "key", part)) for part in path]
        multiplied = names[-1] in ("kernel", "embedding", "gate_up", "down") and not {"value", "critic"} & set(names)
        return x.astype(dtype) if multiplied and jnp.dtype(dtype).itemsize < x.dtype.itemsize else x

    return jax.tree_util.tree_map_with_path(cast, params)


def float_dtype(param_dtype: jnp.dtype | str) -> jnp.dtype:
    """The dtype of what no kernel holds (embeddings, norms, biases, the output head): bfloat16 beside int8."""
    return jnp.dtype("bfloat16") if jnp.dtype(param_dtype) == jnp.int8 else jnp.dtype(param_dtype)


def stored(init: Callable[..., Array], summed: tuple[int, ...]) -> Callable[..., Kernel]:
    """An initializer (key, shape, dtype) whose dtype may also be int8."""

    def first(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Kernel:
        if dtype == jnp.int8:
            return to_int8(init(key, shape, jnp.float32), summed)
        return init(key, shape, dtype)

    return first


def _flat(init: Callable[..., Array], summed: int, key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """An initializer of matrices [in, out] for kernels whose first `summed` axes are `in`."""
    return init(key, (math.prod(shape[:summed]), math.prod(shape[summed:])), dtype).reshape(shape)
