"""True quality against what a judge says of it, for self-judging and its controls, over several seeds.

    python -m experiments.ssr_zero.compare FOLDER [--seeds 5] [--arms ssr_zero random ...] [--gin.STEPS=50 ...]

Arms are experiments/ssr_zero/NAME.gin; see experiments/arms.py for what is kept in FOLDER.
"""

from __future__ import annotations

import pathlib
from typing import Any

from experiments import arms
from experiments.study import shown, shown_gain

NAMES = ("ssr_zero", "frozen_judge", "ssr_x", "reference", "random")
ARMS = {name: f"experiments/ssr_zero/{name}.gin" for name in NAMES}
TRUTH = {"ngram_overlap": "quality", "mean@4": "exactly right", "greedy": "greedy right"}
JUDGE = {"auc": "AUC", "correlation": "correlation", "grade": "grade of fixed completions",
         "own_grade": "grade of its own", "unreadable": "unreadable"}  # fmt: skip
CONTROLS = ("frozen_judge", "random", "reference")


def main() -> None:
    """Runs what is missing, then writes FOLDER/table.md and FOLDER/hacking.png."""
    folder, found = arms.from_command_line(__doc__.splitlines()[0], ARMS)
    text = "\n".join([table(found, "held_out", TRUTH), table(found, "judged", JUDGE), against_controls(found)])
    (folder / "table.md").write_text(text)
    plot(found, folder / "hacking.png")
    print(text)


def table(found: dict[str, list[Any]], task: str, metrics: dict[str, str]) -> str:
    """A Markdown table of metrics of a task, before and after; a mean and its interval over seeds."""
    lines = ["| arm | " + " | ".join(metrics.values()) + " |", "|---" * (1 + len(metrics)) + "|"]
    first = next(iter(found.values()))
    before = [shown([arms.evaluated(one, task, metric)[0] for one in first]) for metric in metrics]
    lines.append("| " + " | ".join(["before", *before]) + " |")
    for name, runs in found.items():
        cells = [shown([arms.at_the_end(one, task, metric) for one in runs]) for metric in metrics]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def against_controls(found: dict[str, list[Any]]) -> str:
    """A Markdown table of the quality of self-judging arms less that of each control, seed by seed."""
    controls = [name for name in CONTROLS if name in found]
    heads = ["quality, less that of", "before", *controls]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    of = lambda name: [arms.at_the_end(one, "held_out", "ngram_overlap") for one in found[name]]  # noqa: E731
    for name in (name for name in found if name != "random"):
        before = [arms.evaluated(one, "held_out", "ngram_overlap")[0] for one in found[name]]
        others = [before, *(of(control) for control in controls)]
        cells = ["" if name == other else shown_gain(of(name), theirs)
                 for other, theirs in zip(["before", *controls], others)]  # fmt: skip
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def plot(found: dict[str, list[Any]], path: pathlib.Path) -> None:
    """True quality of held-out samples; grades and truth of training's samples; how well the policy still judges."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (truth, believed, judging) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for name, runs in found.items():
        for axes, task, metric in ((truth, "held_out", "ngram_overlap"), (judging, "judged", "auc")):
            curves = [arms.evaluated(one, task, metric) for one in runs]
            arms.band(axes, list(curves[0]), [list(curve.values()) for curve in curves], name)
        if "reward/judge" in runs[0]["log"]:
            grades, quality = ([arms.smoothed(one["log"][part], 10) for one in runs]
                               for part in ("reward/judge", "reward/ngram_overlap"))  # fmt: skip
            steps = list(range(1, len(grades[0]) + 1))
            arms.band(believed, steps, grades, f"{name}: its grade")
            colour = believed.get_lines()[-1].get_color()
            arms.band(believed, steps, quality, f"{name}: the truth", color=colour, linestyle="--")
    truth.set(xlabel="step", ylabel="true quality of held-out samples")
    believed.set(xlabel="step", ylabel="of training's samples")
    judging.set(xlabel="step", ylabel="AUC as a judge, held-out completions")
    for axes in (truth, believed, judging):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
