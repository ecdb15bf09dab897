"""Macro actions against single tokens, over several seeds at one budget of rollouts: one table, one plot.

    python -m experiments.ma_rlhf.compare FOLDER [--seeds 5] [--arms token fixed_5 ...] [--gin.NAME=VALUE ...]

Arms are experiments/ma_rlhf/NAME.gin; see experiments/arms.py for what is kept in FOLDER. Steps to parity are a seed's
first evaluation that is no worse than the last one of the same seed of `token`, the arm whose every token is an action.
Arms named learned_... have a learned reward, and are measured by `learned_token`, in a FOLDER of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments import arms
from experiments.study import plot, shown, shown_gain

NAMES = ("token", "token_long", "fixed_3", "fixed_5", "fixed_10", "totals", "perplexity",
         "learned_token", "learned_fixed_5", "learned_totals")  # fmt: skip
ARMS = {name: f"experiments/ma_rlhf/{name}.gin" for name in NAMES}
TASK, METRIC = "held_out_chains", "mean@2"


def main() -> None:
    """Runs what is missing, then writes FOLDER/table.md and FOLDER/plot.png."""
    folder, found = arms.from_command_line(__doc__.splitlines()[0], ARMS)
    curves = {name: [arms.evaluated(one, TASK, METRIC) for one in runs] for name, runs in found.items()}
    text = table(curves)
    plot(curves, f"held-out accuracy ({METRIC})", folder / "plot.png", limits=(0.0, 0.4))
    if any(name.startswith("learned_") for name in found):
        learned = {name: [rewards(one) for one in runs] for name, runs in found.items()}
        text += "\n" + table(learned, "reward")
        plot(learned, "learned reward", folder / "reward.png", limits=None)
    (folder / "table.md").write_text(text)
    print(text)


def rewards(one: Mapping[str, Any]) -> dict[int, float]:
    """Step -> the mean reward of the rows that were learned from since the step before, of the steps with evaluations.
    """
    logged, steps = one["log"]["reward"], sorted(map(int, one["evaluations"]))
    means = {step: sum(logged[before:step]) / (step - before) for before, step in zip(steps, steps[1:])}
    return {steps[0]: logged[0]} | means


def parity(one: dict[int, float], goal: float) -> int | None:
    """The first step, after the start, whose value is at least `goal`; None if there is none."""
    return next((step for step, value in sorted(one.items()) if step > 0 and value >= goal), None)


def table(curves: dict[str, list[dict[int, float]]], metric: str = METRIC) -> str:
    """A Markdown table: before, after, over training and less `token` there, and each seed's steps to parity."""
    name = "learned_token" if all(arm.startswith("learned_") for arm in curves) else "token"
    base: Any = curves.get(name)
    if base is None:
        raise SystemExit(f"ma_rlhf: the table is measured by the arm `{name}`: add it to --arms")
    lines = [f"| arm | seeds | {metric} before | after | rise | mean over training | less token | steps to its last |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, runs in curves.items():
        steps = [parity(one, its[max(its)]) for one, its in zip(runs, base)]
        each = ", ".join("never" if step is None else str(step) for step in steps)
        before, after = ([one[end(one)] for one in runs] for end in (min, max))
        whole, of_base = ([arms.over_training(one) for one in each] for each in (runs, base))
        cells = [name, len(runs), shown(before), shown(after), shown_gain(after, before), shown(whole),
                 shown_gain(whole, of_base), each]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
