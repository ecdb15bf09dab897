"""Every policy-gradient method on two tasks, over several seeds, at one budget of rollouts: one table, one plot.

    python -m experiments.objectives.compare FOLDER [--seeds 8] [--steps 120] [--methods grpo rloo ...] [--tasks sums]

A method is gin/methods/NAME.gin with gin/tasks/TASK_study.gin. All methods of a seed start from the same warm-started
parameters and take the same learning rate. A step function is compiled once for all seeds of a method. What is done
is kept in FOLDER as one JSON file for each method and task, and is not done again.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import pickle
import time
from typing import Any

import jax

from experiments.study import shown, t_interval
from mlrl import main, meshes, runs
from mlrl.evaluation import evaluator
from mlrl.loops import online, states
from mlrl.loops.start import random_parameters

METHODS = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "remax", "opo",
           "maxrl", "gpg", "stable_reinforce", "nft", "spo", "trajectory_balance", "ppo_shared", "ppo",
           "random_reward")  # fmt: skip
TASKS = ("sums", "countdown")
# What an arm says besides its method and task. Rewards of 0 and 1 are far below a nat: without a temperature,
# trajectory balance would be content with a policy that is hardly better than its start.
LINES = {
    "random_reward": "from mlrl.loops import online\nfrom mlrl.rewards import graph\n"
                     "online.Experiment.reward_fn = @graph.random()\n",
    "trajectory_balance": "TEMPERATURE = 0.1\n",
}  # fmt: skip
FILES = {"random_reward": "grpo"}
METRIC = "mean@4"


def compare() -> None:
    """Runs what is missing, then writes FOLDER/table.md and FOLDER/rises.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for task in arguments.tasks:
        for method in arguments.methods:
            path = arguments.folder / f"{task}-{method}.json"
            if not path.is_file():
                path.write_text(json.dumps(arm(method, task, arguments)))
                print(f"{task} {method}: {shown_rise(json.loads(path.read_text()))}", flush=True)
    read = lambda task, method: json.loads((arguments.folder / f"{task}-{method}.json").read_text())  # noqa: E731
    found = {task: {method: read(task, method) for method in arguments.methods} for task in arguments.tasks}
    lines = [line for task, arms in found.items() for line in table(task, arms)]
    plot(found, arguments.folder / "rises.png")
    (arguments.folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def loaded(method: str, task: str, arguments: argparse.Namespace) -> online.Experiment:
    """The experiment of one arm."""
    path = arguments.folder / f"{task}-{method}.gin"
    path.write_text(
        "from __gin__ import dynamic_registration\n"
        f"include 'gin/methods/{FILES.get(method, method)}.gin'\ninclude 'gin/tasks/{task}_study.gin'\n"
        f"{LINES.get(method, '')}STEPS = {arguments.steps}\n"
    )
    return main.load(str(path))[0]


def warm(task: str, seed: int, arguments: argparse.Namespace) -> Any:
    """The policy's parameters that all methods of a seed start from; made once."""
    path = arguments.folder / f"{task}-warm-{seed}.pickle"
    if not path.is_file():
        experiment = loaded("grpo", task, arguments)
        parts = online.prepare(experiment)
        params = experiment.start(parts.model, jax.random.key(1000 + seed))
        path.write_bytes(pickle.dumps(jax.device_get(params)))
    return pickle.loads(path.read_bytes())


def arm(method: str, task: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All seeds of a method on a task: held-out curves, rows sampled, seconds."""
    starts = [warm(task, seed, arguments) for seed in range(arguments.seeds)]
    experiment = loaded(method, task, arguments)
    parts = online.prepare(experiment)
    draw = online.prompt_source(parts)
    step = jax.jit(functools.partial(online.whole_step, parts), donate_argnums=0)
    evaluate = evaluator(experiment.evaluations, parts.model, experiment.rollout_fn)
    curves, began, exchanged = [], time.time(), 0.0
    with meshes.use(experiment.mesh()):
        for seed, start in enumerate(starts):
            params = random_parameters(parts.model, jax.random.key(seed)) | jax.tree.map(jax.numpy.asarray, start)
            reference = parts.experiment.reference.params(params, parts.reference_model, jax.random.key(seed))
            state = states.state_from(parts, params, reference if states.keeps_reference(parts) else ())
            state, curve = state.replace(key=jax.random.key(seed)), {}
            for number in range(arguments.steps + 1):
                if evaluate.due(number, arguments.steps):
                    found = evaluate(state.params, number, arguments.steps)
                    curve[number] = runs._flat(found)[f"eval/{experiment.evaluations[0].task.name}/{METRIC}"]
                if number < arguments.steps:
                    state, metrics, _ = step(state, draw(state, number))
                    exchanged += float(metrics.get("refill/discarded_rows", 0.0))
            curves.append(curve)
    rows = experiment.prompts_per_step * experiment.group_size * arguments.steps + exchanged / arguments.seeds
    return {"curves": curves, "rows": rows, "seconds": (time.time() - began) / arguments.seeds}


def rises(one: dict[str, Any]) -> list[float]:
    """Last value minus first, for each seed."""
    return [list(curve.values())[-1] - list(curve.values())[0] for curve in one["curves"]]


def shown_rise(one: dict[str, Any]) -> str:
    """Mean rise over seeds with its interval."""
    return shown(rises(one))


def table(task: str, found: dict[str, Any]) -> list[str]:
    """A Markdown table of one task, the best method first."""
    lines = [f"| {task} | {METRIC} before | after | rise | rows sampled a seed | seconds a seed |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name, one in sorted(found.items(), key=lambda item: -sum(rises(item[1]))):
        before, after = ([list(c.values())[i] for c in one["curves"]] for i in (0, -1))
        cells = [name, shown(before), shown(after), shown_rise(one), f"{one['rows']:,.0f}", f"{one['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def plot(found: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
    """A panel for each task: the rise of every method with its interval, and each seed's as a dot; the best on top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    most = max(len(arms) for arms in found.values())
    figure, panels = plt.subplots(1, len(found), figsize=(5.5 * len(found), 1.2 + 0.26 * most), layout="constrained",
                                  squeeze=False)  # fmt: skip
    for axes, (task, arms) in zip(panels[0], found.items()):
        order = sorted(arms, key=lambda name: sum(rises(arms[name])))
        for y, name in enumerate(order):
            values = rises(arms[name])
            axes.plot(values, [y] * len(values), ".", color="tab:gray", alpha=0.5)
            if len(values) > 1:
                mean, low, high = t_interval(values)
                axes.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color="tab:blue", capsize=3)
        axes.set_yticks(range(len(order)), order)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.grid(alpha=0.3)
        axes.set(title=task, xlabel=f"rise of {METRIC} on held-out prompts")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    compare()
