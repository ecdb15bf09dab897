"""mlrl export: a run that began with pretrained weights ends as a folder that can be imported again."""

import contextlib
import functools
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl import checkpoints, export, main, tokenizer_files, vocabularies
from mlrl.models import lora, pretrained
from mlrl.models.transformer import (
    Config,
    Transformer,
    causal_mask,
    initialize,
    row_positions,
    without_adapters,
)
from mlrl.types import Refused

REPO = pathlib.Path(__file__).resolve().parent.parent
TOKENIZERS = REPO.parent / "shared" / "data" / "tokenizers"
CONFIG = Config(vocabulary_size=24, width=8, layers=1, heads=2, kv_heads=1, head_width=4, mlp_width=6, qkv_bias=True)
GIN = """
from __gin__ import dynamic_registration
include 'gin/methods/ppo_shared.gin'
include 'gin/models/pretrained.gin'
include 'gin/tasks/arithmetic.gin'
from mlrl import meshes
from mlrl.loops import online
from mlrl.rewards import graph

WEIGHTS = {!r}
STEPS = 1
DIGITS = 1
online.Experiment.reward_fn = @graph.random()
online.Experiment.prompts_per_step = 8
online.Experiment.group_size = 2
online.Experiment.mesh = @meshes.mesh
meshes.mesh.devices = 1
"""


# The same over int8, with a large step, so that the adapters do something.
LORA = """
include 'gin/models/lora.gin'
from mlrl import evaluation
from mlrl import optimizers
from mlrl.tasks import puzzles
LORA_RANK = 2
BASE_DTYPE = 'int8'
optimizers.adamw.learning_rate = 0.3
test/puzzles.arithmetic.split = 'test'
test/puzzles.arithmetic.name = 'held_out'
evaluation.Evaluation.task = @test/puzzles.arithmetic()
evaluation.Evaluation.reward_fn = @graph.arithmetic
evaluation.Evaluation.prompts = 4
online.Experiment.evaluations = (@evaluation.Evaluation(),)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with first weights, and a run of one step from them."""
    folder = tmp_path_factory.mktemp("export")
    params = initialize(Transformer(CONFIG), jax.random.key(3))
    pretrained.write(folder / "first", params, CONFIG, more={"max_position_embeddings": 77, "bos_token_id": 1})
    (folder / "my.gin").write_text(GIN.format(str(folder / "first")))
    assert main.main(["train", str(folder / "my.gin"), "--run_dir", str(folder / "run")]) == 0
    return folder, params


def exported(capsys, *arguments):
    status = main.main(["export", *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out + said.err


def test_a_run_begins_with_the_weights_of_the_folder_and_is_exported(run, capsys):
    folder, first = run
    status, said = exported(capsys, folder / "run", folder / "out", "--shard_gb", "1e-6")
    assert status == 0, said
    assert "step 1 of" in said and "no tokenizer was written" in said and "left out" in said
    assert "Config.value_head" in said
    settings = json.loads((folder / "out" / "config.json").read_text())
    assert settings["architectures"] == ["Qwen2ForCausalLM"]
    assert [settings[f"{name}_token_id"] for name in ("pad", "bos", "eos")] == [0, 1, 2]
    assert settings["max_position_embeddings"] == 77
    assert len(list((folder / "out").glob("model-*.safetensors"))) > 1
    experiment, _ = main.load(str(folder / "my.gin"))
    loop, parts = main._prepared(experiment)
    _, trained = last_policy(folder / "my.gin", folder / "run")
    again = pretrained.start(path=str(folder / "out"))(Transformer(CONFIG), jax.random.key(0))
    start = loop.initial_state(parts).params
    assert set(trained) - set(again) == {"value"}
    for name, module in again.items():
        jax.tree.map(np.testing.assert_array_equal, module, trained[name])
        jax.tree.map(np.testing.assert_array_equal, start[name], first[name])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), {name: trained[name] for name in first}, first)
    assert any(jax.tree.leaves(moved))


def last_policy(path, folder):
    """The model of an experiment, and all parameters of its run's last checkpoint."""
    experiment, _ = main.load(str(path))
    loop, parts = main._prepared(experiment)
    manager = checkpoints.open_manager(folder / "checkpoints", read_only=True)
    state = checkpoints.restore(manager, loop.abstract_state(parts))
    checkpoints.close(manager)
    return parts.model, lora.policy(state)


