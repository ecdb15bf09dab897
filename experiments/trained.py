"""Runs of a study that begin from shared warm starts, and what their metrics.jsonl holds."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import pickle
import time
from typing import Any

import jax

from mlrl import runs
from mlrl.loops import online

Curves = dict[str, dict[int, float]]  # metric -> step -> value


def started(experiment: online.Experiment, path: pathlib.Path) -> online.Experiment:
    """The experiment, begun from the parameters in `path`: its own warm start, made once for all arms of a seed."""
    if not path.is_file():
        parts = online.prepare(experiment)
        began = time.time()
        params = experiment.start(parts.model, jax.random.key(1000 + experiment.seed))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(jax.device_get(params)))
        print(f"{path.stem}: {time.time() - began:.0f} s", flush=True)
    params = pickle.loads(path.read_bytes())
    recording = runs.Recording(save_every_steps=0, samples_every_steps=0)
    return dataclasses.replace(
        experiment, start=lambda model, key: jax.tree.map(jax.numpy.asarray, params), recording=recording)  # fmt: skip


def read(folder: pathlib.Path) -> list[Curves]:
    """The curves of each seed."""
    found = []
    for path in sorted(folder.glob("seed_*/metrics.jsonl")):
        metrics: Curves = {}
        for line in map(json.loads, path.read_text().splitlines()):
            for name, value in line.items():
                metrics.setdefault(name, {})[line["step"]] = value
        found.append(metrics)
    return found


def number(curve: dict[int, float], part: str) -> float:
    """Of a curve: its "first" or "last" value, or the mean over the first or last quarter of steps, "early", "late"."""
    steps = sorted(curve)
    parts = {"first": steps[:1], "last": steps[-1:], "early": [step for step in steps if step <= 0.25 * steps[-1]],
             "late": [step for step in steps if step > 0.75 * steps[-1]]}  # fmt: skip
    return sum(curve[step] for step in parts[part]) / len(parts[part])


def intervals_at(curves: list[dict[int, Any]]) -> tuple[list[int], list[list[float]]]:
    """(steps, the values of all seeds at each), at the steps that every seed has."""
    steps = sorted(set.intersection(*(set(one) for one in curves)))
    return steps, [[one[step] for one in curves] for step in steps]
