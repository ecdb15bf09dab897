"""The transformer's feed-forward layers, and their activations."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from mlrl.models.projections import float_dtype, stored, to_float
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
    project: Callable[..., nn.Module]  # (features, name=, ...) -> a Projection

    @nn.compact
    def __call__(self, x: Array) -> Array:
        both = self.project((2, self.width), use_bias=self.bias, name="gate_up")(x)
        hidden = self.activation(both[..., 0, :]) * both[..., 1, :]
        init = nn.initializers.variance_scaling(self.out_init_scale, "fan_in", "normal")
        return self.project(x.shape[-1:], use_bias=self.bias, kernel_init=init, name="down")(hidden)


class PlainMLP(nn.Module):
    """down(activation(up x)). Reference: Vaswani et al. 2017; GPT-2."""

    width: int
    activation: Callable[[Array], Array]
    bias: bool
    out_init_scale: float
    project: Callable[..., nn.Module]  # (features, name=, ...) -> a Projection

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = self.activation(self.project((self.width,), use_bias=self.bias, name="up")(x))
        init = nn.initializers.variance_scaling(self.out_init_scale, "fan_in", "normal")
        return self.project(x.shape[-1:], use_bias=self.bias, kernel_init=init, name="down")(hidden)


class ExpertsMLP(nn.Module):
    """Gated MLPs of which each token passes a few: the likeliest by a softmax over a linear router, in fp32.

    out = sum over the `per_token` likeliest e of  p_e * down_e(activation(gate_e x) * (up_e x)),
    p divided by the sum of the chosen ones if `renormalized`. There is no capacity: no token is dropped. No loss that
    balances the experts is added. In int8 the kernels of a layer are widened, all experts', where they are used.

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
        gate_up = self.param("gate_up", stored(init, (1,)), (self.experts, d, 2, self.width), self.param_dtype)
        down = self.param("down", stored(out_init, (1,)), (self.experts, self.width, d), self.param_dtype)
        rows = x.reshape(-1, d).astype(self.dtype)
        logits = nn.Dense(self.experts, use_bias=False, dtype=self.dtype, param_dtype=float_dtype(self.param_dtype),
                          name="router")(rows)  # fmt: skip
        weights, chosen = lax.top_k(nn.softmax(logits.astype(jnp.float32)), self.per_token)  # [N, per_token]
        if self.renormalized:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        # Each expert's rows follow each other, so that one ragged product serves them all.
        order = jnp.argsort(chosen.reshape(-1))
        row, sizes = order // self.per_token, jnp.bincount(chosen.reshape(-1), length=self.experts)
        both = lax.ragged_dot(rows[row], to_float(gate_up, self.dtype).reshape(self.experts, d, -1), sizes)
        gate, up = jnp.split(both, 2, axis=-1)
        out = lax.ragged_dot(self.activation(gate) * up, to_float(down, self.dtype), sizes)
        out = out * weights.reshape(-1)[order][:, None].astype(out.dtype)
        return jnp.zeros_like(rows).at[row].add(out).reshape(x.shape)
