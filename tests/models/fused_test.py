"""Attention through fused kernels equals plain attention, in values and gradients, over padding, holes and windows."""

import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl import meshes
from mlrl.models import fused
from mlrl.models.attention import attend, within_window
from mlrl.models.transformer import Config, Transformer, causal_mask, initialize, row_positions

K, H, WIDTH = 2, 3, 8
SPLASH = functools.partial(fused.splash, interpret=True)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def given(length, window=0):
    """Queries, keys and values of rows that are padded left, right and in the middle, or not at all."""
    kinds = jax.random.split(jax.random.key(length), 3)
    q = jax.random.normal(kinds[0], (4, length, K, H, WIDTH))
    k = jax.random.normal(kinds[1], (4, K, WIDTH, length))
    v = jax.random.normal(kinds[2], (4, K, length, WIDTH))
    valid = np.ones((4, length), bool)
    valid[0, : length // 3] = valid[1, -length // 4 :] = valid[2, 4:9] = valid[2, :2] = False
    return (q, k, v), within_window(causal_mask(jnp.asarray(valid)), window), valid


def through_cudnn_s_arguments(q, k, v, mask, *, scale, cap, window):
    kernel = functools.partial(fused._dot_product, scale=scale, window=window, implementation="xla")
    return fused._on_valid_tokens(kernel, q, k, v, mask)


def both(attention, arrays, mask, valid, **how):
    """What valid tokens get, and gradients of a function of it. Logits are large, so that no weights are even."""
    def loss(arrays):
        out = jnp.where(valid[:, :, None, None, None], attention(*arrays, mask, scale=1.0, **how), 0.0)
        return jnp.sum(jnp.sin(3.0 * out)), out

    (_, out), gradient = jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return out, *gradient


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("attention, length, window, cap", [
    (SPLASH, 20, 4, 0.0), (SPLASH, 300, 150, 3.0), (through_cudnn_s_arguments, 20, 4, 0.0),
    slow(SPLASH, 20, 0, 0.0), slow(SPLASH, 20, 0, 2.0), slow(through_cudnn_s_arguments, 20, 0, 0.0),
])  # fmt: skip
def test_a_kernel_equals_plain_attention(attention, length, window, cap):
    arrays, mask, valid = given(length, window)
    found = both(attention, arrays, mask, valid, cap=cap, window=window)
    wanted = both(attend, arrays, mask, valid, cap=cap, window=window)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)
        assert jnp.abs(other).max() > 0.5
    other_window = both(attend, arrays, within_window(mask, 2), valid, cap=cap, window=2)
    assert jnp.abs(other_window[0] - wanted[0]).max() > 0.1, "a window does something here"


def test_a_kernel_is_run_by_each_device_on_its_rows_and_heads():
    arrays, mask, valid = given(20, 4)
    how = dict(cap=2.0, window=4)
    alone = both(attend, arrays, mask, valid, **how)
    with meshes.use(meshes.mesh(data=2, fsdp=2, tensor=2)):
        for one, other in zip(both(SPLASH, arrays, mask, valid, **how), alone, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("window, cap, sizes", [
    slow(0, 0.0, dict(data=1, sequence=4, tensor=2)), (150, 2.0, dict(data=2, sequence=2)),
], ids=str)  # fmt: skip
def test_a_mesh_may_split_the_queries_of_a_row(window, cap, sizes):
    arrays, mask, valid = given(512, window)
    how = dict(cap=cap, window=window)
    alone = both(attend, arrays, mask, valid, **how)
    with meshes.use(meshes.mesh(**sizes, devices=int(np.prod(list(sizes.values()))))):
        assert fused._sequence_parts(512) == sizes["sequence"]
        assert fused._sequence_parts(500) == 1, "no whole blocks"
        for one, other in zip(both(SPLASH, arrays, mask, valid, **how), alone, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=5e-5)


def test_the_kernel_is_chosen_by_the_platform(monkeypatch):
    for name in ("attend", "splash", "cudnn"):
        monkeypatch.setattr(fused, name, lambda *arrays, name=name, **how: name)
    q, mask = jnp.ones((1, 256, 1, 1, 8)), jnp.ones((1, 256, 256), bool)
    choose = lambda **how: fused.by_platform(q, (), (), mask, scale=1.0, **how)
    assert choose() == "attend"
    for platform, wanted in (("tpu", "splash"), ("gpu", "cudnn"), ("cpu", "attend")):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        assert choose() == wanted and choose(min_columns=257) == "attend"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with meshes.use(meshes.mesh(devices=1)):
        assert choose() == "attend", "the mesh is of CPUs, whatever the default is"


def test_splash_is_lowered_for_a_tpu():
    """As far as JAX does that without one: one kernel forward, two backward, whatever the length and the width."""
    for length, width, how in ((300, 128, dict(window=200, cap=5.0)), (1024, 64, {})):
        def loss(q, k, v, length=length, how=how):
            mask = causal_mask(jnp.ones((1, length), bool))
            return jnp.sum(fused.splash(q, k, v, mask, scale=0.1, **how).astype(jnp.float32))

        shapes = ((1, length, 2, 4, width), (1, 2, width, length), (1, 2, length, width))
        given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
        lowered = jax.export.export(jax.jit(jax.grad(loss, argnums=(0, 1, 2))), platforms=["tpu"])(*given)
        assert lowered.mlir_module().count("tpu_custom_call") == 3


def test_what_cudnn_lacks_goes_through_plain_attention():
    arrays, mask, _ = given(20)
    for dtype, cap in ((jnp.float32, 0.0), (jnp.bfloat16, 2.0)):
        cast = [x.astype(dtype) for x in arrays]
        found = fused.cudnn(*cast, mask, scale=0.5, cap=cap)
        np.testing.assert_array_equal(found, attend(*cast, mask, scale=0.5, cap=cap))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_model_attends_through_it_where_there_is_no_cache(scan_layers):
    config = Config(vocabulary_size=11, width=8, layers=4, heads=4, kv_heads=2, head_width=4, mlp_width=6,
                    windows=(3, 0), attention_cap=2.0, scan_layers=scan_layers)  # fmt: skip
    params = initialize(Transformer(config), jax.random.key(0))
    params = jax.tree.map(lambda x: x * 3.0, params)
    valid = jnp.ones((2, 12), bool).at[0, :3].set(False).at[1, 5:7].set(False)
    seen = (jnp.arange(24).reshape(2, 12) % 11, row_positions(valid), causal_mask(valid))
    hidden = lambda config: jit(lambda p: Transformer(config).apply({"params": p}, *seen)[0])(params)
    found, wanted = hidden(dataclasses.replace(config, attention=SPLASH)), hidden(config)
    np.testing.assert_allclose(found[valid], wanted[valid], atol=1e-4)
    assert (found != wanted).any()
