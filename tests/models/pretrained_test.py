"""Pretrained weights: folders that the tests write are read as they are, or refused by the name of what is wrong."""

import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from mlrl import meshes
from mlrl.models import families, pretrained, rope, tensor_files
from mlrl.models.mlp import gelu_tanh
from mlrl.models.norms import LayerNorm, OffsetRMSNorm
from mlrl.models.transformer import Config, Transformer, initialize
from mlrl.types import Refused

SMALL = dict(vocabulary_size=11, width=8, layers=2, heads=4, kv_heads=2, head_width=4, mlp_width=6)
LLAMA, QWEN2 = Config(**SMALL, tied_head=False), Config(**SMALL, qkv_bias=True)
GEMMA = dict(norm=OffsetRMSNorm, activation=gelu_tanh, embedding_scale=8**0.5)
CONFIGS = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": Config(**SMALL, windows=(5,)),
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": Config(**SMALL, qk_norm=True, rope_theta=1e6),
    "MixtralForCausalLM": Config(**SMALL, experts=3, windows=(5,)),
    "Qwen3MoeForCausalLM": Config(**SMALL, experts=3, experts_per_token=1, experts_renormalized=False, qk_norm=True),
    "GemmaForCausalLM": Config(**SMALL, **GEMMA),
    "Gemma2ForCausalLM": Config(**SMALL, **GEMMA, post_norms=True, windows=(5, 0), scale_width=9, attention_cap=50.0,
                                logits_cap=30.0),
    "Gemma3ForCausalLM": Config(**SMALL, **GEMMA, post_norms=True, windows=(5, 0), scale_width=9, qk_norm=True,
                                rope_theta=1e6, window_rope_theta=1e4),
    "GPT2LMHeadModel": Config(**SMALL | dict(kv_heads=4, head_width=2), learned_positions=9, norm=LayerNorm,
                              qkv_bias=True, out_bias=True, mlp_bias=True, gated_mlp=False, activation=gelu_tanh),
}  # fmt: skip
SCALINGS = (rope.Linear(3.0), rope.Llama3(8.0, 1.0, 4.0, 8192), rope.Yarn(4.0, 32768, 1.1, 30.0, 2.0, False))


def scattered(config, key=0):
    """Parameters that are all different, as no initial norm or bias is."""
    shapes = jax.eval_shape(lambda key: initialize(Transformer(config), key), jax.random.key(0))
    rng = np.random.default_rng(key)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)


def read(folder, config, key=5):
    return pretrained.start(path=str(folder))(Transformer(config), jax.random.key(key))


def assert_equal(one, other):
    one, other = (traverse_util.flatten_dict(x, sep="/") for x in (one, other))
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        np.testing.assert_array_equal(one[name], other[name], name)


@pytest.fixture
def llama(tmp_path):
    """A folder that holds LLAMA in one file, its tensors, and a function that writes others in their place."""
    pretrained.write(tmp_path / "llama", scattered(LLAMA), LLAMA)
    file = tmp_path / "llama" / "model.safetensors"
    return tmp_path / "llama", load_file(file), lambda tensors: save_file(tensors, file)


def change_settings(folder, **changes):
    file = folder / "config.json"
    text = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in text.items() if value != "absent"}))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_import_of_an_export_is_bit_equal(architecture, tmp_path):
    config, params = CONFIGS[architecture], scattered(CONFIGS[architecture])
    pretrained.write(tmp_path / "one", params, config)
    assert json.loads((tmp_path / "one" / "config.json").read_text())["architectures"] == [architecture]
    assert pretrained.config(tmp_path / "one") == config
    again = read(tmp_path / "one", config)
    assert_equal(params, again)
    pretrained.write(tmp_path / "two", again, config, shard_bytes=1000)
    assert len(list((tmp_path / "two").glob("model-*-of-*.safetensors"))) > 2
    assert_equal(params, read(tmp_path / "two", config))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_scaling_of_positions_is_read_as_it_was_written(scaling, tmp_path):
    config = dataclasses.replace(LLAMA, rope_scaling=scaling)
    pretrained.write(tmp_path, scattered(config), config)
    assert pretrained.config(tmp_path) == config


