"""Adapters over a frozen base: their values and gradients, what is frozen, int8 weights, and both merged into one."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mlrl.generation import generate
from mlrl.models import lora, projections
from mlrl.models.mlp import gelu_tanh
from mlrl.models.norms import LayerNorm
from mlrl.models.projections import Projection
from mlrl.models.transformer import Config, Transformer, initialize, plain, without_adapters
from mlrl.scoring import score
from mlrl.types import Prompts, Refused, Rollout

F32 = jnp.dtype("float32")
TINY = dict(vocabulary_size=11, width=12, layers=1, heads=4, kv_heads=2, head_width=6, mlp_width=10)
ADAPTERS = dict(lora_rank=3, lora_alpha=6.0)
LORA = Config(**TINY, **ADAPTERS, value_head=True)
MODEL = Transformer(LORA)
GPT2 = Config(**TINY | dict(kv_heads=4), **ADAPTERS, learned_positions=9, norm=LayerNorm, qkv_bias=True, out_bias=True,
              mlp_bias=True, gated_mlp=False, activation=gelu_tanh, tied_head=False)  # fmt: skip
EXPERTS = Config(**TINY, **ADAPTERS, experts=3)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time
B, L = 3, 8


@functools.cache
def rows():
    tokens = np.random.default_rng(0).integers(0, 11, (B, L)).astype(np.int32)
    ones, zeros = np.ones((B, L), bool), np.zeros((B,), np.int32)
    return Rollout(tokens, ones, ones, np.zeros((B, L), np.float32), np.zeros((B, L), np.int32), zeros, zeros,
                   np.zeros((B,), bool), zeros).check()  # fmt: skip


@functools.cache
def params(config=LORA):
    """Parameters as after training: adapters that do something, norms and biases that are not what they began as."""
    rng = np.random.default_rng(1)

    def moved(path, x):
        given = x.dtype == jnp.int8 or path[-1] in ("lora_scale", "scale")
        return x if given else jnp.asarray(x + 0.2 * rng.normal(size=x.shape), x.dtype)

    first = traverse_util.flatten_dict(jit(functools.partial(initialize, Transformer(config)))(jax.random.key(3)))
    return traverse_util.unflatten_dict({path: moved(path, x) for path, x in first.items()})


@functools.cache
def told(config=LORA):
    return jit(functools.partial(score, Transformer(config), with_logits=True))(params(config), rows())


@pytest.mark.parametrize("features, summed", [((5,), 1), ((2, 5), 1), ((7,), 2)])
def test_without_an_adapter_a_projection_is_flax_s_bit_by_bit(features, summed):
    x = jax.random.normal(jax.random.key(1), (3, 4, 6))
    ours = Projection(features, F32, F32, summed=summed, use_bias=True)
    theirs = nn.DenseGeneral(features, axis=tuple(range(-summed, 0)))
    for one, other in zip(ours.init_with_output(jax.random.key(0), x), theirs.init_with_output(jax.random.key(0), x)):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_an_adapter_by_hand():
    """x = (1, 2), W = I, A = (3, 1)^T, B = (5, 7), alpha / rank = 1/2: x A = 5, so y = (1, 2) + 5/2 (5, 7)."""
    kernel = {"kernel": jnp.eye(2), "lora_a": jnp.float32([[3.0], [1.0]]), "lora_b": jnp.float32([[5.0, 7.0]]),
              "lora_scale": jnp.float32(0.5)}  # fmt: skip
    found = Projection((2,), F32, F32, rank=1, alpha=0.5).apply({"params": kernel}, jnp.float32([1.0, 2.0]))
    np.testing.assert_allclose(found, [13.5, 19.5])
    made = Projection((2,), F32, F32, rank=4, alpha=6.0).init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    assert made["lora_scale"] == 1.5 and not made["lora_b"].any() and made["lora_a"].std() > 0.1


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("config", [slow(LORA), GPT2, dataclasses.replace(EXPERTS, param_dtype="int8")])
def test_a_new_adapter_changes_nothing_bit_by_bit(config):
    """Neither the base's first weights nor a logit of them."""
    model = Transformer(config)
    off = without_adapters(model)
    both = jit(lambda key: (initialize(model, key), initialize(off, key)))(jax.random.key(0))
    with_adapters, alone = (traverse_util.flatten_dict(tree) for tree in both)
    assert with_adapters.keys() > alone.keys()
    for path, leaf in alone.items():
        np.testing.assert_array_equal(with_adapters[path], leaf)
    said = jit(lambda p: [score(m, p, rows(), with_logits=True).logits for m in (model, off)])(both[0])
    np.testing.assert_array_equal(*said)


