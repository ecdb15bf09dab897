"""`mlrl report`: what runs did, as one page that works anywhere, and as a short table for the terminal."""

from __future__ import annotations

import html
import importlib.resources
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from mlrl.folders import config_differences, write_atomically
from mlrl.report import curves
from mlrl.report.reading import RunLog, Study, grouped, read_run, without_seeds
from mlrl.types import Refused

__all__ = ["summary_table", "write_report"]


def write_report(run_folders: Sequence[str | os.PathLike], out_path: str | os.PathLike) -> pathlib.Path:
    """Writes one self-contained HTML page about runs: no network, no other file, light and dark, on any screen.

    Runs whose configurations differ in nothing but seeds are one experiment: a mean line with Student's 95% interval
    over its runs. Different experiments are overlaid, and their differing configuration lines listed.

    Args:
      run_folders: run folders, finished or not.
      out_path: the page; its folder is made when missing.

    Returns:
      The path of the page.

    Raises:
      Refused: there are no folders, one is not a run folder, or a file in one is malformed.
    """
    if not run_folders:
        raise Refused("name at least one run folder to report on")
    folders = list(dict.fromkeys(pathlib.Path(folder).resolve() for folder in run_folders))
    page = _page(grouped([read_run(folder) for folder in folders]))
    out = pathlib.Path(out_path)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"cannot write {out} ({error.strerror}): choose another path") from error
    write_atomically(out, page)
    return out


def summary_table(run_folder: str | os.PathLike) -> str:
    """A run in a few lines of text: evaluations over time, then the first and the last of what training logs.

    Raises:
      Refused: as `write_report`.
    """
    run = read_run(run_folder)
    seconds = sum(run.metrics.get("seconds/step", {}).values())
    lines = [f"{run.name}: {run.last_step} steps" + (f" in {_duration(seconds)}" if seconds > 0 else "")]
    rows = []
    for name, items in run.evaluations.items():
        shown = items if len(items) <= 4 else [items[0], items[len(items) // 2], items[-1]]
        cells = [f"step {item.step}: {_with_interval(item.value, item.low, item.high)}" for item in shown]
        rows.append([name, *cells])
    for name in ("reward", "accuracy", "loss", "length/mean", "tokens_per_second"):
        values = [v for _, v in sorted(run.metrics.get(name, {}).items()) if math.isfinite(v)]
        if values and not (name == "loss" and "reward" in run.metrics):
            tenth = max(1, len(values) // 10)
            first, last = (sum(part) / tenth for part in (values[:tenth], values[-tenth:]))
            rows.append([name, f"first {_number(first)}", f"last {_number(last)}"])
    columns = max(map(len, rows), default=0)
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(columns)]
    lines += ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def _page(studies: Sequence[Study]) -> str:
    """The HTML text. Everything from the runs is JSON inside a script, and reaches the page as text nodes only."""
    read = lambda name: importlib.resources.files(__name__).joinpath(name).read_text(encoding="utf-8")  # noqa: E731
    data = json.dumps(_data(studies), allow_nan=False, separators=(",", ":"))
    for character in "<>&":  # no text of a run can end the script
        data = data.replace(character, f"\\u{ord(character):04x}")
    title = html.escape(" and ".join(study.name for study in studies[:3]))
    return "\n".join([
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>{title} - mlrl report</title>",
        f"<style>\n{read('page.css')}</style></head>",
        "<body><main id=page><noscript>This page draws itself with JavaScript.</noscript></main>",
        f'<script type="application/json" id="data">{data}</script>',
        f"<script>\n{read('page.js')}</script></body></html>\n",
    ])  # fmt: skip


def _data(studies: Sequence[Study]) -> dict[str, Any]:
    runs = [run for study in studies for run in study.runs]
    browsed = [run for run in runs if run.samples]
    return {
        "studies": [{
            "name": study.name,
            "runs": [run.name for run in study.runs],
            "steps": max(run.last_step for run in study.runs),
            "seconds": sum(sum(v for v in run.metrics.get("seconds/step", {}).values() if math.isfinite(v))
                           for run in study.runs) / len(study.runs),
            "numbers": curves.final_numbers(study),
            "times": curves.times(study),
        } for study in studies],
        "sections": curves.panels(studies),
        "lengths": [curves.lengths(study.runs) for study in studies],
        "samples": [{"run": run.name, "rows": rows} for run, rows in zip(browsed, curves.samples(browsed))],
        "evaluations": _evaluation_tables(runs),
        "differences": [
            {"name": study.name, "lines": config_differences(*_texts(studies[0], study))} for study in studies[1:]
        ],
        "configs": [{"name": study.name, "text": study.runs[0].config} for study in studies],
    }  # fmt: skip


def _texts(first: Study, other: Study) -> tuple[str, str]:
    text = lambda study: "\n".join(without_seeds(study.runs[0].config))  # noqa: E731
    return text(first), text(other)


def _evaluation_tables(runs: Sequence[RunLog]) -> list[dict[str, Any]]:
    """A table for each run: steps down, measures across."""
    tables = []
    for run in runs:
        names = list(run.evaluations)
        steps = sorted({item.step for items in run.evaluations.values() for item in items})
        cells = {(item.step, name): item for name in names for item in run.evaluations[name]}
        text = lambda item: _with_interval(item.value, item.low, item.high) if item else ""  # noqa: E731
        rows = [[str(step), *(text(cells.get((step, name))) for name in names)] for step in steps]
        if rows:
            tables.append({"run": run.name, "head": ["step", *names], "rows": rows})
    return tables


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def _with_interval(value: float, low: float, high: float) -> str:
    if not math.isfinite(value):
        return "none"
    return _number(value) + (f" [{low:.3f}, {high:.3f}]" if math.isfinite(low) and math.isfinite(high) else "")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
