"""The comparison of objectives in its tiny form: it runs, keeps what is done, and makes its table and plot."""

import json
import pathlib
import sys

import jax
import pytest

from experiments.objectives import compare
from mlrl.loops import online
from mlrl.loops.start import random_parameters

REPO = pathlib.Path(__file__).resolve().parent.parent
TINY = """from mlrl import evaluation
from mlrl import meshes
from mlrl.models import transformer
from mlrl.loops import online
from mlrl.tasks import puzzles
transformer.Config.width = 16
transformer.Config.layers = 1
transformer.Config.heads = 2
transformer.Config.kv_heads = 1
transformer.Config.head_width = 8
transformer.Config.mlp_width = 24
online.Experiment.mesh = @meshes.mesh
meshes.mesh.devices = 1
online.Experiment.prompts_per_step = 2
online.Experiment.group_size = 4
online/evaluation.Evaluation.prompts = 4
"""


def test_every_method_that_is_named_has_a_file():
    for method in compare.METHODS:
        assert (REPO / "gin" / "methods" / f"{compare.FILES.get(method, method)}.gin").is_file(), method


def test_a_tiny_comparison_makes_a_table_and_a_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(compare, "LINES", {"grpo": TINY})
    random_start = lambda task, seed, arguments: random_parameters(
        online.prepare(compare.loaded("grpo", task, arguments)).model, jax.random.key(seed)
    )
    monkeypatch.setattr(compare, "warm", random_start)
    command = ["compare", str(tmp_path), "--seeds", "2", "--steps", "2", "--methods", "grpo", "--tasks", "sums"]
    monkeypatch.setattr(sys, "argv", command)
    compare.compare()
    found = json.loads((tmp_path / "sums-grpo.json").read_text())
    assert [sorted(map(int, curve)) for curve in found["curves"]] == [[0, 2], [0, 2]] and found["rows"] == 16
    assert "| grpo | " in (tmp_path / "table.md").read_text() and (tmp_path / "rises.png").stat().st_size > 1000
    monkeypatch.setattr(compare, "arm", lambda *_: pytest.fail("what is done is done again"))
    compare.compare()
    assert capsys.readouterr().out.count("sums grpo: ") == 1
