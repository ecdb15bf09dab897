"""The SPIRAL study in its tiny form: it runs, keeps what is done, and makes its table and plot."""

import json
import pathlib
import sys

import pytest

from experiments.spiral import compare

REPO = pathlib.Path(__file__).resolve().parent.parent
TINY = {"STEPS": 2, "WARM_STEPS": 1, "ROWS_PER_PROMPT": 2, "EVERY_STEPS": 2, "MATCH_EVERY_STEPS": 2,
        "Match.prompts": 16}  # fmt: skip


def test_every_arm_has_a_file():
    for game in compare.COLUMNS:
        for arm in compare.ARMS[1:]:
            assert (REPO / "experiments" / "spiral" / f"{game}_{arm}.gin").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("game, metric", [("kuhn", "kuhn_poker/exploitability"),
                                          ("negotiation", "negotiation/accepts_behind")])  # fmt: skip
def test_a_tiny_study_makes_a_table_and_a_plot(game, metric, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    words = [f"--gin.{name}={value}" for name, value in TINY.items()]
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path), "--seeds", "2", "--games", game, "--arms", "role",
                                      "none", *words])  # fmt: skip
    compare.compare()
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| warm start", "| role", "| none"]
    assert (tmp_path / "plot.png").stat().st_size > 0
    one, other = (json.loads((tmp_path / f"{game}-{arm}/seed_1/metrics.jsonl").read_text().splitlines()[0])
                  for arm in ("role", "none"))  # fmt: skip
    assert one[f"eval/{metric}"] == other[f"eval/{metric}"]  # the same start
    changed = (tmp_path / f"{game}-role/done.json").stat().st_mtime
    compare.compare()
    assert (tmp_path / f"{game}-role/done.json").stat().st_mtime == changed
