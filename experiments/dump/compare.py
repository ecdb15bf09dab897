"""DUMP beside other curricula on sums of several lengths, over several seeds: one table, one plot.

    python -m experiments.dump.compare FOLDER [--seeds 5] [--arms uniform dump ...] [--gin.STEPS=50 ...]

Arms are experiments/dump/NAME.gin; see experiments/arms.py for what is kept in FOLDER.
"""

from __future__ import annotations

import pathlib
from typing import Any

from experiments import arms
from experiments.study import shown

NAMES = ("uniform", "easy_to_hard", "dump", "dump_without_bonus")
ARMS = {name: f"experiments/dump/{name}.gin" for name in NAMES}
TASK, METRIC, DIGITS = "held_out", "mean@4", (1, 2, 3)
TARGET = 0.45  # of the accuracy over all sums


def main() -> None:
    """Runs what is missing, then writes FOLDER/table.md and FOLDER/curricula.png."""
    folder, found = arms.from_command_line(__doc__.splitlines()[0], ARMS)
    text = table(found)
    (folder / "table.md").write_text(text)
    plot(found, folder / "curricula.png")
    print(text)


def source(digits: int) -> str:
    """The name under which sums of so many digits are evaluated."""
    return f"{TASK}/plus_2x{digits}_reversed_test"


def weights(one: dict[str, Any], digits: int) -> list[float]:
    """The sampling weight of sums of so many digits at every step."""
    return one["log"][f"curriculum/plus_2x{digits}_reversed"]


def steps_to_target(one: dict[str, Any]) -> float:
    """The first evaluated step at which the accuracy over all sums is TARGET; infinity if there is none."""
    return next((step for step, value in arms.evaluated(one, TASK, METRIC).items() if value >= TARGET), float("inf"))


def area(one: dict[str, Any]) -> float:
    """The mean accuracy over training."""
    return arms.over_training(arms.evaluated(one, TASK, METRIC))


def table(found: dict[str, list[Any]]) -> str:
    """A Markdown table: accuracy at the end and over training, each source's, and the steps to TARGET of each seed."""
    lines = [f"| arm | accuracy at the end | mean over training | of 1, 2, 3 digits | steps to {TARGET} of each seed |",
             "|---|---|---|---|---|"]  # fmt: skip
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    start = next(iter(found.values()))
    begun = ", ".join(f"{mean([arms.evaluated(one, source(d), METRIC)[0] for one in start]):.2f}" for d in DIGITS)
    lines.append(f"| before | {shown([arms.evaluated(one, TASK, METRIC)[0] for one in start])} | | {begun} | |")
    for name, runs in found.items():
        each = ", ".join(f"{mean([arms.at_the_end(one, source(d), METRIC) for one in runs]):.2f}" for d in DIGITS)
        taken = ", ".join("never" if steps == float("inf") else str(steps) for steps in map(steps_to_target, runs))
        cells = [name, shown([arms.at_the_end(one, TASK, METRIC) for one in runs]), shown([area(one) for one in runs]),
                 each, taken]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(found: dict[str, list[Any]], path: pathlib.Path) -> None:
    """Above the accuracy over all sums and of each length, below the sampling weights of each arm, over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = {"all": TASK} | {f"{d} digits": source(d) for d in DIGITS}
    width = max(len(tasks), len(found))
    figure, (above, below) = plt.subplots(2, width, figsize=(3.4 * width, 6), layout="constrained", sharey="row",
                                          squeeze=False)  # fmt: skip
    for axes, (title, task) in zip(above, tasks.items()):
        for name, runs in found.items():
            steps = list(arms.evaluated(runs[0], task, METRIC))
            arms.band(axes, steps, [list(arms.evaluated(one, task, METRIC).values()) for one in runs], name)
        axes.set(title=title, ylim=(0, 1))
    above[0].set_ylabel(f"held-out accuracy ({METRIC})")
    above[0].legend(fontsize=8)
    for axes, (name, runs) in zip(below, found.items()):
        for digits in DIGITS:
            rows = [arms.smoothed(weights(one, digits), 5) for one in runs]
            arms.band(axes, list(range(1, len(rows[0]) + 1)), rows, f"{digits} digits")
        axes.set(title=name, xlabel="training step")
    below[0].set_ylabel("sampling weight")
    below[0].legend(fontsize=8)
    for axes in (*above[: len(tasks)], *below[: len(found)]):
        axes.grid(alpha=0.3)
    for axes in (*above[len(tasks) :], *below[len(found) :]):
        axes.set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
