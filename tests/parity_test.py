"""TRL's losses and transformers' models against ours, where `make parity` left theirs; else it says so and skips."""

import dataclasses
import functools
import pathlib
import shutil
import sys

import numpy as np
import pytest

from mlrl.losses import policy

REPO = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "parity"))

import transformers_parity  # noqa: E402
import trl_parity  # noqa: E402


@pytest.fixture(scope="module")
def stored():
    if not trl_parity.NPZ.is_file():
        pytest.skip("there is no parity/.venv/trl.npz: `make parity` writes it, in an environment with torch and TRL")
    return dict(np.load(trl_parity.NPZ))


@pytest.mark.slow  # `make parity` compares too
def test_every_loss_and_gradient_equals_trls(stored):
    names = trl_parity.cases(stored)
    kinds = {name.partition("/")[0] for name in names}
    assert kinds == {"grpo", "rloo", "dpo", "kto", "cpo", "orpo", "reward", "distillation"}
    assert {f"grpo/{name}" for name in trl_parity.GRPO} <= set(names)
    assert {name: trl_parity.difference(name, stored) for name in names} == pytest.approx(
        dict.fromkeys(names, 0.0), abs=trl_parity.TOLERANCE
    )


def test_another_setting_is_not_equal(stored, monkeypatch):
    """The comparison can fail: a clip of 0.3 is not TRL's 0.2, a mean over rows is not its mean over tokens."""
    wider = functools.partial(policy.ppo_clip, clip_low=0.3, clip_high=0.3)
    for changed in ((wider, trl_parity.token_mean), (policy.ppo_clip, trl_parity.row_mean)):
        monkeypatch.setitem(trl_parity.GRPO, "dapo", changed)
        assert trl_parity.difference("grpo/dapo", stored) > 100 * trl_parity.TOLERANCE


def test_an_environment_that_cannot_be_made_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    taken = tmp_path / "a_file"
    taken.write_text("no folder")
    monkeypatch.setattr(trl_parity, "ENVIRONMENT", taken)
    monkeypatch.setattr(sys, "argv", ["trl_parity.py"])
    assert trl_parity.main() == 0
    said = capsys.readouterr().out
    assert said.startswith("parity with TRL was not checked: ") and said.count("\n") == 1 and "a_file" in said


@pytest.fixture(scope="module")
def models():
    if not transformers_parity.cases(transformers_parity.FOLDER):
        pytest.skip("there is no parity/.venv/models: `make parity` writes it, in an environment with transformers")
    return transformers_parity.FOLDER


@pytest.mark.slow  # `make parity` compares too
def test_every_model_is_that_of_transformers(models, tmp_path):
    names = transformers_parity.cases(models)
    kinds = {name.partition("_")[0] for name in names}
    assert kinds == {
        "llama", "llama3", "mistral", "mixtral", "qwen2", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "gpt2",
    }  # fmt: skip
    for name in names:
        shutil.copytree(models / name, tmp_path / name)  # the comparison writes exports
        assert transformers_parity.compared(tmp_path / name) == []


def test_a_model_with_a_planted_mistake_is_not_that_of_transformers(models):
    config, params = transformers_parity.imported(models / "gemma3_linear")
    theirs = dict(np.load(models / "gemma3_linear" / "theirs.npz"))
    assert transformers_parity.difference(config, params, theirs) <= transformers_parity.TOLERANCE
    changed = dataclasses.replace(config, window_rope_theta=0.0)
    assert transformers_parity.difference(changed, params, theirs) > 100 * transformers_parity.TOLERANCE