def test_adapters_over_int8_are_merged_and_the_folder_says_what_the_policy_says(run, capsys, tmp_path):
    folder, first = run
    (tmp_path / "my.gin").write_text((folder / "my.gin").read_text() + LORA)
    assert main.main(["train", str(tmp_path / "my.gin"), "--run_dir", str(tmp_path / "run")]) == 0
    assert main.main(["eval", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    status, said = exported(capsys, tmp_path / "run", tmp_path / "out")
    assert status == 0 and "adapters of rank 2 are merged into the weights, which are float32" in said, said
    model, trained = last_policy(tmp_path / "my.gin", tmp_path / "run")
    plain = Transformer(pretrained.config(tmp_path / "out"))
    assert (plain.config.lora_rank, plain.config.param_dtype) == (0, "float32")
    again = pretrained.start(path=str(tmp_path / "out"))(plain, jax.random.key(0))
    tokens, valid = jnp.arange(12).reshape(2, 6) % 24, jnp.ones((2, 6), bool)

    @functools.partial(jax.jit, static_argnums=0)
    def logits(model, params):
        hidden, _ = model.apply({"params": params}, tokens, row_positions(valid), causal_mask(valid))
        return model.apply({"params": params}, hidden, method=Transformer.logits)

    off = logits(without_adapters(model), trained)
    np.testing.assert_allclose(logits(plain, again), logits(model, trained), atol=2e-5)
    assert jnp.abs(logits(plain, again) - off).max() > 0.01
    np.testing.assert_allclose(off, logits(Transformer(CONFIG), first), atol=0.05)


def test_an_export_needs_none_of_the_run_s_devices(run, capsys, tmp_path):
    folder, _ = run
    shutil.copytree(folder / "run", tmp_path / "run")
    config = (tmp_path / "run" / "config.gin").read_text()
    assert "mesh.devices = 1" in config
    on_many = re.sub(r"(\S*)mesh.devices = 1", r"\1mesh.fsdp = 64\nmeshes.rearranged.tensor = 8", config)
    on_many += "\nonline.Experiment.rollout_mesh = @meshes.rearranged\n"
    (tmp_path / "run" / "config.gin").write_text(on_many)
    for name in (folder, tmp_path):
        assert exported(capsys, name / "run", tmp_path / f"of_{name.name}")[0] == 0
    one, other = (tmp_path / f"of_{name.name}" / "model.safetensors" for name in (folder, tmp_path))
    assert one.read_bytes() == other.read_bytes()


def test_a_bucket_s_address_is_no_path_here(run, capsys, tmp_path):
    folder, _ = run
    with contextlib.chdir(tmp_path):
        for arguments in ((folder / "run", "gs://bucket/out"), ("gs://bucket/run", "out")):
            status, said = exported(capsys, *arguments)
            assert status == 2 and "is no path of this machine: mount the bucket" in said and said.count("\n") == 1
        for command in (["eval", "gs://bucket/run"], ["report", "gs://bucket/run"],
                        ["report", str(folder / "run"), "--out", "gs://bucket/page.html"]):  # fmt: skip
            assert main.main(command) == 2 and "is no path of this machine" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


def test_an_export_that_cannot_be_is_one_line(run, capsys, tmp_path):
    folder, _ = run
    for arguments, words in (
        ((tmp_path, tmp_path / "out"), "a run folder has a config.gin"),
        ((folder / "run", folder / "first"), "already holds config.json"),
        ((folder / "run", folder / "my.gin"), "cannot make the folder"),
        ((folder / "run", tmp_path / "out", "--shard_gb", "0"), "--shard_gb must be above 0"),
    ):
        status, said = exported(capsys, *arguments)
        assert status == 2 and words in said and said.count("\n") == 1, said


def test_a_folder_of_another_shape_is_refused_before_anything_runs(run, capsys, tmp_path):
    folder, _ = run
    other = "from mlrl.models import transformer\nonline.Experiment.model = @transformer.Config()\n"
    (tmp_path / "my.gin").write_text((folder / "my.gin").read_text() + other)
    assert main.main(["check", str(tmp_path / "my.gin")]) == 2
    said = capsys.readouterr().err
    assert "Config.width is 128, not 8" in said and "@pretrained.config()" in said and said.count("\n") == 1


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_a_tokenizer_is_copied_under_the_names_that_others_look_for(name, tmp_path):
    if not (TOKENIZERS / name).is_dir():
        pytest.skip(f"there is no folder {TOKENIZERS / name}")
    vocabulary = vocabularies.hugging_face(str(TOKENIZERS / name))
    copied = export._copy_tokenizer(vocabulary, tmp_path)
    assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= set(copied) == {p.name for p in tmp_path.iterdir()}
    again = vocabularies.hugging_face(str(tmp_path))
    text = "Janet’s 16 ducks,\n  naïve"
    assert again.encode(text) == vocabulary.encode(text) and again.eos_ids == vocabulary.eos_ids
    kind = json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert kind == {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer"}[name]


def test_a_sentencepiece_model_is_copied(tmp_path):
    words = ["ab ba", "abba baab", "aab bba"]
    vocabulary = vocabularies.train_sentencepiece(words, str(tmp_path / "m"), 12, byte_fallback=False)
    (tmp_path / "out").mkdir()
    assert export._copy_tokenizer(vocabulary, tmp_path / "out") == ["tokenizer.model"]
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (tmp_path / "m").read_bytes()
    tokenizer_files.sentencepiece_model.cache_clear()


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(Refused, match="no complete checkpoint"):
        export.export_run(tmp_path, None, None, tmp_path / "out")
