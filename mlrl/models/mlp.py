"""The transformer's feed-forward layers, and their activations."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

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


class ExpertsMLP(nn.Module):
    """Gated MLPs of which each token passes a few: the likeliest by a softmax over a linear router, in fp32.

    out = sum over the `per_token` likeliest e of  p_e * down_e(activation(gate_e x) * (up_e x)),
    p divided by the sum of the chosen ones if `renormalized`. There is no capacity: no token is dropped. No loss that
    balances the experts is added.

    Reference: Shazeer et al. 2017; Jiang et al. 2024, Mixtral.
    """

    width: int
    experts: int
    per_token: int
    renormalized: bool
    activation: Callable[[Array], Array]
    out_init_scale: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        d, fan_in = x.shape[-1], {"batch_axis": 0, "in_axis": 1}
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", out_axis=(2, 3), **fan_in)
        out_init = nn.initializers.variance_scaling(self.out_init_scale, "fan_in", "normal", out_axis=2, **fan_in)
        gate_up = self.param("gate_up", init, (self.experts, d, 2, self.width), self.param_dtype)
        down = self.param("down", out_init, (self.experts, self.width, d), self.param_dtype)
        rows = x.reshape(-1, d).astype(self.dtype)
        logits = nn.Dense(self.experts, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype,
                          name="router")(rows)  # fmt: skip
        weights, chosen = lax.top_k(nn.softmax(logits.astype(jnp.float32)), self.per_token)  # [N, per_token]
        if self.renormalized:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        # Each expert's rows follow each other, so that one ragged product serves them all.
        order = jnp.argsort(chosen.reshape(-1))
        row, sizes = order // self.per_token, jnp.bincount(chosen.reshape(-1), length=self.experts)
        both = lax.ragged_dot(rows[row], gate_up.astype(self.dtype).reshape(self.experts, d, -1), sizes)
        gate, up = jnp.split(both, 2, axis=-1)
        out = lax.ragged_dot(self.activation(gate) * up, down.astype(self.dtype), sizes)
        out = out * weights.reshape(-1)[order][:, None].astype(out.dtype)
        return jnp.zeros_like(rows).at[row].add(out).reshape(x.shape)
