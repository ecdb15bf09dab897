"""Kernels cast beforehand give what kernels cast at their products give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl.models.projections import as_multiplied
from mlrl.models.transformer import Config, Transformer, causal_mask, initialize, row_positions

SHAPE = dict(vocabulary_size=11, width=16, layers=2, heads=2, kv_heads=1, head_width=8, mlp_width=24, dtype="bfloat16")


@pytest.mark.parametrize("more", [
    {"tied_head": False, "value_head": True}, {"lora_rank": 2, "qkv_bias": True, "scan_layers": True},
    {"experts": 2, "learned_positions": 9},
], ids=str)  # fmt: skip
def test_a_model_says_the_same_by_kernels_in_the_dtype_of_products(more):
    model = Transformer(Config(**SHAPE, **more))
    params = jax.tree.map(lambda x: x + 0.01 * jax.random.normal(jax.random.key(1), x.shape),
                          initialize(model, jax.random.key(0)))  # fmt: skip
    narrow = as_multiplied(params, jnp.bfloat16)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (narrow, params)]
    assert sizes[0] < 0.7 * sizes[1]
    tokens = jnp.arange(8).reshape(1, 8)
    seen = (tokens, row_positions(tokens >= 0), causal_mask(tokens >= 0))

    def said(params):
        hidden, _ = model.apply({"params": params}, *seen)
        out = [model.apply({"params": params}, hidden, method=Transformer.logits)]
        if model.config.value_head:
            out.append(model.apply({"params": params}, hidden, method=Transformer.values))
        return out

    for one, other in zip(said(narrow), said(params), strict=True):
        np.testing.assert_array_equal(one, other)
    unchanged = as_multiplied(params, jnp.float32)
    assert all(a is b for a, b in zip(jax.tree.leaves(unchanged), jax.tree.leaves(params), strict=True))
