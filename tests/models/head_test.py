"""By chunks of the vocabulary, log-probs, entropies and likeliest tokens are those of the whole, and so gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl import meshes
from mlrl.models import head
from mlrl.types import Refused

B, T, D, V = 2, 3, 8, 44


def given(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (B, T, D), dtype)
    kernel = jax.random.normal(keys[1], (V, D), dtype)
    kernel = kernel.at[7].set(20.0)  # logits of hundreds: what is not taken out overflows
    tokens = jax.random.randint(keys[2], (B, T), 0, V).at[0].set(jnp.array([0, 7, V - 1]))
    return hidden, kernel, tokens, jax.random.normal(keys[3], (2, B, T))


def plainly(hidden, kernel, tokens, how):
    log_p = jax.nn.log_softmax(head.logits(hidden, kernel, how.cap) / how.temperature)
    said = jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
    return said, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def values_and_gradients(function, arrays, how):
    hidden, kernel, tokens, weights = arrays

    def total(hidden, kernel):
        said, entropy = function(hidden, kernel, tokens, how)
        return jnp.sum(weights[0] * said + weights[1] * entropy), (said, entropy)

    (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(hidden, kernel)
    return *out, *gradients


@pytest.mark.parametrize("how", [
    head.Head(chunk=V), head.Head(chunk=11), head.Head(0.7, 0.0, 16), head.Head(1.3, 5.0, 10), head.Head(chunk=1000),
], ids=str)  # fmt: skip
def test_chunks_give_the_values_and_gradients_of_the_whole(how):
    found, wanted = (values_and_gradients(f, given(), how) for f in (head.chosen, plainly))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)
    assert float(jnp.abs(wanted[3]).max()) > 0.1 and float(wanted[1].max()) > 0.1


def test_a_mesh_that_splits_the_vocabulary_changes_nothing():
    arrays, how = given(), head.Head(1.3, 5.0, 10)
    alone = values_and_gradients(head.chosen, arrays, how)
    top = head.likeliest(*arrays[:2], how, 5)
    mesh = meshes.mesh(data=2, tensor=4)
    with meshes.use(mesh):
        assert head._by_shard(arrays[1]).shape == (4, V // 4, D)
        split = jax.device_put(arrays[1], jax.NamedSharding(mesh, jax.P("tensor")))
        there = values_and_gradients(head.chosen, (arrays[0], split, *arrays[2:]), how)
        for one, other in zip(there, alone, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)
        again = jax.jit(functools.partial(head.likeliest, head=how, count=5))(arrays[0], split)
    np.testing.assert_allclose(again[1], top[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(again[0], top[0])


@pytest.mark.parametrize("chunk", [0, 10, 11])
def test_the_likeliest_tokens_are_those_of_the_whole(chunk):
    hidden, kernel, *_ = given()
    ids, log_probs = head.likeliest(hidden, kernel, head.Head(0.7, 0.0, chunk), 5)
    whole = jax.nn.log_softmax(head.logits(hidden, kernel) / 0.7)
    top, where = jax.lax.top_k(whole, 5)
    np.testing.assert_allclose(log_probs, top, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(ids, where)


def test_more_tokens_than_there_are_are_refused():
    hidden, kernel, *_ = given()
    with pytest.raises(Refused, match="the 45 likeliest tokens are asked for, of a vocabulary of 44"):
        head.likeliest(hidden, kernel, head.Head(chunk=10), V + 1)


def test_memory_does_not_grow_with_the_vocabulary():
    def temporaries(vocabulary, function, how):
        shapes = [jax.ShapeDtypeStruct(s, d) for s, d in
                  (((8, 64, 16), jnp.float32), ((vocabulary, 16), jnp.float32), ((8, 64), jnp.int32))]  # fmt: skip
        total = lambda h, k, t: sum(x.sum() for x in function(h, k, t, how))  # noqa: E731
        compiled = jax.jit(jax.grad(total)).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = (temporaries(v, head.chosen, head.Head(chunk=256)) for v in (1024, 16384))
    more_kernel = 2 * 15360 * 16 * 4  # the kernel's gradient is made too, and its copy in the loop
    assert large - small <= more_kernel
    assert temporaries(16384, plainly, head.Head()) > 4 * large


def test_products_of_bfloat16_are_summed_in_float32():
    hidden, kernel, tokens, _ = given(jnp.bfloat16)
    how = head.Head(chunk=16)
    found = head.chosen(hidden, kernel, tokens, how)
    wide = (hidden.astype(jnp.float32), kernel.astype(jnp.float32), tokens, how)
    for one, other in zip(found, plainly(*wide), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)
