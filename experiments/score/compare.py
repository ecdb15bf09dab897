"""The arms of the self-correction study over several seeds, at one budget of rollouts: a table and a plot.

    python -m experiments.score.compare FOLDER [--seeds 5] [--gin.NAME=VALUE ...]

The base of each seed is made first. Then each arm is `mlrl train --seeds`, one program for all seeds; supervised runs
are made one by one. A finished run is not run again. The numbers are of the last step of each run, from results.json.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import time

from experiments.study import run, shown, t_interval

HERE = "experiments/score"
SUPERVISED = ("base", "pair_sft")
AFTER_STAGE_ONE = ("score", "no_bonus", "small_bonus")
ARMS = {"base": "base", "pair_sft": "Pair-SFT", "plain": "plain multi-turn RL", "no_stage1": "SCoRe without stage I",
        "no_bonus": "SCoRe without the bonus", "small_bonus": "SCoRe, bonus 1",
        "score": "SCoRe, bonus 10", "ufo": "UFO"}  # fmt: skip
ORDER = ("base", "plain", "no_stage1", "stage1", "score", "no_bonus", "small_bonus", "ufo", "pair_sft")
COLUMNS = ("accuracy@t1", "accuracy@t2", "delta", "i->c", "c->i", "CL", "CS", "RSS", "solved", "unchanged")
PAIRED = ("accuracy@t1", "accuracy@t2", "delta", "CL", "CS")


def main() -> None:
    """Runs what is missing, then writes FOLDER/table.md and FOLDER/plot.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=5)
    arguments, overrides = parser.parse_known_args()
    for arm in ORDER:
        trained(arm, arguments.folder, arguments.seeds, overrides)
    of = lambda arm: [last(arguments.folder, arm, seed) for seed in range(arguments.seeds)]  # noqa: E731
    found = {arm: of(arm) for arm in ARMS if arm != "base"}
    found = {"base": [first(arguments.folder, seed) for seed in range(arguments.seeds)]} | found
    text = "\n".join(table(found, "sampled/") + table(found, "") + against_plain(found))
    (arguments.folder / "table.md").write_text(text)
    plot(found, arguments.folder / "plot.png")
    print(text)


def trained(arm: str, folder: pathlib.Path, seeds: int, overrides: list[str]) -> None:
    """All seeds of an arm, those of earlier runs that it starts from being there."""
    given = [] if arm == "base" else [f"--gin.BASE={folder}/base/seed_{{seed}}"]
    given += [f"--gin.STAGE_ONE={folder}/stage1/seed_{{seed}}"] if arm in AFTER_STAGE_ONE else []
    file, own = f"{HERE}/{arm}.gin", folder / arm
    if arm in SUPERVISED:
        for seed in range(seeds):
            run(own / f"seed_{seed}", file, [f"--gin.SEED={seed}", *given, *overrides])
    elif not (own / "study.json").is_file():
        command = [sys.executable, "-m", "mlrl", "train", file, "--run_dir", str(own), "--seeds", str(seeds)]
        print(" ".join(command[2:] + given + overrides), flush=True)
        start = time.time()
        subprocess.run([*command, *given, *overrides], check=True, stderr=subprocess.DEVNULL)
        (own / "study.json").write_text(json.dumps({"minutes": (time.time() - start) / 60}))


def evaluations(folder: pathlib.Path, arm: str, seed: int) -> list[dict]:
    """What results.json says of a run on held-out prompts, by step."""
    found = json.loads((folder / arm / f"seed_{seed}" / "results.json").read_text())["evaluations"]
    return sorted((e for e in found if e["task"].startswith("held_out")), key=lambda e: e["step"])


def values(entry: dict) -> dict[str, float]:
    """metric -> value."""
    return {name: metric["value"] for name, metric in entry["metrics"].items()}


def last(folder: pathlib.Path, arm: str, seed: int) -> dict[str, float]:
    """The metrics at the end of a run."""
    return values(evaluations(folder, arm, seed)[-1])


def first(folder: pathlib.Path, seed: int) -> dict[str, float]:
    """The base's metrics: those before the first step of a run that starts from it."""
    return values(evaluations(folder, "plain", seed)[0])


def table(found: dict[str, list[dict[str, float]]], prefix: str) -> list[str]:
    """A Markdown table: each measure a mean over seeds with its interval."""
    lines = ["| " + " | ".join(["sampled" if prefix else "greedy", *COLUMNS]) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for arm, seeds in found.items():
        cells = [shown([one[prefix + name] for one in seeds]) for name in COLUMNS]
        lines.append("| " + " | ".join([ARMS[arm], *cells]) + " |")
    return [*lines, ""]


def against_plain(found: dict[str, list[dict[str, float]]]) -> list[str]:
    """A Markdown table of sampled measures less those of plain multi-turn RL on the same base, seed by seed."""
    lines = ["| sampled, less plain multi-turn RL | " + " | ".join(PAIRED) + " |", "|---" * (1 + len(PAIRED)) + "|"]
    for arm in (arm for arm in found if arm not in ("base", "plain")):
        pairs = list(zip(found[arm], found["plain"], strict=True))
        cells = [shown([a["sampled/" + name] - b["sampled/" + name] for a, b in pairs]) for name in PAIRED]
        lines.append("| " + " | ".join([ARMS[arm], *cells]) + " |")
    return [*lines, ""]


def plot(found: dict[str, list[dict[str, float]]], path: pathlib.Path) -> None:
    """A panel for each of delta, CL and CS of sampled pairs: the mean with its interval, and each seed as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 4, figsize=(12, 3), layout="constrained", sharey=True)
    labels = {"accuracy@t2": "accuracy of second attempts", "delta": "delta: second less first", "CL": "CL: right kept",
              "CS": "CS: wrong mended"}  # fmt: skip
    for axes, (name, label) in zip(panels, labels.items()):
        for y, arm in enumerate(reversed(list(found))):
            points = [one["sampled/" + name] for one in found[arm]]
            axes.plot(points, [y] * len(points), ".", color="tab:gray", alpha=0.5)
            if len(points) > 1:
                mean, low, high = t_interval(points)
                axes.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color="tab:blue", capsize=3)
        axes.set_yticks(range(len(found)), [ARMS[arm] for arm in reversed(list(found))])
        axes.grid(alpha=0.3)
        axes.set(xlabel=label)
    panels[1].axvline(0, color="black", linewidth=0.8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
