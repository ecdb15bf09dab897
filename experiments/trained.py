"""Runs of a study that begin from shared warm starts, and what their metrics.jsonl holds."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from experiments.arms import band, warm_start
from mlrl import runs
from mlrl.loops import online

Curves = dict[str, dict[int, float]]  # metric -> step -> value


def started(experiment: online.Experiment, path: pathlib.Path) -> online.Experiment:
    """The experiment, begun from the parameters in `path`: its own warm start, made once for all arms of a seed."""
    params = warm_start(path, lambda: online.prepare(experiment), experiment.seed)
    recording = runs.Recording(save_every_steps=0, samples_every_steps=0)
    return dataclasses.replace(experiment, start=lambda model, key: params, recording=recording)


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
    """Of a curve: its "first" or "last" value, or the mean over the "late" quarter of the steps."""
    steps = sorted(curve)
    parts = {"first": steps[:1], "last": steps[-1:], "late": [step for step in steps if step > 0.75 * steps[-1]]}
    return sum(curve[step] for step in parts[part]) / len(parts[part])


def draw(axes: Any, curves: list[dict[int, float]], label: str, **style: Any) -> None:
    """The mean and interval of several seeds' curves, at the steps that all have."""
    steps = sorted(set.intersection(*(set(one) for one in curves)))
    band(axes, steps, [[one[step] for step in steps] for one in curves], label, **style)