def test_adapters_off_are_the_base_whatever_the_adapters_are():
    off = without_adapters(MODEL)
    tell = jit(lambda p: score(off, p, rows()).log_probs)
    _, base = lora.split(params())
    np.testing.assert_array_equal(tell(params()), tell(lora.join(base, {"value": params()["value"]})))
    assert jnp.abs(tell(params()) - told().log_probs).max() > 0.1


def test_what_is_trained_and_what_is_frozen():
    config = dataclasses.replace(LORA, critic_layers=1, lora_kernels=("qkv", "down"))
    whole = jax.eval_shape(functools.partial(initialize, Transformer(config)), jax.random.key(0))
    trained, frozen = lora.split(whole)
    assert set(trained) == {"critic", "attentions_0", "mlps_0"}
    assert trained["attentions_0"].keys() == {"qkv"} and trained["mlps_0"].keys() == {"down"}
    assert trained["mlps_0"]["down"].keys() == {"lora_a", "lora_b"}
    assert "lora_a" not in str(trained["critic"]) and frozen["attentions_0"].keys() == {"qkv", "out"}
    flat = [traverse_util.flatten_dict(tree) for tree in (trained, frozen, lora.join(frozen, trained), whole)]
    assert not flat[0].keys() & flat[1].keys() and flat[2].keys() == flat[3].keys()
    assert all(flat[2][path] is leaf for path, leaf in flat[3].items()), "joining copies nothing"
    no_adapters = {"embedding": 1, "value": 2}
    assert lora.split(no_adapters) == (no_adapters, ()) and lora.join((), no_adapters) is no_adapters


def test_gradients_are_those_of_the_whole_kernel_through_the_product():
    """W + s A B: dA = s dW B^T and dB = s A^T dW, with dW of the plain model whose kernels are merged."""
    trained, frozen = lora.split(params())
    whole, config = lora.merge(params(), LORA)
    value = lambda model, p: jnp.sum(jnp.sin(3.0 * score(model, p, rows()).log_probs))
    found = jit(jax.grad(lambda p: value(MODEL, lora.join(frozen, p))))(trained)
    dense = jit(jax.grad(functools.partial(value, Transformer(config))))(whole)
    checked = 0
    for module, name in (("attentions_0", "qkv"), ("attentions_0", "out"), ("mlps_0", "gate_up"), ("mlps_0", "down")):
        a, b, dw = params()[module][name]["lora_a"], params()[module][name]["lora_b"], dense[module][name]["kernel"]
        rank, into = a.shape[-1], a.size // a.shape[-1]
        a, b, dw = a.reshape(into, rank), b.reshape(rank, -1), dw.reshape(into, -1)
        for factor, wanted in (("lora_a", 2.0 * dw @ b.T), ("lora_b", 2.0 * a.T @ dw)):
            gradient = found[module][name][factor].reshape(wanted.shape)
            np.testing.assert_allclose(gradient, wanted, atol=1e-4 * float(jnp.abs(wanted).max()))
            checked += float(jnp.abs(wanted).max()) > 1e-3
    assert checked == 8


