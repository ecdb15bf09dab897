"""The transformer's parts, by hand: norms, activations, windows, caps, stretched rotary positions."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl.generation import generate
from mlrl.models import rope
from mlrl.models.attention import attend, soft_cap, within_window
from mlrl.models.mlp import ExpertsMLP, PlainMLP, gelu, gelu_tanh
from mlrl.models.norms import LayerNorm, OffsetRMSNorm, RMSNorm
from mlrl.models.projections import Projection
from mlrl.models.transformer import Config, Transformer, causal_mask, initialize, row_positions
from mlrl.scoring import score
from mlrl.types import Prompts, Refused

F32 = jnp.dtype("float32")
TINY = dict(vocabulary_size=7, width=8, layers=2, heads=2, kv_heads=1, head_width=4, mlp_width=6)


@pytest.mark.parametrize(
    "norm, params, expected",
    [
        (RMSNorm, {"scale": [1.0, 2.0]}, [3 / 5, 8 / 5]),  # root mean square of (3, 4) is 5 / sqrt 2
        (OffsetRMSNorm, {"scale": [0.0, 1.0]}, [3 / 5, 8 / 5]),
        (LayerNorm, {"scale": [1.0, 2.0], "bias": [0.5, 0.5]}, [-0.5 / math.sqrt(2), 2.5 / math.sqrt(2)]),
    ],
)
def test_norms(norm, params, expected):
    params = jax.tree.map(jnp.float32, params, is_leaf=lambda x: isinstance(x, list))
    apply = lambda x: norm(0.0, F32).apply({"params": params}, x) / math.sqrt(2)
    x = jnp.float32([3.0, 4.0])
    for run in (apply, jax.jit(apply)):
        np.testing.assert_allclose(run(x), expected, rtol=1e-6)
    assert apply(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("norm", [RMSNorm, OffsetRMSNorm, LayerNorm])
def test_a_norm_begins_as_the_plain_one(norm):
    x = jnp.float32([[1.0, -1.0], [-2.0, 2.0]])
    out, _ = norm(0.0, F32).init_with_output(jax.random.key(0), x)
    np.testing.assert_allclose(out, jnp.sign(x), rtol=1e-6)


def test_activations():
    """Phi(1) is 0.841345; the tanh form is off by 1.5e-4 there."""
    np.testing.assert_allclose(gelu(jnp.float32(1.0)), 0.841345, rtol=1e-6)
    np.testing.assert_allclose(gelu_tanh(jnp.float32(1.0)), 0.841192, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(gelu)(1.0), 1.083316, rtol=1e-6)


def test_a_plain_mlp_by_hand():
    params = {"up": {"kernel": jnp.float32([[1.0, -1.0]]), "bias": jnp.float32([0.0, 1.0])},
              "down": {"kernel": jnp.float32([[2.0], [3.0]]), "bias": jnp.float32([5.0])}}  # fmt: skip
    mlp = PlainMLP(2, jax.nn.relu, True, 1.0, functools.partial(Projection, dtype=F32, param_dtype=F32))
    assert mlp.apply({"params": params}, jnp.float32([[2.0]])).tolist() == [[9.0]]  # relu(2, -1) = 2, 0
    assert mlp.apply({"params": params}, jnp.float32([[-2.0]])).tolist() == [[14.0]]  # relu(-2, 3) = 0, 3


@pytest.mark.parametrize("per_token, renormalized", [(2, True), (3, False)])
def test_experts_are_a_weighted_sum_of_the_likeliest(per_token, renormalized):
    """Beside every expert applied to every token, and weighted by 0 where it was not chosen; gradients too."""
    experts = ExpertsMLP(4, 3, per_token, renormalized, jax.nn.silu, 1.0, F32, F32)
    x = jax.random.normal(jax.random.key(1), (2, 5, 6))
    params = experts.init(jax.random.key(0), x)["params"]

    def dense(params, x):
        p = jax.nn.softmax(x @ params["router"]["kernel"])
        p = jnp.where(p >= jnp.sort(p, axis=-1)[..., -per_token, None], p, 0.0)
        p = p / jnp.sum(p, axis=-1, keepdims=True) if renormalized else p
        gate, up = (jnp.einsum("bld,edm->blem", x, params["gate_up"][:, :, j]) for j in range(2))
        return jnp.einsum("ble,blem,emd->bld", p, jax.nn.silu(gate) * up, params["down"])

    def both(f):
        return jax.jit(jax.value_and_grad(lambda params, x: jnp.sum(jnp.sin(f(params, x))), argnums=(0, 1)))(params, x)

    found, wanted = both(lambda params, x: experts.apply({"params": params}, x)), both(dense)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, wanted)


def test_a_soft_cap_bounds_and_leaves_small_numbers():
    np.testing.assert_allclose(soft_cap(jnp.float32([1e9, 1e-3, 3.0]), 2.0), [2.0, 1e-3, 2 * math.tanh(1.5)], rtol=1e-6)
    assert soft_cap(jnp.float32(1e9), 0.0) == jnp.float32(1e9)
    assert jax.grad(soft_cap)(0.0, 2.0) == 1.0


def test_capped_attention_by_hand():
    """Logits 0 and 2 under a cap of 1: weights 1 : exp(tanh 2)."""
    queries, keys = jnp.ones((1, 1, 1, 1, 1)), jnp.float32([0.0, 4.0]).reshape(1, 1, 1, 2)
    values, mask = jnp.float32([0.0, 1.0]).reshape(1, 1, 2, 1), jnp.ones((1, 1, 2), bool)
    share = lambda logit: math.exp(logit) / (1 + math.exp(logit))
    for cap, logit in ((1.0, math.tanh(2.0)), (0.0, 2.0)):
        out = attend(queries, keys, values, mask, scale=0.5, cap=cap)
        np.testing.assert_allclose(out.item(), share(logit), rtol=1e-6)


def test_a_window_counts_tokens_and_not_padding():
    valid = jnp.asarray([[False, True, True, False, True, True]])
    mask = causal_mask(valid)
    found = within_window(mask, 2)[0].astype(int).tolist()
    assert found[1:3] + found[4:] == [
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 1, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]
    assert (within_window(mask, 0) == mask).all() and (within_window(mask, 4) == mask).all()


def test_stretched_frequencies_by_hand():
    frequency = np.array([1.0, 0.01])
    np.testing.assert_allclose(rope.Linear(4.0)(frequency, 1e4)[0], [0.25, 0.0025])
    # 2 pi 100 tokens: 100 and 1 turns; keep 1 above 4 turns, 0 below 1, and (2.5 - 1) / 3 at 2.5.
    original = 2 * math.pi * 100
    found, magnitude = rope.Llama3(8.0, 1.0, 4.0, original)(np.array([1.0, 0.01, 0.025]), 1e4)
    np.testing.assert_allclose(found, [1.0, 0.01 / 8, 0.025 * (0.5 + 0.5 / 8)])
    assert magnitude == 1.0
    # theta 10^4 over 4 frequencies: index(turns) = log10(100 / turns), 100 turns at 0, 1 turn at 2: ramp 0, 1/2, 1, 1.
    yarn = rope.Yarn(4.0, original, 1.2, fast_turns=100.0, slow_turns=1.0, whole_indices=False)
    found, magnitude = yarn(np.array([1.0, 0.1, 0.01, 0.001]), 1e4)
    np.testing.assert_allclose(found, [1.0, 0.1 * (0.5 + 0.125), 0.01 / 4, 0.001 / 4])
    assert magnitude == 1.2


def test_rotation_depends_on_distance_only_and_carries_the_magnitude():
    x = jax.random.normal(jax.random.key(0), (1, 2, 4))
    at = lambda *p: rope.rotary(x, jnp.asarray([p]), theta=100.0, scaling=rope.Yarn(2.0, 64, 1.5))
    product = lambda y: float(jnp.sum(y[0, 0] * y[0, 1]))
    assert product(at(0, 3)) == pytest.approx(product(at(5, 8)), rel=1e-4)
    assert product(at(0, 3)) != pytest.approx(product(at(5, 9)), rel=1e-2)
    np.testing.assert_allclose(jnp.linalg.norm(at(2, 7), axis=-1), 1.5 * jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    assert (rope.unrotated(x, jnp.asarray([[2, 7]])) == x).all()


FULL = Config(**TINY, windows=(2, 0), window_rope_theta=100.0, norm=OffsetRMSNorm, post_norms=True, qk_norm=True,
              activation=gelu_tanh, attention_cap=1.0, logits_cap=2.0, embedding_scale=3.0, scale_width=3)  # fmt: skip
GPT2 = Config(**TINY | dict(kv_heads=2), learned_positions=8, norm=LayerNorm, qkv_bias=True, out_bias=True,
              mlp_bias=True, gated_mlp=False, activation=gelu_tanh, tied_head=False)  # fmt: skip


def scattered(config):
    shapes = jax.eval_shape(functools.partial(initialize, Transformer(config)), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), shapes)


@pytest.mark.parametrize("config", [FULL, GPT2, Config(**TINY, experts=3)])
def test_the_cache_tells_what_the_row_tells(config):
    """Sampling over the cache records the log-probs that scoring finds, over padding and past every window."""
    model, params = Transformer(config), scattered(config)
    tokens = jnp.asarray([[0, 0, 3], [1, 5, 2]])
    prompts = Prompts(tokens, jnp.asarray([[False, False, True], [True] * 3]), jnp.arange(2), jnp.arange(2), ())
    sample = jax.jit(functools.partial(generate, model, max_completion_tokens=5, eos_ids=(), pad_id=0, group_size=2))
    rollout = sample(params, prompts, jax.random.key(0))
    scores = jax.jit(functools.partial(score, model))(params, rollout)
    assert rollout.action_mask.sum() == 20
    np.testing.assert_allclose(
        np.where(rollout.action_mask, scores.log_probs, 0.0), rollout.behavior_log_probs, atol=1e-5
    )


@pytest.mark.parametrize(
    "config, fields",
    [(FULL, dict(windows=(0,), window_rope_theta=100.0)), (FULL, dict(window_rope_theta=0.0)),
     (FULL, dict(qk_norm=False)), (FULL, dict(post_norms=False)), (FULL, dict(embedding_scale=1.0)),
     (FULL, dict(attention_cap=0.0)), (FULL, dict(logits_cap=0.0)), (FULL, dict(scale_width=0)),
     (GPT2, dict(qkv_bias=False)), (GPT2, dict(out_bias=False)), (GPT2, dict(mlp_bias=False))],
)  # fmt: skip
def test_each_field_does_something(config, fields):
    params = scattered(config)
    valid = jnp.ones((1, 6), bool)

    def logits(c):  # operation by operation: most are compiled already
        model = Transformer(c)
        hidden, _ = model.apply({"params": params}, jnp.arange(6)[None], row_positions(valid), causal_mask(valid))
        return model.apply({"params": params}, hidden, method=Transformer.logits)

    assert jnp.abs(logits(config) - logits(dataclasses.replace(config, **fields))).max() > 1e-3


def test_rows_beyond_the_table_of_positions_are_refused():
    params, valid = scattered(GPT2), jnp.ones((1, 9), bool)
    with pytest.raises(Refused, match="9 columns, but Config.learned_positions is 8"):
        Transformer(GPT2).apply({"params": params}, jnp.zeros((1, 9), int), row_positions(valid), causal_mask(valid))


@pytest.mark.parametrize(
    "fields, words",
    [(dict(experts=2, experts_per_token=3), "Config.experts_per_token"), (dict(experts=2, mlp_bias=True), "no biases"),
     (dict(windows=()), "Config.windows"), (dict(windows=[4]), "must be a tuple"),
     (dict(windows=(-1,)), "Config.windows"),
     (dict(remat="full"), "Config.remat must be a function, as those of mlrl.models.remat, got 'full'"),
     (dict(attention="splash"), "mlrl.models.attention or mlrl.models.fused, got 'splash'"),
     (dict(scale_width=-1), "Config.scale_width"), (dict(head_width=3), "must be even")],
)  # fmt: skip
def test_shapes_that_cannot_be_are_refused(fields, words):
    with pytest.raises(Refused, match=words):
        Config(**TINY | fields)
    Config(**TINY | dict(head_width=3), learned_positions=4)