def test_each_tensor_lies_where_llama_has_it(tmp_path):
    """By hand: a linear layer there is [out, in]; query head h of key/value head k is head 2 k + h."""
    params = scattered(QWEN2)
    pretrained.write(tmp_path, params, QWEN2)
    theirs = load_file(tmp_path / "model.safetensors")
    qkv, layer = params["attentions_1"]["qkv"], "model.layers.1"
    x = np.random.default_rng(0).normal(size=8).astype(np.float32)
    queries = theirs[f"{layer}.self_attn.q_proj.weight"] @ x + theirs[f"{layer}.self_attn.q_proj.bias"]
    ours = np.einsum("d,dkhw->khw", x, qkv["kernel"]) + np.asarray(qkv["bias"])
    np.testing.assert_allclose(queries.reshape(4, 4), ours[:, :2].reshape(4, 4), rtol=1e-5)
    values = theirs[f"{layer}.self_attn.v_proj.weight"] @ x + theirs[f"{layer}.self_attn.v_proj.bias"]
    np.testing.assert_allclose(values.reshape(2, 4), ours[:, 3], rtol=1e-5)
    up = theirs[f"{layer}.mlp.up_proj.weight"] @ x
    np.testing.assert_allclose(up, x @ np.asarray(params["mlps_1"]["gate_up"]["kernel"])[:, 1], rtol=1e-5)
    out = theirs[f"{layer}.self_attn.o_proj.weight"] @ np.arange(16.0)
    heads = np.arange(16.0).reshape(2, 2, 4)
    np.testing.assert_allclose(out, np.einsum("khw,khwd->d", heads, params["attentions_1"]["out"]["kernel"]), rtol=1e-5)
    assert theirs["model.layers.1.post_attention_layernorm.weight"].tolist() == params["mlp_norms_1"]["scale"].tolist()
    assert "lm_head.weight" not in theirs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_is_changed_on_the_way(llama, dtype):
    folder, tensors, write = llama
    write({name: x.astype(jnp.bfloat16) for name, x in tensors.items()})
    base = Config(param_dtype=dtype, dtype=dtype)
    config = pretrained.config(folder, base=base)
    assert (config.param_dtype, config.dtype) == (dtype, dtype)
    leaves = jax.tree.leaves(read(folder, config))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype)}
    kept = np.asarray(read(folder, config)["embedding"]["embedding"], np.float32)
    np.testing.assert_array_equal(kept, tensors["model.embed_tokens.weight"].astype(jnp.bfloat16))


@pytest.mark.parametrize("part, base", [("value", Config(value_head=True)),
                                        ("critic", Config(value_head=True, critic_layers=1))])  # fmt: skip
def test_heads_that_no_checkpoint_holds_start_at_random(part, base, tmp_path):
    pretrained.write(tmp_path / "one", scattered(QWEN2), QWEN2)
    config = pretrained.config(tmp_path / "one", base=base)
    assert config == dataclasses.replace(QWEN2, value_head=True, critic_layers=base.critic_layers)
    found, fresh = read(tmp_path / "one", config), initialize(Transformer(config), jax.random.key(5))
    pretrained.write(tmp_path / "two", found, config)
    assert_equal(read(tmp_path / "two", QWEN2), scattered(QWEN2))
    assert_equal(found.pop(part), fresh[part])
    assert_equal(found, scattered(QWEN2))


