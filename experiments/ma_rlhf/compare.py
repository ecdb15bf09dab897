"""Macro actions against single tokens, over several seeds at one budget of rollouts: one table, one plot.

    python -m experiments.ma_rlhf.compare FOLDER [--seeds 5] [--arms token fixed_5 ...] [--gin.NAME=VALUE ...]

Each arm is `mlrl train --seeds`, one program for all its seeds; a finished arm is not run again. All arms of a seed
start from the same warm start. Steps to parity are a seed's first evaluation that is no worse than the mean over seeds
of the last evaluation of `token`, the arm whose every token is an action.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import time

from experiments.study import curve, plot, shown

ARMS = ("token", "token_long", "fixed_3", "fixed_5", "fixed_10", "totals", "perplexity")
METRIC = "mean@2"


def main() -> None:
    """Runs what is missing, then writes FOLDER/table.md and FOLDER/plot.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    arguments, overrides = parser.parse_known_args()
    arms = ("token", *(name for name in arguments.arms if name != "token"))
    for name in arms:
        trained(arguments.folder / name, name, arguments.seeds, overrides)
    curves = {name: [curve(arguments.folder / name / f"seed_{seed}", METRIC) for seed in range(arguments.seeds)]
              for name in arms}  # fmt: skip
    minutes = {name: json.loads((arguments.folder / name / "study.json").read_text())["minutes"] for name in arms}
    text = table(curves, minutes)
    (arguments.folder / "table.md").write_text(text)
    plot(curves, METRIC, arguments.folder / "plot.png")
    print(text)


def trained(folder: pathlib.Path, name: str, seeds: int, overrides: list[str]) -> None:
    """All seeds of an arm, unless they are there; the wall time in minutes goes to study.json."""
    if (folder / "study.json").is_file():
        return
    command = [sys.executable, "-m", "mlrl", "train", f"experiments/ma_rlhf/{name}.gin", "--run_dir", str(folder),
               "--seeds", str(seeds), *overrides]  # fmt: skip
    print(" ".join(command[2:]), flush=True)
    start = time.time()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    (folder / "study.json").write_text(json.dumps({"minutes": (time.time() - start) / 60}))


def parity(one: dict[int, float], goal: float) -> int | None:
    """The first step, after the start, whose value is at least `goal`; None if there is none."""
    return next((step for step, value in sorted(one.items()) if step > 0 and value >= goal), None)


def table(curves: dict[str, list[dict[int, float]]], minutes: dict[str, float]) -> str:
    """A Markdown table: before, after, and each seed's steps to parity with the last value of `token`."""
    goal = sum(one[max(one)] for one in curves["token"]) / len(curves["token"])
    lines = [f"| arm | seeds | {METRIC} before | {METRIC} after | steps to {goal:.3f} | minutes, all seeds |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name, runs in curves.items():
        steps = [parity(one, goal) for one in runs]
        each = ", ".join("never" if step is None else str(step) for step in steps)
        before, after = ([one[end(one)] for one in runs] for end in (min, max))
        cells = [name, len(runs), shown(before), shown(after), each, f"{minutes[name]:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
