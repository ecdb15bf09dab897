"""Layers that are scanned: stacked parameters and caches, and in everything else the model that is not scanned."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec as P

from mlrl import axes, meshes, optimizers
from mlrl.generation import generate
from mlrl.models import layers, lora, pretrained, projections
from mlrl.models.mlp import gelu_tanh
from mlrl.models.norms import LayerNorm, OffsetRMSNorm
from mlrl.models.transformer import (
    Config,
    Transformer,
    empty_caches,
    initialize,
    parameter_count,
    without_adapters,
)
from mlrl.scoring import score, shared_prompts
from mlrl.types import Prompts, Refused, Rollout, TrainState

TINY = dict(vocabulary_size=11, width=8, layers=3, heads=4, kv_heads=2, head_width=4, mlp_width=6)
# Five layers in periods of two: two periods, and one layer besides.
GEMMA = Config(**TINY | dict(layers=5), windows=(3, 0), window_rope_theta=100.0, norm=OffsetRMSNorm, post_norms=True,
               qk_norm=True, activation=gelu_tanh, attention_cap=5.0, scale_width=9, value_head=True)  # fmt: skip
CONFIGS = {
    "one kind of layer": Config(**TINY),
    "two kinds": GEMMA,
    "a critic": Config(**TINY, value_head=True, critic_layers=2),
    "experts": Config(**TINY, experts=3),
    "GPT-2": Config(**TINY | dict(kv_heads=4), learned_positions=9, norm=LayerNorm, qkv_bias=True, out_bias=True,
                    mlp_bias=True, gated_mlp=False, activation=gelu_tanh, tied_head=False),
    "adapters": Config(**TINY, lora_rank=2, lora_alpha=2.0, value_head=True),
    "adapters over int8": Config(**TINY, lora_rank=2, lora_alpha=2.0, param_dtype="int8", experts=2),
}  # fmt: skip
each = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def each_of(*quick):
    """All, of which make test runs those that have the parts of the others between them."""
    marks = lambda name: [pytest.mark.slow] * (name not in quick)
    return pytest.mark.parametrize("config", [
        pytest.param(config, id=name, marks=marks(name)) for name, config in CONFIGS.items()
    ])  # fmt: skip


jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def scan(config):
    return dataclasses.replace(config, scan_layers=True)


@functools.cache
def params(config):
    """Parameters of the unrolled model that are all different, as no first norms, biases and adapters are."""
    rng = np.random.default_rng(0)
    given = lambda path, x: x.dtype == jnp.int8 or path[-1].key in ("scale", "lora_scale")
    first = jit(functools.partial(initialize, Transformer(config)))(jax.random.key(0))
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x if given(path, x) else jnp.asarray(x + 0.3 * rng.normal(size=x.shape), x.dtype), first)


def prompts():
    tokens, valid = jnp.asarray([[0, 0, 3], [1, 5, 2]]), jnp.asarray([[False, False, True], [True] * 3])
    return Prompts(tokens, valid, jnp.arange(2), jnp.arange(2), ())


@functools.cache
def sampled(config):
    sample = functools.partial(generate, Transformer(config), max_completion_tokens=5, eos_ids=(), pad_id=0,
                               group_size=2)  # fmt: skip
    held = layers.stacked(params(dataclasses.replace(config, scan_layers=False)), config)
    return jit(sample)(held, prompts(), jax.random.key(1))


def close(one, other, **tolerance):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


@each
def test_stacked_parameters_are_those_of_the_scanned_model(config):
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    first = jax.eval_shape(functools.partial(initialize, Transformer(scan(config))), jax.random.key(0))
    held = layers.stacked(params(config), scan(config))
    assert shapes(held) == shapes(first) and "layers" in held
    assert not any(name.startswith(layers.LISTS) for name in held)
    assert parameter_count(scan(config)) == parameter_count(config)
    assert layers.stacked(params(config), config) == params(config)


def test_which_layers_are_scanned():
    scanned = lambda count, *windows: scan(Config(**TINY | dict(layers=count), windows=windows)).scanned
    assert scanned(4, 0) == (4, 1) and scanned(11, 3, 0) == (5, 2) and scanned(26, *[5] * 5, 0) == (4, 6)
    assert scanned(8, 0, 3, 0, 3) == (4, 2), "the shortest period"
    assert scanned(1, 0) == scanned(3, 3, 0) == scanned(4, 0, 0, 3, 3) == (0, 0), "one period is not scanned"
    assert Config(**TINY).scanned == (0, 0)
    with pytest.raises(Refused, match="scan_layers must be True or False"):
        Config(scan_layers=2)


def test_layers_are_stacked_in_the_order_of_their_numbers():
    config = scan(Config(**TINY | dict(layers=23), windows=(3, 0)))
    held = layers.stacked({"head": 0} | {f"mlps_{i}": {"x": jnp.float32(i)} for i in reversed(range(23))}, config)
    assert held["layers"]["mlps_0"]["x"].tolist() == [*range(0, 22, 2)]
    assert held["layers"]["mlps_1"]["x"].tolist() == [*range(1, 22, 2)]
    assert held["rest"] == {"mlps_0": {"x": 22.0}} and held["head"] == 0


@each_of("two kinds", "experts", "adapters over int8")
def test_a_scanned_model_scores_and_learns_as_the_unrolled_one(config):
    rollout = sampled(config)
    trained, frozen = lora.split(params(config))

    def both(config, read):
        """Scores and gradients, of whole rows or of rows over caches of their prompts."""
        model, held = Transformer(config), lambda tree: layers.stacked(tree, config)

        def loss(trained):
            tree = lora.join(held(frozen) if frozen else (), trained)
            scores = read(model, tree)
            return jnp.sum(jnp.sin(3.0 * scores.log_probs) + scores.values), scores

        (_, scores), gradient = jit(jax.value_and_grad(loss, has_aux=True))(held(trained))
        return scores, gradient

    def over_caches(model, tree):
        forward = shared_prompts()
        prepared = forward.prepare(model, tree, prompts())
        return forward.score(model, tree, prompts(), rollout, *prepared)

    whole = lambda model, tree: score(model, tree, rollout, first_column=3)
    for read in (whole, over_caches)[: 1 + config.value_head]:  # the second is as slow to compile
        wanted, wanted_gradient = both(config, read)
        found, gradient = both(scan(config), read)
        close(found, wanted, atol=3e-6, rtol=1e-6)
        wanted_gradient = layers.stacked(wanted_gradient, scan(config))
        assert jax.tree.structure(gradient) == jax.tree.structure(wanted_gradient)
        for found, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient)):
            np.testing.assert_allclose(found, wanted, atol=1e-6 + 1e-5 * float(jnp.abs(wanted).max()))
        assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient)) > 0.1


@each_of("two kinds", "GPT-2", "adapters over int8")
def test_a_scanned_model_samples_the_same_tokens(config):
    found, wanted = sampled(scan(config)), sampled(config)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.behavior_log_probs, wanted.behavior_log_probs, atol=3e-6)
    assert len(np.unique(wanted.tokens)) > 4


def test_caches_of_a_period_are_stacked():
    shapes = [[x.shape for x in pair] for pair in empty_caches(scan(GEMMA), 3, 7)]
    stacked, alone = [(2, 3, 2, 4, 7), (2, 3, 2, 7, 4)], [(3, 2, 4, 7), (3, 2, 7, 4)]
    assert shapes == [stacked, stacked, alone]


def test_every_period_begins_with_numbers_of_its_own_and_the_same_spread():
    config = Config(**TINY | dict(width=64, mlp_width=96))
    found = initialize(Transformer(scan(config)), jax.random.key(0))["layers"]
    plain = initialize(Transformer(config), jax.random.key(0))
    for name, kernel in (("attentions", "qkv"), ("attentions", "out"), ("mlps", "gate_up"), ("mlps", "down")):
        leaf = np.asarray(found[f"{name}_0"][kernel]["kernel"])
        for i in range(3):
            wanted = np.asarray(plain[f"{name}_{i}"][kernel]["kernel"])
            assert leaf[i].std() == pytest.approx(wanted.std(), rel=0.05)
            for other in leaf[:i]:
                assert abs(np.corrcoef(leaf[i].ravel(), other.ravel())[0, 1]) < 0.1
    np.testing.assert_array_equal(found["mlp_norms_0"]["scale"], np.ones((3, 64)))


def test_the_program_is_as_long_for_twelve_layers_as_for_three():
    def equations(config):
        rows = jnp.ones((2, 4), jnp.int32)
        one, ones = rows[:, 0], rows > 0
        rollout = Rollout(rows, ones, ones, 0.0 * rows, rows, one, one, one > 0, one)
        shapes = jax.eval_shape(functools.partial(initialize, Transformer(config)), jax.random.key(0))
        return len(str(jax.make_jaxpr(functools.partial(score, Transformer(config)))(shapes, rollout)).splitlines())

    three, twelve = Config(**TINY), Config(**TINY | dict(layers=12))
    assert equations(scan(twelve)) == equations(scan(three)) < equations(three) < 0.5 * equations(twelve)


def test_the_first_axis_of_stacked_parameters_is_never_split():
    config = scan(dataclasses.replace(GEMMA, layers=9, width=16, head_width=8, mlp_width=24, critic_layers=4))
    state = jax.eval_shape(lambda: state_of(initialize(Transformer(config), jax.random.key(0))))
    found = meshes.state_shardings(state, meshes.mesh(data=2, fsdp=2, tensor=2))
    spec = jax.tree.map(lambda sharding: sharding.spec, found)
    for trunk in (spec.params, spec.params["critic"]):
        held = trunk["layers"]
        assert held["attentions_1"]["qkv"]["kernel"] == P(None, "fsdp", "tensor")
        assert held["attentions_0"]["out"]["kernel"] == P(None, "tensor", None, None, "fsdp")
        assert held["mlps_0"]["down"]["kernel"] == P(None, "tensor", "fsdp")
        assert held["attention_norms_0"]["scale"] == P()
    assert spec.params["rest"]["mlps_0"]["down"]["kernel"] == P("tensor", "fsdp")
    assert spec.opt_state[1].inner_state[0].mu == spec.params
    adapters = scan(Config(**TINY, lora_rank=2, param_dtype="int8"))
    shapes = jax.eval_shape(functools.partial(initialize, Transformer(adapters)), jax.random.key(0))
    of_path = {axes.names_of(path)[2:]: axes.axes_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)}
    assert of_path["down", "kernel", "int8"] == of_path["down", "kernel", "scale"] == ("", "mlp", "width")
    assert of_path["down", "lora_a"] == ("", "mlp") and of_path["down", "lora_scale"] == ("",)


def state_of(params):
    return TrainState(step=jnp.int32(3), key=jax.random.key(1), params=params,
                      opt_state=optimizers.adamw().init(params), reference=(), curriculum=(), reward=(),
                      controllers={}, bad_updates=jnp.int32(0))  # fmt: skip


def test_weight_decay_and_clipping_see_the_same_parameters():
    config = CONFIGS["two kinds"]
    optimizer = optimizers.adamw(weight_decay=0.1, learning_rate=0.1, max_grad_norm=0.5)

    def moved(config):
        held = layers.stacked(params(GEMMA), config)
        return jit(lambda p: optimizer.update(jax.tree.map(jnp.cos, p), optimizer.init(p), p)[0])(held)

    close(moved(scan(config)), layers.stacked(moved(config), scan(config)), rtol=1e-5)


@pytest.mark.parametrize("name", [pytest.param("adapters", marks=pytest.mark.slow), "adapters over int8"])
def test_adapters_are_split_merged_and_switched_off_as_in_the_unrolled_model(name):
    config, rollout = CONFIGS[name], sampled(CONFIGS[name])
    held = layers.stacked(params(config), scan(config))
    trained, frozen = lora.split(held)
    close(trained, layers.stacked(lora.split(params(config))[0], scan(config)))
    close(lora.join(frozen, trained), held)
    merged, plain = lora.merge(held, scan(config))
    assert plain.scan_layers and not plain.lora_rank
    close(merged, layers.stacked(lora.merge(params(config), config)[0], scan(config)), rtol=1e-6, atol=1e-7)
    tell = lambda model, tree: jit(functools.partial(score, model))(tree, rollout).log_probs
    off = without_adapters(Transformer(scan(config)))
    close(tell(off, held), tell(without_adapters(Transformer(config)), params(config)), atol=3e-6)
    assert jnp.abs(tell(off, held) - tell(Transformer(scan(config)), held)).max() > 0.01
    again = lora.adapted(merged, Transformer(scan(config)), jax.random.key(0))
    shapes = lambda tree: {path: (x.shape, x.dtype) for path, x in traverse_util.flatten_dict(tree).items()}
    assert shapes(again) == shapes(held)


EXPORTED = {
    "llama": Config(**TINY, tied_head=False),
    "gemma2": dataclasses.replace(GEMMA, value_head=False, window_rope_theta=0.0, qk_norm=False, logits_cap=3.0,
                                  embedding_scale=8**0.5),
    "mixtral": Config(**TINY, experts=3, windows=(5,)),
    "gpt2": dataclasses.replace(CONFIGS["GPT-2"], head_width=2),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORTED)
def test_a_folder_is_the_same_whether_layers_are_scanned_or_not(name, tmp_path):
    config = EXPORTED[name]
    held = layers.stacked(params(config), scan(config))
    pretrained.write(tmp_path / "one", params(config), config)
    pretrained.write(tmp_path / "other", held, scan(config))
    files = ("config.json", "model.safetensors")
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
    assert pretrained.config(tmp_path / "one", base=Config(scan_layers=True)) == scan(config)
    read = lambda config: pretrained.start(path=str(tmp_path / "one"))(Transformer(config), jax.random.key(0))
    close(read(scan(config)), held, rtol=0)
    close(read(config), params(config), rtol=0)


def test_a_folder_is_read_into_int8_on_a_mesh(tmp_path):
    config = dataclasses.replace(EXPORTED["llama"], width=16)
    pretrained.write(tmp_path, params(config), config)
    wide = scan(dataclasses.replace(config, param_dtype="int8"))
    with meshes.use(meshes.mesh(data=2, fsdp=2, tensor=2)) as mesh:
        found = pretrained.start(path=str(tmp_path))(Transformer(wide), jax.random.key(0))
    assert jax.tree.map(lambda x: x.sharding, found) == meshes.parameter_shardings(found, mesh)
    wanted = [projections.to_int8(params(config)[f"mlps_{i}"]["down"]["kernel"], (0,)) for i in range(3)]
    wanted = jax.tree.map(lambda *x: jnp.stack(x), *wanted)
    close(found["layers"]["mlps_0"]["down"]["kernel"], wanted, rtol=1e-6)
    assert found["layers"]["mlp_norms_0"]["scale"].dtype == jnp.bfloat16
