"""Rematerialization: the same gradients from fewer arrays kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl.models import layers, remat
from mlrl.models.transformer import Config, Transformer, causal_mask, empty_caches, initialize, row_positions

CONFIG = Config(vocabulary_size=11, width=8, layers=3, heads=4, kv_heads=2, head_width=4, mlp_width=16,
                windows=(2, 0, 0), post_norms=True, value_head=True, critic_layers=1)  # fmt: skip
SCANNED = dataclasses.replace(CONFIG, windows=(0,), scan_layers=True)
LENGTH = 32
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def kept(config, how):
    return Transformer(dataclasses.replace(config, remat=how))


@functools.cache
def params(config):
    unrolled = Transformer(dataclasses.replace(config, scan_layers=False))
    shapes = jax.eval_shape(functools.partial(initialize, unrolled), jax.random.key(0))
    rng = np.random.default_rng(0)
    return layers.stacked(jax.tree.map(lambda x: jnp.float32(0.3 * rng.normal(size=x.shape)), shapes), config)


def run(model, params, *caches):
    valid = jnp.ones((2, LENGTH), bool).at[0, :3].set(False)
    tokens = jnp.arange(2 * LENGTH).reshape(2, LENGTH) % 11
    seen = (tokens, row_positions(valid), causal_mask(valid), *caches)
    hidden, _ = model.apply({"params": params}, *seen)
    return jnp.sum(jnp.sin(hidden)) + jnp.sum(model.apply({"params": params}, *seen, method="critic_hidden")[0] ** 2)


@functools.cache
def gradient(config, how):
    return jit(jax.grad(functools.partial(run, kept(config, how))))(params(config))


@functools.cache
def residuals(config, how):
    """Shapes of what the forward pass leaves for the backward pass."""
    back = jax.eval_shape(lambda p: jax.vjp(functools.partial(run, kept(config, how)), p)[1], params(config))
    return [leaf.shape for leaf in jax.tree.leaves(back)]


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("config, how", [
    (CONFIG, remat.dots), (SCANNED, remat.full), slow(CONFIG, remat.full), slow(SCANNED, remat.dots),
], ids=["unrolled dots", "scanned full", "unrolled full", "scanned dots"])  # fmt: skip
def test_gradients_are_the_same(config, how):
    found, wanted = gradient(config, how), gradient(config, remat.none)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 + 2e-6 * float(jnp.abs(other).max()))
    assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted["mlps_0"] if "mlps_0" in wanted else
                                                                wanted["layers"])) > 0.01  # fmt: skip


@pytest.mark.parametrize("config", [CONFIG, SCANNED], ids=["unrolled", "scanned"])
def test_each_keeps_less_than_the_one_before(config):
    size = lambda how: sum(int(np.prod(shape)) for shape in residuals(config, how))
    assert size(remat.full) < 0.7 * size(remat.dots) < 0.5 * size(remat.none)
    pairs = lambda shape: shape[-2:] == (LENGTH, LENGTH) and len(shape) > 3  # a mask has three axes
    square = lambda how: [shape for shape in residuals(config, how) if pairs(shape)]
    assert square(remat.none) and not square(remat.dots) and not square(remat.full)


def over_caches(model, params, columns=LENGTH):
    """A number that depends on `columns` columns, which are read over caches that hold none but theirs."""
    valid = jnp.ones((2, columns), bool)
    tokens = jnp.arange(2 * columns).reshape(2, columns) % 11
    caches = empty_caches(model.config, 2, columns)
    hidden, _ = model.apply({"params": params}, tokens, row_positions(valid), causal_mask(valid), caches, 0)
    return jnp.sum(jnp.sin(hidden))


@pytest.mark.parametrize("config", [CONFIG, SCANNED], ids=["unrolled", "scanned"])
def test_rows_over_caches_are_differentiated_alike_and_keep_less(config):
    """As the learner's rows are, over the caches of their prompts."""
    loss = lambda how: functools.partial(over_caches, kept(config, how))  # noqa: E731
    found, wanted = (jit(jax.grad(loss(how)))(params(config)) for how in (remat.full, remat.none))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 + 2e-6 * float(jnp.abs(other).max()))

    def size(how):
        back = jax.eval_shape(lambda p: jax.vjp(loss(how), p)[1], params(config))
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(back))

    assert size(remat.full) < 0.5 * size(remat.none)


def test_decoding_computes_nothing_twice():
    said = lambda columns: str(jax.make_jaxpr(functools.partial(  # noqa: E731
        over_caches, kept(CONFIG, remat.full), columns=columns))(params(CONFIG)))  # fmt: skip
    assert "remat" in said(2) and "remat" not in said(1)


def test_the_first_parameters_are_the_same():
    first = lambda how: initialize(kept(SCANNED, how), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, first(remat.full), first(remat.none))
