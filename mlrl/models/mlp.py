"""The transformer's feed-forward layers, and their activations."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from mlrl.types import Array


def gelu_tanh(x: Array) -> Array:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))). Reference: Hendrycks and Gimpel 2016."""
    return jax.nn.gelu(x, approximate=True)


def gelu(x: Array) -> Array:
    """x * Phi(x), with the normal distribution's own function."""
    return jax.nn.gelu(x, approximate=False)


class GatedMLP(nn.Module):
    """down(activation(gate x) * (up x)), gate and up in one product. Reference: Shazeer 2020, GLU Variants."""

    width: int
    activation: Callable[[Array], Array]
    bias: bool
    out_init_scale: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        both = nn.DenseGeneral((2, self.width), use_bias=self.bias, dtype=self.dtype, param_dtype=self.param_dtype,
                               name="gate_up")(x)  # fmt: skip
        hidden = self.activation(both[..., 0, :]) * both[..., 1, :]
        init = nn.initializers.variance_scaling(self.out_init_scale, "fan_in", "normal")
        return nn.Dense(x.shape[-1], use_bias=self.bias, dtype=self.dtype, param_dtype=self.param_dtype,
                        kernel_init=init, name="down")(hidden)  # fmt: skip


class PlainMLP(nn.Module):
    """down(activation(up x)). Reference: Vaswani et al. 2017; GPT-2."""

    width: int
    activation: Callable[[Array], Array]
    bias: bool
    out_init_scale: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = nn.Dense(self.width, use_bias=self.bias, dtype=self.dtype, param_dtype=self.param_dtype,
                          name="up")(x)  # fmt: skip
        init = nn.initializers.variance_scaling(self.out_init_scale, "fan_in", "normal")
        return nn.Dense(x.shape[-1], use_bias=self.bias, dtype=self.dtype, param_dtype=self.param_dtype,
                        kernel_init=init, name="down")(self.activation(hidden))  # fmt: skip
