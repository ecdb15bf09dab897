"""Runs the arms of a study: gin files of one online task, over several seeds, each arm compiled once.

All arms of a seed start from the same warm-started parameters. What is done is kept in the study's folder, one JSON
file for each arm and seed, and is not done again:

    evaluations  step -> task -> metric -> value, before, during and after training
    log          metric -> its value at every step
    seconds      of training and evaluation, compilation included in the first seed's
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import pickle
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from experiments.study import t_interval
from mlrl import main, meshes
from mlrl.evaluation import evaluator
from mlrl.loops import online, states
from mlrl.loops.start import random_parameters

LOGGED = ("accuracy", "reward", "length/mean", "curriculum/", "kl/", "entropy", "unscored")


def from_command_line(words: str, arms: Mapping[str, str]) -> tuple[pathlib.Path, dict[str, list[Any]]]:
    """(folder, what was found of every arm), by `FOLDER [--seeds 5] [--arms NAME ...] [--gin.STEPS=50 ...]`."""
    parser = argparse.ArgumentParser(description=words)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", choices=list(arms), default=list(arms))
    given, rest = parser.parse_known_args()
    overrides = dict(one.removeprefix("--gin.").split("=", 1) for one in rest)
    return given.folder, run(given.folder, {name: arms[name] for name in given.arms}, given.seeds, overrides)


def run(folder: pathlib.Path, arms: Mapping[str, str], seeds: int,
        overrides: Mapping[str, str]) -> dict[str, list[Any]]:  # fmt: skip
    """Does what is missing. Returns what was found of every arm, a list of one for each seed."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in arms.items():
        _arm(folder, name, file, seeds, overrides)
    return {name: [json.loads(_path(folder, name, seed).read_text()) for seed in range(seeds)] for name in arms}


def _path(folder: pathlib.Path, name: str, seed: int) -> pathlib.Path:
    return folder / f"{name}-{seed}.json"


def _arm(folder: pathlib.Path, name: str, file: str, seeds: int, overrides: Mapping[str, str]) -> None:
    missing = [seed for seed in range(seeds) if not _path(folder, name, seed).is_file()]
    if not missing:
        return
    experiment, _ = main.load(file, dict(overrides))
    parts = online.prepare(experiment)
    step = jax.jit(functools.partial(online.whole_step, parts), donate_argnums=0)
    draw = online.prompt_source(parts)
    evaluate = evaluator(experiment.evaluations, parts.model, experiment.rollout_fn, parts.reference_model)
    with meshes.use(experiment.mesh()):
        for seed in missing:
            state, began = _first_state(parts, folder, seed), time.time()
            evaluations, log = {}, {}
            for number in range(experiment.num_steps + 1):
                if evaluate.due(number, experiment.num_steps):
                    found = evaluate(state.params, number, experiment.num_steps, state.reference)
                    evaluations[number] = {task: {metric: one["value"] for metric, one in metrics.items()}
                                           for task, metrics in found.items()}  # fmt: skip
                if number < experiment.num_steps:
                    state, metrics, _ = step(state, draw(state, number))
                    for metric, value in jax.device_get(metrics).items():
                        if metric.startswith(LOGGED):
                            log.setdefault(metric, []).append(round(float(value), 6))
            done = {"evaluations": evaluations, "log": log, "seconds": round(time.time() - began, 1)}
            _path(folder, name, seed).write_text(json.dumps(done))
            print(f"{name} {seed}: {done['seconds']:.0f} s", flush=True)


def warm_start(path: pathlib.Path, prepare: Callable[[], online.Parts], seed: int) -> Any:
    """The parameters in `path`: an experiment's own warm start, made once for all arms of a seed."""
    if not path.is_file():
        parts, began = prepare(), time.time()
        params = parts.experiment.start(parts.model, jax.random.key(1000 + seed))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(jax.device_get(params)))
        print(f"{path.stem}: {time.time() - began:.0f} s", flush=True)
    return jax.tree.map(jax.numpy.asarray, pickle.loads(path.read_bytes()))


def _first_state(parts: online.Parts, folder: pathlib.Path, seed: int) -> Any:
    """The state of step 0 around the warm-started parameters of a seed."""
    start = warm_start(folder / f"warm-{seed}.pickle", lambda: parts, seed)
    params = random_parameters(parts.model, jax.random.key(seed)) | start
    kept = states.keeps_reference(parts)
    reference = parts.experiment.reference.params(params, parts.reference_model, jax.random.key(seed)) if kept else ()
    reference = jax.tree.map(jax.numpy.copy, reference)  # the parameters are donated
    judges = states.reward_model_params(parts, params, jax.random.key(seed))
    return states.state_from(parts, params, reference, judges).replace(key=jax.random.key(seed))


def evaluated(one: Mapping[str, Any], task: str, metric: str) -> dict[int, float]:
    """Step -> value of a metric of a task, or of a task's source as "task/source"."""
    return {int(step): found[task][metric] for step, found in one["evaluations"].items()}


def at_the_end(one: Mapping[str, Any], task: str, metric: str) -> float:
    """The last value of `evaluated`."""
    return list(evaluated(one, task, metric).values())[-1]


def over_training(curve: Mapping[int, float]) -> float:
    """The mean of a curve over training: the area under it, by trapezoids, over the number of steps."""
    points = list(curve.items())
    total = sum((b - a) * (x + y) / 2 for (a, x), (b, y) in zip(points, points[1:]))
    return total / (points[-1][0] - points[0][0])


def band(axes: Any, xs: list[float], rows: list[list[float]], label: str, **style: Any) -> None:
    """Draws the mean of rows [seeds, len(xs)] and its 95% interval."""
    intervals = [t_interval(list(column)) for column in zip(*rows)] if len(rows) > 1 else [(y, y, y) for y in rows[0]]
    mean, low, high = zip(*intervals)
    (line,) = axes.plot(xs, mean, label=label, **style)
    axes.fill_between(xs, low, high, alpha=0.15, color=line.get_color())


def smoothed(values: list[float], width: int) -> list[float]:
    """Means of up to `width` values that end at each."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]
