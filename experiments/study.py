"""Runs the arms of a study over several seeds, and makes its table and its plot.

    python -m experiments.study FOLDER --arms grpo=A.gin random=B.gin --seeds 5 [--gin.STEPS=100 ...]

Each run is `mlrl train ARM.gin --run_dir FOLDER/ARM-SEED --gin.SEED=SEED`; a finished one is not run again, a broken
one resumes. The numbers are held-out accuracies from results.json; intervals are Student's t over seeds, 95%.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import time

from mlrl.metrics import t_interval


def main() -> None:
    """Runs what is missing, then writes FOLDER/table.md and FOLDER/plot.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--arms", nargs="+", required=True, metavar="NAME=FILE.gin")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--metric", default="greedy", help="a metric of results.json")
    arguments, overrides = parser.parse_known_args()
    arms = dict(arm.split("=", 1) for arm in arguments.arms)
    for name, file in arms.items():
        for seed in range(arguments.seeds):
            run(arguments.folder / f"{name}-{seed}", file, [f"--gin.SEED={seed}", *overrides])
    curves = {name: [curve(arguments.folder / f"{name}-{seed}", arguments.metric) for seed in range(arguments.seeds)]
              for name in arms}  # fmt: skip
    minutes = {name: [json.loads((arguments.folder / f"{name}-{seed}" / "study.json").read_text())["minutes"]
                      for seed in range(arguments.seeds)] for name in arms}  # fmt: skip
    text = table(curves, minutes, arguments.metric)
    (arguments.folder / "table.md").write_text(text)
    plot(curves, f"held-out accuracy ({arguments.metric})", arguments.folder / "plot.png")
    print(text)


def run(folder: pathlib.Path, file: str, overrides: list[str]) -> None:
    """One run, unless it is finished; its wall time in minutes goes to study.json."""
    done = folder / "study.json"
    if done.is_file():
        return
    start = time.time()
    command = [sys.executable, "-m", "mlrl", "train", file, "--run_dir", str(folder), *overrides]
    print(" ".join(command[2:]), flush=True)
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    done.write_text(json.dumps({"minutes": (time.time() - start) / 60}))


def curve(folder: pathlib.Path, metric: str) -> dict[int, float]:
    """Step -> value of a metric, averaged over the tasks of the run."""
    points: dict[int, list[float]] = {}
    for entry in json.loads((folder / "results.json").read_text())["evaluations"]:
        points.setdefault(entry["step"], []).append(entry["metrics"][metric]["value"])
    return {step: sum(values) / len(values) for step, values in sorted(points.items())}


def table(curves: dict[str, list[dict[int, float]]], minutes: dict[str, list[float]], metric: str) -> str:
    """A Markdown table: before, after and the rise, each a mean with its interval over seeds."""
    lines = [f"| arm | seeds | {metric} before | {metric} after | rise | rise of each seed | minutes a run |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, runs in curves.items():
        before, after = ([list(c.values())[i] for c in runs] for i in (0, -1))
        rise = [b - a for a, b in zip(before, after)]
        each = ", ".join(f"{r:+.2f}" for r in rise)
        took = sum(minutes[name]) / len(minutes[name])
        cells = [name, len(runs), shown(before), shown(after), shown(rise), each, f"{took:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def shown(values: list[float]) -> str:
    """Mean and 95% interval of one number a seed."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    mean, low, high = t_interval(values)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def shown_gain(ours: list[float], others: list[float]) -> str:
    """Mean and 95% interval of ours less others, one of each a seed."""
    gains = [a - b for a, b in zip(ours, others, strict=True)]
    if len(gains) < 2:
        return f"{gains[0]:+.3f}"
    mean, low, high = t_interval(gains)
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def plot(curves: dict[str, list[dict[int, float]]], what: str, path: pathlib.Path,
         limits: tuple[float, float] | None = (0.0, 1.0)) -> None:  # fmt: skip
    """Mean over seeds and its interval against the step, one colour an arm, within `limits` (None: as needed)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, runs in curves.items():
        steps = sorted(set.intersection(*(set(c) for c in runs)))
        at = [[c[step] for c in runs] for step in steps]
        (line,) = axes.plot(steps, [sum(values) / len(values) for values in at], marker="o", label=name)
        if len(runs) > 1:
            intervals = [t_interval(values) for values in at]
            low, high = [i[1] for i in intervals], [i[2] for i in intervals]
            axes.fill_between(steps, low, high, alpha=0.2, color=line.get_color())
    axes.set(xlabel="training step", ylabel=what, **({"ylim": limits} if limits else {}))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