def test_reading_costs_little_more_memory_than_what_is_kept(tmp_path):
    config = Config(vocabulary_size=512, width=128, layers=6, mlp_width=512, tied_head=False)
    pretrained.write(tmp_path, scattered(config), config)
    start, model = pretrained.start(path=str(tmp_path)), Transformer(config)
    tracemalloc.start()  # sees numpy's arrays, which on a CPU are also JAX's
    params = start(model, jax.random.key(0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.3 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM", "GPT2LMHeadModel"])
def test_on_a_mesh_each_device_gets_its_part_and_no_more_is_read(tmp_path, monkeypatch, name):
    config = CONFIGS[name]
    pretrained.write(tmp_path, scattered(config), config)
    sizes, made = [], jax.make_array_from_callback

    def spy(shape, sharding, read):
        whole = int(np.prod(shape))

        def counted(index):
            part = read(index)
            sizes.append((whole, part.size, whole // int(np.prod(sharding.shard_shape(shape)))))
            return part

        return made(shape, sharding, counted)

    monkeypatch.setattr(jax, "make_array_from_callback", spy)
    with meshes.use(meshes.mesh(data=2, fsdp=2, tensor=2)) as mesh:
        params = read(tmp_path, config)
    assert_equal(params, scattered(config))
    assert jax.tree.map(lambda x: x.sharding, params) == meshes.parameter_shardings(params, mesh)
    assert all(part * shards == whole for whole, part, shards in sizes) and max(shards for *_, shards in sizes) == 4


def without(name):
    return lambda tensors: tensors.pop(name)


def with_(name, x):
    return lambda tensors: tensors.update({name: x})


NORM, HEAD = "model.norm.weight", "lm_head.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (without(NORM), f"has no tensor {NORM}"),
        (without("model.layers.1.mlp.up_proj.weight"), "has no tensor model.layers.1.mlp.up_proj.weight"),
        (without(HEAD), f"has no tensor {HEAD}"),
        (with_(NORM, np.zeros(9, np.float32)), rf"{NORM} .* has shape \[9\], but .* \[8\]"),
        (with_(HEAD, np.zeros((8, 11), np.float32)), rf"{HEAD} .* has shape \[8, 11\], but .* \[11, 8\]"),
        (with_("model.layers.2.mlp.up_proj.weight", np.zeros((6, 8), np.float32)), "layers.2.mlp.up_proj.weight"),
        (with_("model.layers.0.self_attn.q_proj.bias", np.zeros(16, np.float32)), "q_proj.bias.* has no place"),
        (with_(NORM, np.zeros(8, np.int8)), f"{NORM} .* is of I8"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(llama, change, words):
    folder, tensors, write = llama
    change(tensors)
    write(tensors)
    with pytest.raises(Refused, match=words) as refusal:
        pretrained.start(path=str(folder))
    assert "\n" not in str(refusal.value)


def test_a_truncated_file_is_refused_by_the_tensor(llama):
    folder, _, _ = llama
    file, last = folder / "model.safetensors", "lm_head.weight"
    whole = file.read_bytes()
    cuts = ((len(whole) - 4, f"{last} .* is truncated"), (100, "header is truncated"), (3, "no safetensors"))
    for kept, words in cuts:
        file.write_bytes(whole[:kept])
        with pytest.raises(Refused, match=words):
            pretrained.start(path=str(folder))
    file.write_bytes(whole + b"1234")
    with pytest.raises(Refused, match="bytes of data, but its header tells of"):
        pretrained.start(path=str(folder))
    file.write_bytes(whole[:8] + b"?" + whole[9:])
    with pytest.raises(Refused, match="header of .* is not that"):
        pretrained.start(path=str(folder))


WHOLE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize("header", [
    [], {"x": [1]}, {"x": WHOLE | {"data_offsets": [0, 8, 8]}}, {"x": WHOLE | {"dtype": ["F32"]}},
    {"x": WHOLE | {"shape": [2.0]}}, {"x": WHOLE | {"data_offsets": ["0", "8"]}}, {"x": WHOLE | {"shape": "2"}},
    {"x": WHOLE | {"shape": [1], "data_offsets": [4, 8]}}, {"x": WHOLE, "y": WHOLE}, {"__metadata__": {}},
    {"__metadata__": {"a": "\ud800"}, "x": WHOLE},
])  # fmt: skip
def test_a_header_that_is_none_is_refused(tmp_path, header):
    def write(header):
        text = json.dumps(header).encode()
        (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))

    write({"x": WHOLE})
    assert set(tensor_files.stored(tmp_path)) == {"x"}
    write(header)
    with pytest.raises(Refused, match="copy (the file|it) again|only F64"):
        tensor_files.stored(tmp_path)


def test_shards_that_do_not_fit_their_index_are_refused(tmp_path):
    pretrained.write(tmp_path, scattered(LLAMA), LLAMA, shard_bytes=1000)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    shard = good["weight_map"][NORM]

    def refused(words, **where):
        index.write_text(json.dumps({"weight_map": good["weight_map"] | where}))
        with pytest.raises(Refused, match=words):
            pretrained.start(path=str(tmp_path))

    refused("model.extra is not in", **{"model.extra": shard})
    refused("says that model.norm.weight is in ../x", **{NORM: "../x"})
    refused("says that model.norm.weight is in gone.safetensors", **{NORM: "gone.safetensors"})
    index.write_text(json.dumps({"weight_map": {k: v for k, v in good["weight_map"].items() if k != NORM}}))
    with pytest.raises(Refused, match="holds the tensor model.norm.weight, of which"):
        pretrained.start(path=str(tmp_path))


def test_pickled_weights_are_not_read(llama):
    folder, _, _ = llama
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(Refused, match="pytorch_model.bin is not read, since unpickling runs code"):
        pretrained.start(path=str(folder))


def as_classifier(folder, score, **changes):
    """Turns a folder into that of a sequence classifier."""
    file = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if name != HEAD}
    save_file(tensors | {"score.weight": score}, file)
    change_settings(folder, architectures=["LlamaForSequenceClassification"], **changes)


def test_a_sequence_classifier_is_a_reward_model_whose_value_head_is_its_score(llama):
    """And no policy. Its head is none of its own: nothing is held for it."""
    folder, _, _ = llama
    score = np.arange(8, dtype=np.float32)[None]
    as_classifier(folder, score, id2label={"0": "LABEL_0"}, pad_token_id=0)
    config, begin = pretrained.judge(path=str(folder), base=Config(param_dtype="bfloat16"))
    assert config == dataclasses.replace(LLAMA, tied_head=True, value_head=True, param_dtype="bfloat16")
    params = begin(Transformer(config), jax.random.key(0))
    np.testing.assert_array_equal(params["value"]["kernel"], score.T)
    np.testing.assert_array_equal(params["value"]["bias"], [0.0])
    trunk = scattered(LLAMA)["mlps_1"]["down"]["kernel"]
    np.testing.assert_array_equal(params["mlps_1"]["down"]["kernel"], trunk.astype(jnp.bfloat16))
    assert "head" not in params
    with pytest.raises(Refused, match="of the architecture LlamaForSequenceClassification: mlrl has LlamaForCausalLM"):
        pretrained.start(path=str(folder))


def test_a_folder_that_is_no_reward_model_is_refused(llama):
    folder, _, _ = llama
    with pytest.raises(Refused, match="LlamaForCausalLM: mlrl has LlamaForSequenceClassification for reward models"):
        pretrained.judge(path=str(folder))
    as_classifier(folder, np.zeros((2, 8), np.float32))
    with pytest.raises(Refused, match=r"score.weight in .* has shape \[2, 8\], but its config.json calls for \[1, 8\]"):
        pretrained.judge(path=str(folder))


def test_a_tied_head_may_be_there_twice_but_not_differ(tmp_path):
    params = scattered(QWEN2)
    pretrained.write(tmp_path, params, QWEN2)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {HEAD: tensors["model.embed_tokens.weight"].copy()}, file)
    assert_equal(read(tmp_path, QWEN2), params)
    save_file(tensors | {HEAD: tensors["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(Refused, match="lm_head.weight is not the embedding"):
        pretrained.start(path=str(tmp_path))


def test_names_without_the_prefix_and_old_buffers_are_known(tmp_path):
    config = CONFIGS["GPT2LMHeadModel"]
    params = scattered(config)
    pretrained.write(tmp_path, params, config)
    file = tmp_path / "model.safetensors"
    bare = {name.removeprefix("transformer."): x for name, x in load_file(file).items()}
    save_file(bare | {"h.0.attn.bias": np.ones((1, 1, 9, 9), np.float32)}, file)
    assert_equal(read(tmp_path, config), params)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model_type="mamba"), "model_type 'mamba'"),
        (dict(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
        (dict(hidden_act="relu6"), "hidden_act to 'relu6'"),
        (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "type 'dynamic'"),
        (dict(rope_scaling={"rope_type": "linear", "factor": 2.0, "odd": 1}), "sets odd to 1"),
        (dict(rope_scaling={"rope_type": "linear"}), "rope_scaling in .* has no factor"),
        (dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "partial_rotary_factor to 0.5"),
        (dict(quantization_config={"bits": 4}), "sets quantization_config"),
        (dict(residual_multiplier=0.5), "sets residual_multiplier to 0.5"),
        (dict(hidden_size="8"), "hidden_size to '8'"),
        (dict(hidden_size="absent"), "has no hidden_size"),
        (dict(hidden_size=float("inf")), "hidden_size to inf"),
        (dict(rms_norm_eps=float("nan")), "rms_norm_eps to nan"),
        (dict(num_attention_heads=0), "num_attention_heads to 0; mlrl knows a whole number from 1"),
        (dict(num_hidden_layers=2**40), "num_hidden_layers to 10995.*; mlrl knows a whole number from 1 to 9,999"),
        (dict(hidden_act=["silu"]), "hidden_act to .'silu'.; mlrl knows silu"),
        (dict(architectures=7), "of the architecture 7"),
        (dict(rope_scaling={"type": [1], "factor": 2.0}), "of type .1. is not known"),
        (dict(tie_word_embeddings=1), "tie_word_embeddings to 1"),
        (dict(num_key_value_heads=3), r"Config.heads \(4\) must be a multiple of Config.kv_heads \(3\)"),
    ],
)
def test_a_setting_that_mlrl_lacks_is_refused_by_name(llama, changes, words):
    folder, _, _ = llama
    change_settings(folder, **changes)
    with pytest.raises(Refused, match=words) as refusal:
        pretrained.config(folder)
    assert "\n" not in str(refusal.value)


def test_settings_that_change_nothing_are_read_over(llama):
    folder, _, _ = llama
    change_settings(folder, use_cache=False, attention_dropout=0.1, pretraining_tp=1, transformers_version="4.42.3",
                    rope_scaling=None, head_dim=None, unheard_of=None)  # fmt: skip
    change_settings(folder, hidden_size=16, num_attention_heads=4)
    assert pretrained.config(folder).head_width == 4


def test_absent_settings_have_the_defaults_of_the_family():
    sizes = dict(vocab_size=11, hidden_size=8, num_hidden_layers=8, num_attention_heads=4, intermediate_size=6)

    def fields(kind, **more):
        return families.family_of(sizes | dict(model_type=kind) | more, "it")[1]

    assert (fields("llama")["kv_heads"], fields("mistral")["kv_heads"]) == (4, 8)
    assert fields("mistral")["windows"] == (4096,)
    assert fields("mistral", sliding_window=None)["windows"] == (0,)
    qwen2 = fields("qwen2", use_sliding_window=True, max_window_layers=6, sliding_window=3)
    assert qwen2["windows"] == (0, 0, 0, 0, 0, 0, 3, 3)
    assert fields("qwen2", max_window_layers=6, sliding_window=3)["windows"] == (0,)
    assert fields("qwen3")["head_width"] == 128
    assert fields("gemma", hidden_act="gelu")["activation"] is gelu_tanh
    gemma2 = fields("gemma2")
    assert (gemma2["windows"], gemma2["attention_cap"], gemma2["logits_cap"]) == ((4096, 0), 50.0, 30.0)
    gemma3 = fields("gemma3_text", rope_scaling={"rope_type": "linear", "factor": 8.0}, sliding_window=512)
    assert gemma3["windows"] == (512,) * 5 + (0,) and gemma3["tied_head"]
    assert (gemma3["rope_theta"], gemma3["window_rope_theta"]) == (1e6, 1e4)
    assert gemma3["rope_scaling"] == rope.Linear(8.0)


def test_a_model_of_another_shape_is_refused_by_its_fields(llama):
    folder, _, _ = llama
    start = pretrained.start(path=str(folder))
    other = dataclasses.replace(LLAMA, width=16, rope_theta=5e5, dtype="bfloat16")
    with pytest.raises(Refused, match="Config.width is 16, not 8, Config.rope_theta is 500000.0, not 10000.0; set"):
        start.check(Transformer(other))
    with pytest.raises(Refused, match="Config.activation is gelu_tanh, not silu"):
        start.check(Transformer(dataclasses.replace(LLAMA, activation=gelu_tanh)))
    start.check(Transformer(dataclasses.replace(LLAMA, dtype="bfloat16", value_head=True, windows=(0, 0))))
    with pytest.raises(Refused, match="base sets width to 16, but"):
        pretrained.config(folder, base=other)


def test_an_export_that_cannot_be_is_refused(tmp_path):
    odd = dataclasses.replace(LLAMA, embedding_scale=3.0)
    with pytest.raises(Refused, match="LlamaForCausalLM differs in Config.embedding_scale"):
        pretrained.write(tmp_path, {}, odd)
    with pytest.raises(Refused, match="activation"):
        pretrained.write(tmp_path, {}, dataclasses.replace(LLAMA, activation=jnp.tanh))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Refused, match="already holds config.json"):
        pretrained.write(tmp_path, scattered(LLAMA), LLAMA)


def test_files_are_those_of_the_safetensors_package(tmp_path):
    """Both ways: what we write it reads, what it writes we read; an empty tensor and a scalar too."""
    arrays = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3), "b": np.float16([[1.5]]), "c": np.zeros((0, 3)),
              "d": np.array(2.0, np.float32)}  # fmt: skip
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = {name: place.read() for name, place in tensor_files.stored(tmp_path).items()}
    for name, x in arrays.items():
        np.testing.assert_array_equal(found[name], x)
    (tmp_path / "ours").mkdir()
    shapes = {name: x.shape for name, x in arrays.items()}
    tensor_files.write(tmp_path / "ours", shapes, np.float32, arrays.__getitem__, shard_bytes=1 << 20)
    for name, x in load_file(tmp_path / "ours" / "model.safetensors").items():
        np.testing.assert_array_equal(x, arrays[name].astype(np.float32))
