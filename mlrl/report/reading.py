"""Reads run folders, and groups runs that differ in nothing but the seed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlrl.folders import statements
from mlrl.types import Refused


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """One measured number: at which step, and its 95% interval over prompts (NaN where none was recorded)."""

    step: int
    value: float
    low: float = math.nan
    high: float = math.nan


@dataclasses.dataclass(frozen=True)
class RunLog:
    """What one run folder says.

    metrics      {name: {step: value}}; a step that was logged twice counts once, as it was logged last
    evaluations  {"task metric": [Evaluated, ...]}, by step
    samples      rows of samples.jsonl, by step
    config       the text of config.gin
    """

    folder: pathlib.Path
    metrics: Mapping[str, Mapping[int, float]]
    evaluations: Mapping[str, Sequence[Evaluated]]
    samples: Sequence[Mapping[str, Any]]
    config: str

    @property
    def name(self) -> str:
        folder = self.folder.resolve()
        return f"{folder.parent.name}/{folder.name}" if "=" in folder.parent.name else folder.name  # of a --sweep

    @property
    def last_step(self) -> int:
        return max((step for curve in self.metrics.values() for step in curve), default=0)


@dataclasses.dataclass(frozen=True)
class Study:
    """Runs of one experiment: their configurations differ in nothing but seeds."""

    name: str
    runs: Sequence[RunLog]


def read_run(folder: str | os.PathLike) -> RunLog:
    """Reads a run folder, also of a run that is still going on.

    Raises:
      Refused: it is not a run folder, nothing was logged yet, or a line or file in it is malformed (which one is said).
    """
    folder = pathlib.Path(folder)
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise Refused(f"{folder} is not a run folder: it has no metrics.jsonl")
    metrics: dict[str, dict[int, float]] = {}
    for row in _json_lines(path):
        for name, value in row.items():
            if name != "step" and (value is None or isinstance(value, int | float)):
                metrics.setdefault(name, {})[row["step"]] = math.nan if value is None else float(value)
    if not metrics:
        raise Refused(f"{path} has no metrics yet: let the run take a step first")
    samples_path, config_path = folder / "samples.jsonl", folder / "config.gin"
    samples = sorted(_json_lines(samples_path), key=lambda row: row["step"]) if samples_path.is_file() else []
    config = config_path.read_text() if config_path.is_file() else ""
    return RunLog(folder, metrics, _evaluations(folder / "results.json", metrics), samples, config)


def _json_lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            return  # being written, or cut by a kill
        try:
            row = json.loads(line, parse_constant=lambda _: None)
        except ValueError as error:
            raise Refused(f"{path}:{number} is not JSON ({error}): mend or delete the line") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise Refused(f"{path}:{number} is not an object with a step: mend or delete the line")
        yield row


def _evaluations(path: pathlib.Path, metrics: Mapping[str, Mapping[int, float]]) -> dict[str, list[Evaluated]]:
    """From results.json; what only the metrics know is added without an interval."""
    found: dict[str, dict[int, Evaluated]] = {}
    for name, curve in metrics.items():
        if name.startswith("eval/") and name.count("/") >= 2:
            task, metric = name[len("eval/") :].rsplit("/", 1)
            found[f"{task} {metric}"] = {step: Evaluated(step, value) for step, value in curve.items()}
    if path.is_file():
        number = lambda x: math.nan if x is None else float(x)  # noqa: E731
        try:
            for entry in json.loads(path.read_text())["evaluations"]:
                for metric, r in entry["metrics"].items():
                    r = r if isinstance(r, Mapping) else {"value": r}
                    item = Evaluated(entry["step"], *(number(r.get(key)) for key in ("value", "low", "high")))
                    found.setdefault(f"{entry['task']} {metric}", {})[item.step] = item
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refused(f"{path} is malformed ({type(error).__name__}: {error}): run `mlrl eval` again") from error
    return {name: [by_step[step] for step in sorted(by_step)] for name, by_step in found.items()}


def grouped(runs: Sequence[RunLog]) -> list[Study]:
    """Runs by configuration without its seeds, in the order given; a run without a configuration stands alone."""
    groups: dict[Any, list[RunLog]] = {}
    for run in runs:
        key = tuple(without_seeds(run.config)) if run.config else str(run.folder)
        groups.setdefault(key, []).append(run)
    names = [_common_name([run.name for run in group]) for group in groups.values()]
    unique = []
    for i, name in enumerate(names):
        twins = names[:i].count(name)
        unique.append(f"{name} ({twins + 1})" if twins else name)
    return [Study(name, group) for name, group in zip(unique, groups.values())]


def without_seeds(config: str) -> list[str]:
    """The statements of a gin text that do not bind a seed (`SEED`, `Experiment.seed`, ...)."""
    return [s for s in statements(config) if not re.match(r"\S*seed\s*=", s, re.IGNORECASE)]


def _common_name(names: Sequence[str]) -> str:
    """What the names share, without a dangling "seed" or number: quickstart for quickstart-seed0 and -seed1."""
    if len(names) == 1:
        return names[0]
    shared = os.path.commonprefix(list(names))
    return re.sub(r"[-_./ ]*(seed|run|s)?[-_=. ]*\d*$", "", shared) or names[0]
