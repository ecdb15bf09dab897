"""The arms of the Absolute Zero study over several seeds, at one budget of steps: a table and a plot.

    python -m experiments.absolute_zero.compare FOLDER [--seeds 5] [--arms absolute_zero ...] [--gin.STEPS=100 ...]

An arm is NAME.gin of this folder. All runs start from the same warm-started parameters, those of seed 0: a base model.
Runs that are done are kept and not done again; one that was cut is begun again.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import time

from experiments.study import shown, shown_gain
from experiments.trained import Curves, draw, number, read, started
from mlrl import main, runs
from mlrl.loops import online

ARMS = ("absolute_zero", "untrained_proposer", "random_programs")
GREEDY, SAMPLED = "eval/triplets_test/greedy", "eval/triplets_test/mean@4"
PANELS = ((GREEDY, "held-out triplets, greedy"), (SAMPLED, "held-out triplets, sampled"),
          ("reward/rate/some", "valid proposals that some attempts solve"))  # fmt: skip


def compare() -> None:
    """Runs what is missing, then writes FOLDER/table.md and FOLDER/plot.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    arguments, rest = parser.parse_known_args()
    overrides = dict(word.removeprefix("--gin.").split("=", 1) for word in rest)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for seed in range(arguments.seeds):  # seed by seed, so that what is cut is fair to all arms
        for arm in arguments.arms:
            run(arguments.folder, arm, seed, overrides)
    found = {arm: read(arguments.folder / arm) for arm in arguments.arms}
    text = table(found)
    (arguments.folder / "table.md").write_text(text)
    plot(found, arguments.folder / "plot.png")
    print(text)


def run(folder: pathlib.Path, arm: str, seed: int, overrides: dict[str, str]) -> None:
    """One seed of an arm, unless it is done."""
    own = folder / arm / f"seed_{seed}"
    if (own / "done").is_file():
        return
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    file = f"experiments/absolute_zero/{arm}.gin"
    experiment = started(main.load(file, overrides | {"SEED": str(seed)})[0], folder / "warm.pickle")
    began = time.time()
    with runs.Run(own, experiment.recording) as one:
        online.train(experiment, one)
    (own / "done").touch()
    print(f"{arm} {seed}: {time.time() - began:.0f} s", flush=True)


def table(found: dict[str, list[Curves]]) -> str:
    """A Markdown table: accuracies on held-out triplets, and what was proposed in the last quarter of the steps."""
    lines = ["| arm | seeds | greedy before | greedy after | rise | sampled before | sampled after | rise "
             "| proposals valid | of these solved by some | never | always |", "|---" * 12 + "|"]  # fmt: skip
    for arm, seeds in found.items():
        cells = [arm, str(len(seeds))]
        for metric in (GREEDY, SAMPLED):
            before, after = ([number(one[metric], part) for one in seeds] for part in ("first", "last"))
            cells += [shown(before), shown(after), shown_gain(after, before)]
        for name in ("propose/valid", "rate/some", "rate/none", "rate/all"):
            has = [one[f"reward/{name}"] for one in seeds if f"reward/{name}" in one]
            cells.append(shown([number(curve, "late") for curve in has]) if has else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(found: dict[str, list[Curves]], path: pathlib.Path) -> None:
    """A panel for each measure: mean over seeds and its interval against the step, one colour an arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, places = plt.subplots(1, len(PANELS), figsize=(13, 3.6), layout="constrained")
    for axes, (metric, title) in zip(places, PANELS):
        for i, (arm, seeds) in enumerate(found.items()):
            if any(metric not in one for one in seeds):
                continue
            draw(axes, [one[metric] for one in seeds], arm, color=f"C{i}")
        axes.set(title=title, xlabel="training step")
        axes.grid(alpha=0.3)
    places[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    compare()
