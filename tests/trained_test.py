"""Studies whose runs begin from shared warm starts."""

import json
import pathlib
import sys

import pytest

from experiments import trained
from experiments.absolute_zero import compare

REPO = pathlib.Path(__file__).resolve().parent.parent


def test_parts_of_a_curve():
    curve = {0: 5.0, 60: 3.0, 80: 1.0, 100: 2.0}
    assert [trained.number(curve, part) for part in ("first", "last", "late")] == [5.0, 2.0, 1.5]


def test_curves_are_drawn_at_the_steps_that_all_have():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    trained.draw(axes, [{0: 1.0, 1: 2.0, 2: 3.0}, {0: 4.0, 2: 5.0}], "arm")
    (line,) = axes.get_lines()
    assert list(line.get_xdata()) == [0, 2] and list(line.get_ydata()) == [2.5, 4.0]


def test_curves_are_read_from_run_folders(tmp_path):
    for seed in range(2):
        (tmp_path / f"seed_{seed}").mkdir()
        lines = [{"step": 0, "eval/x": seed}, {"step": 1, "reward": 2.0}, {"step": 2, "eval/x": seed + 1}]
        (tmp_path / f"seed_{seed}" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [one["eval/x"] for one in trained.read(tmp_path)] == [{0: 0, 2: 1}, {0: 1, 2: 2}]


@pytest.mark.slow
def test_absolute_zero_in_its_tiny_form_makes_a_table_and_a_plot(tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    tiny = ["STEPS=2", "WARM_STEPS=1", "evaluation.Evaluation.prompts=8", "triplets.solve.count=20"]
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path), "--seeds", "1", "--arms", "absolute_zero",
                                      "random_programs", *(f"--gin.{one}" for one in tiny)])  # fmt: skip
    compare.compare()
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| absolute_zero", "| random_programs"]
    assert (tmp_path / "plot.png").stat().st_size > 0
    changed = (tmp_path / "absolute_zero/seed_0/done").stat().st_mtime
    compare.compare()
    assert (tmp_path / "absolute_zero/seed_0/done").stat().st_mtime == changed
