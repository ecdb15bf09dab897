"""Accuracy against length for every reward of lengths, over several seeds: one table, one plot.

    python -m experiments.laser.compare FOLDER [--seeds 5] [--arms laser linear ...] [--gin.STEPS=50 ...]

Arms are experiments/laser/NAME.gin; see experiments/arms.py for what is kept in FOLDER.
"""

from __future__ import annotations

import pathlib
from typing import Any

from experiments import arms
from experiments.study import shown

NAMES = ("accuracy", "truncation", "linear", "laser", "laser_d", "laser_de", "efficiency")
ARMS = {name: f"experiments/laser/{name}.gin" for name in NAMES}
TASK, CHAINS = "held_out", (3, 4, 5)
ACCURACY, LENGTH = "mean@4", "length_tokens"


def main() -> None:
    """Runs what is missing, then writes FOLDER/table.md and FOLDER/pareto.png."""
    folder, found = arms.from_command_line(__doc__.splitlines()[0], ARMS)
    text = table(found)
    (folder / "table.md").write_text(text)
    plot(found, folder / "pareto.png")
    print(text)


def source(operands: int) -> str:
    """The name under which chains of so many numbers are evaluated."""
    return f"{TASK}/plus_{operands}x1_scratchpad_test"


def table(found: dict[str, list[Any]]) -> str:
    """A Markdown table of accuracy and tokens, before and after; a mean and its interval over seeds."""
    lines = ["| arm | accuracy | tokens | tokens of 3, 4, 5 numbers | accuracy of 3, 4, 5 numbers |",
             "|---|---|---|---|---|"]  # fmt: skip
    first = next(iter(found.values()))
    before = [shown([arms.evaluated(one, TASK, metric)[0] for one in first]) for metric in (ACCURACY, LENGTH)]
    lines.append("| " + " | ".join(["before", *before, "", ""]) + " |")
    for name, runs in found.items():
        whole = [shown([arms.at_the_end(one, TASK, metric) for one in runs]) for metric in (ACCURACY, LENGTH)]
        each = [", ".join(f"{sum(arms.at_the_end(one, source(k), metric) for one in runs) / len(runs):.{digits}f}"
                          for k in CHAINS) for metric, digits in ((LENGTH, 1), (ACCURACY, 2))]  # fmt: skip
        lines.append("| " + " | ".join([name, *whole, *each]) + " |")
    return "\n".join(lines) + "\n"


def plot(found: dict[str, list[Any]], path: pathlib.Path) -> None:
    """For all chains, and for each of their lengths: the way of every arm from start to end, means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = {"all": TASK} | {f"{k} numbers": source(k) for k in CHAINS}
    figure, panels = plt.subplots(1, len(tasks), figsize=(4 * len(tasks), 4), layout="constrained", sharey=True)
    for axes, (title, task) in zip(panels, tasks.items()):
        for name, runs in found.items():
            tokens, right = ([list(arms.evaluated(one, task, metric).values()) for one in runs]
                             for metric in (LENGTH, ACCURACY))  # fmt: skip
            way = [[sum(column) / len(column) for column in zip(*rows)] for rows in (tokens, right)]
            (line,) = axes.plot(*way, alpha=0.4)
            axes.plot(way[0][-1], way[1][-1], "o", color=line.get_color(), label=name)
            ends = [[row[-1] for row in rows] for rows in (tokens, right)]
            axes.plot(*ends, ".", color=line.get_color(), alpha=0.5, markersize=4)
        axes.set(title=title, xlabel="tokens a completion")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"accuracy on held-out chains ({ACCURACY})")
    panels[-1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
