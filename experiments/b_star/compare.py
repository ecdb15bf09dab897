"""B-STaR against its parts and its forerunners on countdown, over several seeds: one table, one plot.

    python -m experiments.b_star.compare FOLDER [--seeds 5] [--arms both star ...] [--gin.ROUNDS=8 ...]

Runs are made seed by seed, all arms of a seed after each other, and a finished one is not made again; `--table` makes
table and plot of the seeds that all arms have. Accuracies are held-out; what is said of samples is of the training rows
of a round, which each arm draws at its own temperature. Intervals are Student's t over seeds, 95%.
"""

from __future__ import annotations

import argparse
import json
import pathlib

from experiments import study
from mlrl.metrics import t_interval

ARMS = ("star", "raft", "online_rft", "online_rft_strict", "temperature_only", "threshold_only", "both")
UNIQUE, TEMPERATURE = "explore/unique_right_per_prompt", "configuration/temperature"
PRECISION = "selection/right_share"
ACCURACY, DIVERSITY = "mean@8", "pass@8"


def main() -> None:
    """Runs what is missing, then writes FOLDER/table.md and FOLDER/plot.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--table", action="store_true", help="run nothing: show the seeds that are done")
    arguments, overrides = parser.parse_known_args()
    place = lambda arm, seed: arguments.folder / f"{arm}-{seed}"  # noqa: E731
    if not arguments.table:
        for seed in range(arguments.seeds):
            for arm in arguments.arms:
                study.run(place(arm, seed), f"experiments/b_star/{arm}.gin", [f"--gin.SEED={seed}", *overrides])
    done = lambda seed: all((place(arm, seed) / "study.json").is_file() for arm in arguments.arms)  # noqa: E731
    seeds = [seed for seed in range(arguments.seeds) if done(seed)]
    if not seeds:
        parser.error(f"no seed has a finished run of every arm in {arguments.folder}")
    runs = {arm: [place(arm, seed) for seed in seeds] for arm in arguments.arms}
    text = "\n".join([table(runs), against_others(runs)])
    (arguments.folder / "table.md").write_text(text)
    plot(runs, arguments.folder / "plot.png")
    print(text)


def logged(folder: pathlib.Path, name: str) -> dict[int, float]:
    """Round -> a metric of its training rows; {} where the arm does not have it."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def table(runs: dict[str, list[pathlib.Path]]) -> str:
    """A Markdown table: held-out accuracies before and after, and the samples of the first and last round."""
    names = ("arm", "seeds", f"{ACCURACY} before", "after", "rise", f"{DIVERSITY} before", "after",
             "unique right a prompt, first and last round",
             "right among the selected, first and last round")  # fmt: skip
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for arm, folders in runs.items():
        accuracy, diversity = ([list(study.curve(f, m).values()) for f in folders] for m in (ACCURACY, DIVERSITY))
        at = lambda curves, i: study.shown([curve[i] for curve in curves])  # noqa: E731
        rise = study.shown([curve[-1] - curve[0] for curve in accuracy])
        of_rounds = [[list(logged(f, name).values()) for f in folders] for name in (UNIQUE, PRECISION)]
        cells = [arm, len(folders), at(accuracy, 0), at(accuracy, -1), rise, at(diversity, 0), at(diversity, -1)]
        cells += [f"{at(curves, 0)}, {at(curves, -1)}" for curves in of_rounds]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def against_others(runs: dict[str, list[pathlib.Path]]) -> str:
    """A Markdown table: what is held out after the last round, of `both` less each other arm, seed by seed."""
    if "both" not in runs:
        return ""
    last = lambda arm, metric: [list(study.curve(f, metric).values())[-1] for f in runs[arm]]  # noqa: E731
    lines = [f"| both less | {ACCURACY} | {DIVERSITY} |", "|---|---|---|"]
    for arm in (arm for arm in runs if arm != "both"):
        cells = [study.shown_gain(last("both", metric), last(arm, metric)) for metric in (ACCURACY, DIVERSITY)]
        lines.append("| " + " | ".join([arm, *cells]) + " |")
    return "\n".join(lines) + "\n"


def plot(runs: dict[str, list[pathlib.Path]], path: pathlib.Path) -> None:
    """Means over seeds, by round: held-out accuracy, different right answers, and the temperature chosen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    readers = (lambda f: study.curve(f, ACCURACY), lambda f: logged(f, UNIQUE), lambda f: logged(f, TEMPERATURE))
    labels = (f"held-out accuracy ({ACCURACY})", "different right answers a prompt (training)", "temperature chosen")
    for axes, read, label in zip(panels, readers, labels):
        for number, (arm, folders) in enumerate(runs.items()):
            curves = [curve for curve in map(read, folders) if curve]
            if not curves:
                continue
            rounds = sorted(set.intersection(*map(set, curves)))
            at = [t_interval([curve[r] for curve in curves]) for r in rounds]
            (line,) = axes.plot(rounds, [i.mean for i in at], marker="o", label=arm, color=f"C{number}")
            if len(curves) > 1:
                axes.fill_between(rounds, [i.low for i in at], [i.high for i in at], alpha=0.15, color=line.get_color())
        axes.set(xlabel="round", ylabel=label)
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
