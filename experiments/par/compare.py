"""Proxy and true reward over training, under every shaping of the proxy, over several seeds: one table, one plot.

    python -m experiments.par.compare FOLDER [--seeds 5] [--arms none par ...] [--gin.STEPS=50 ...]

Arms are experiments/par/NAME.gin; see experiments/arms.py for what is kept in FOLDER.
"""

from __future__ import annotations

import pathlib
from typing import Any

from experiments import arms
from experiments.study import shown

NAMES = ("none", "par", "par_gentle", "clip_to_deviation", "standardize", "minmax", "centred_linear")
ARMS = {name: f"experiments/par/{name}.gin" for name in NAMES}
TASK, TRUTH, COMMAS = "held_out", "mean@4", "token_count"
WORTH = (4.0, 0.4)  # as in none.gin


def main() -> None:
    """Runs what is missing, then writes FOLDER/table.md and FOLDER/hacking.png."""
    folder, found = arms.from_command_line(__doc__.splitlines()[0], ARMS)
    text = table(found)
    (folder / "table.md").write_text(text)
    plot(found, folder / "hacking.png")
    print(text)


def truth(one: dict[str, Any]) -> list[float]:
    """The accuracy at each evaluation."""
    return list(arms.evaluated(one, TASK, TRUTH).values())


def proxy(one: dict[str, Any]) -> list[float]:
    """The proxy at each evaluation, from its parts."""
    commas = arms.evaluated(one, TASK, COMMAS).values()
    return [WORTH[0] * right + WORTH[1] * count for right, count in zip(truth(one), commas)]


def table(found: dict[str, list[Any]]) -> str:
    """A Markdown table: both rewards at the end, and how far the truth fell below its best; means over seeds."""
    first = next(iter(found.values()))
    lines = ["| arm | true reward | proxy | commas | true reward, best less last |", "|---|---|---|---|---|"]
    lines.append(f"| before | {shown([truth(one)[0] for one in first])} | {shown([proxy(one)[0] for one in first])} | "
                 f"{shown([arms.evaluated(one, TASK, COMMAS)[0] for one in first])} | |")  # fmt: skip
    for name, runs in found.items():
        cells = [shown([truth(one)[-1] for one in runs]), shown([proxy(one)[-1] for one in runs]),
                 shown([arms.at_the_end(one, TASK, COMMAS) for one in runs]),
                 shown([max(truth(one)) - truth(one)[-1] for one in runs])]  # fmt: skip
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def plot(found: dict[str, list[Any]], path: pathlib.Path) -> None:
    """The true reward and the proxy against the step, and one against the other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (of_truth, of_proxy, both) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for name, runs in found.items():
        steps = list(arms.evaluated(runs[0], TASK, TRUTH))
        arms.band(of_truth, steps, [truth(one) for one in runs], name)
        arms.band(of_proxy, steps, [proxy(one) for one in runs], name)
        mean = [[sum(column) / len(column) for column in zip(*map(of, runs))] for of in (proxy, truth)]
        both.plot(*mean, marker=".", label=name)
    of_truth.set(xlabel="training step", ylabel=f"true reward ({TRUTH})", ylim=(0, 1))
    of_proxy.set(xlabel="training step", ylabel="proxy")
    both.set(xlabel="proxy", ylabel=f"true reward ({TRUTH})", ylim=(0, 1))
    for axes in (of_truth, of_proxy, both):
        axes.grid(alpha=0.3)
    both.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