def products(jaxpr):
    """The shapes of all matrix products in a traced function, sorted: [in, out] and [out, in] are one."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.add(tuple(sorted(equation.outvars[0].aval.shape)))
        for inner in jax.core.jaxprs_in_params(equation.params):
            found |= products(inner)
    return found


def test_no_gradient_of_a_frozen_kernel_is_computed():
    trained, frozen = lora.split(params())
    value = lambda model, p: jnp.sum(score(model, p, rows()).log_probs)
    of_adapters = jax.make_jaxpr(jax.grad(lambda p: value(MODEL, lora.join(frozen, p))))(trained)
    whole, config = lora.merge(params(), LORA)
    of_all = jax.make_jaxpr(jax.grad(functools.partial(value, Transformer(config))))(whole)
    kernels = {tuple(sorted(leaf.shape)) for path, leaf in traverse_util.flatten_dict(whole).items()
               if path[-1] == "kernel" and path[0] != "value"}  # fmt: skip
    assert len(kernels) == 4 and kernels <= products(of_all.jaxpr)
    assert not kernels & products(of_adapters.jaxpr)


@pytest.mark.parametrize("config", [
    LORA, dataclasses.replace(EXPERTS, param_dtype="int8"), slow(dataclasses.replace(LORA, param_dtype="bfloat16")),
    slow(dataclasses.replace(GPT2, param_dtype="int8")),
])  # fmt: skip
def test_merged_parameters_say_the_same(config):
    whole, merged = lora.merge(params(config), config)
    assert merged == plain(config) and merged.lora_rank == 0 and merged.param_dtype == "float32"
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    first = jax.eval_shape(functools.partial(initialize, Transformer(merged)), jax.random.key(0))
    assert shapes(whole) == shapes(first)
    said = jit(functools.partial(score, Transformer(merged), with_logits=True))(whole, rows())
    np.testing.assert_allclose(said.logits, told(config).logits, atol=2e-5)
    np.testing.assert_allclose(said.values, told(config).values, atol=2e-5)
    assert lora.merge(whole, merged)[0] is whole


def test_int8_is_within_half_a_step_of_every_weight():
    kernel = np.random.default_rng(2).normal(size=(6, 5, 7)) * np.logspace(-3, 1, 7)
    kernel[:, :, 3] = 0.0
    held = projections.to_int8(jnp.float32(kernel), (0, 1))
    assert held["int8"].dtype == jnp.int8 and held["scale"].shape == (1, 1, 7)
    np.testing.assert_allclose(held["scale"][0, 0], np.abs(kernel).max(axis=(0, 1)) / 127, rtol=1e-6)
    error = np.abs(np.asarray(projections.to_float(held, F32), np.float64) - kernel)
    assert (error <= 0.5001 * np.asarray(held["scale"])).all() and error[:, :, 2].max() > 0.4 * held["scale"][0, 0, 2]
    assert not error[:, :, 3].any() and np.abs(held["int8"]).max() == 127


def test_int8_logits_are_near_those_of_the_float_base():
    """By about 0.02 nats here, of log-probs down to -4. Adapters over it stay as they are: only the base is narrower.
    """
    whole, _ = lora.merge(params(), LORA)
    narrow = Transformer(dataclasses.replace(LORA, param_dtype="int8"))
    held = lora.adapted(whole, narrow, jax.random.key(0))
    kernels = {path: x for path, x in traverse_util.flatten_dict(lora.split(held)[1]).items() if "kernel" in path}
    assert {str(x.dtype) for path, x in kernels.items() if path[-1] == "int8"} == {"int8"}
    assert held["embedding"]["embedding"].dtype == held["final_norm"]["scale"].dtype == jnp.bfloat16
    assert held["value"]["kernel"].dtype == held["mlps_0"]["down"]["lora_a"].dtype == F32
    difference = jit(functools.partial(score, narrow))(held, rows()).log_probs - told().log_probs
    assert 1e-4 < jnp.abs(difference).max() < 0.05


def test_between_forward_and_backward_int8_stays_int8():
    held = projections.to_int8(jax.random.normal(jax.random.key(0), (40, 30)), (0,))
    x = jnp.ones((2, 40))
    y, back = jax.vjp(lambda x: projections.product(x, held, 1), x)
    kept = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(back)]
    assert ((40, 30), jnp.int8) in kept and ((40, 30), F32) not in kept
    np.testing.assert_allclose(y, x @ projections.to_float(held, F32), rtol=1e-5)
    np.testing.assert_allclose(back(y)[0], y @ projections.to_float(held, F32).T, rtol=1e-4)


@pytest.mark.parametrize("param_dtype", ["float32", "int8"])
def test_the_sampler_records_what_the_learner_finds(param_dtype):
    config = dataclasses.replace(LORA, param_dtype=param_dtype)
    tokens = jnp.asarray([[0, 0, 3], [1, 5, 2]])
    prompts = Prompts(tokens, jnp.asarray([[False, False, True], [True] * 3]), jnp.arange(2), jnp.arange(2), ())
    model, weights = Transformer(config), params(config)
    sample = jit(functools.partial(generate, model, max_completion_tokens=4, eos_ids=(), pad_id=0, group_size=2))
    rollout = sample(weights, prompts, jax.random.key(0))
    found = jit(functools.partial(score, model))(weights, rollout).log_probs
    np.testing.assert_allclose(np.where(rollout.action_mask, found, 0), rollout.behavior_log_probs, atol=1e-5)


@pytest.mark.parametrize(
    "fields, words",
    [(dict(lora_kernels=("qkv",)), "names kernels, but Config.lora_rank is 0"),
     (dict(lora_rank=2, lora_kernels=("query", "out")), "names 'query', and .* are qkv, out, gate_up, down$"),
     (dict(lora_rank=2, lora_kernels=("down",), experts=2), "are qkv, out; experts have no adapters"),
     (dict(lora_rank=2, lora_kernels=("gate_up",), gated_mlp=False), "are qkv, out, up, down"),
     (dict(lora_rank=2, lora_kernels="qkv"), "must be a tuple of names"),
     (dict(lora_rank=-1), "Config.lora_rank must be a whole number"), (dict(lora_alpha=0.0), "must be above 0"),
     (dict(param_dtype="int4"), "'bfloat16' or 'int8'"), (dict(dtype="int8"), "Config.dtype must be")],
)  # fmt: skip
def test_adapters_that_cannot_be_are_refused(fields, words):
    with pytest.raises(Refused, match=words):
        Config(**TINY | fields)
