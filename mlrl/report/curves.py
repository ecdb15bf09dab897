"""What the report draws, as plain numbers: curves with intervals, final numbers, times, lengths, samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from mlrl.report.reading import Evaluated, RunLog, Study

MAX_POINTS = 500  # per curve; longer ones are averaged in bins
MAX_SAMPLED_TOKENS = 150_000  # in the whole page

# Panels in the order they are drawn: section -> the metrics in it, by full name or by "prefix/".
SECTIONS = {
    "Learning": ("reward", "accuracy"),
    "Reward parts": ("reward/", "unscored/"),
    "Policy": ("loss", "entropy", "kl/", "ratio/", "grad_norm", "bad_updates", "skipped_updates", "lr", "loss/",
               "value/"),
    "Rows": ("length/", "truncated_share", "unscored_share", "zero_spread_share", "kept_share", "padding_share"),
    "Speed": ("tokens_per_second", "seconds/step", "compilations", "tokens"),
}
NOTES = {
    "reward": "mean over the scored rows of a step, shaping included",
    "accuracy": "share of the sampled completions whose outcome, before shaping, is above 0.5",
    "entropy": "of the policy, per token, in nats",
    "ratio/mean": "importance ratio; 1 when nothing moved since sampling",
    "ratio/clipped_share": "share of tokens outside the clipping range",
    "kl/old": "policy against the sampler, raw, per token",
    "kl/reference": "policy against the frozen reference, raw, per token",
    "value/explained_variance": "of the returns, by the values before the update; 1 is perfect, 0 a constant",
    "grad_norm": "before clipping",
    "bad_updates": "updates skipped in a row, because they were not finite",
    "skipped_updates": "updates of this step that were skipped, because they were not finite",
    "length/mean": "tokens in a completion",
    "length/max": "tokens in the longest completion",
    "truncated_share": "completions that were full before they ended",
    "unscored_share": "rows that no reward could judge",
    "zero_spread_share": "rows in groups of equal outcomes, which teach a group baseline nothing",
    "kept_share": "scored rows that stayed in the loss",
    "padding_share": "columns of the update that hold no token",
    "tokens_per_second": "sampled tokens by the time of the whole step",
    "seconds/step": "the whole step, compilation included",
    "compilations": "programs compiled so far; flat after the first steps",
    "tokens": "sampled in a step",
}


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of independent runs: Student's 95% interval, mean -+ t(n-1) * std(ddof 1) / sqrt(n).

    Values that are not finite are left out; the interval of fewer than two values is (mean, NaN, NaN).
    """
    x = np.asarray([v for v in values if math.isfinite(v)], float)
    if x.size == 0:
        return math.nan, math.nan, math.nan
    if x.size == 1:
        return float(x[0]), math.nan, math.nan
    half = float(special.stdtrit(x.size - 1, 0.975) * x.std(ddof=1) / math.sqrt(x.size))
    return float(x.mean()), float(x.mean()) - half, float(x.mean()) + half


def curve(runs: Sequence[RunLog], name: str) -> dict[str, list] | None:
    """A metric over the steps of several runs: mean, interval, and how many runs have the step.

    Two runs get no band here: Student's interval is then 13 times as wide as the runs are apart, and hides the lines.
    """
    logged = [run.metrics[name] for run in runs if name in run.metrics]
    steps = sorted({step for by_step in logged for step in by_step})
    if not steps:
        return None
    table = np.asarray([[by_step.get(step, math.nan) for step in steps] for by_step in logged])
    points = np.asarray([[step, *interval(column)] for step, column in zip(steps, table.T)])
    counts = np.isfinite(table).sum(axis=0)
    points[counts < 3, 2:] = math.nan
    size = math.ceil(len(points) / MAX_POINTS)
    bins = [points[i : i + size] for i in range(0, len(points), size)]
    x, mean, low, high = zip(*(_means(b) for b in bins))
    count = [int(counts[i : i + size].min()) for i in range(0, len(points), size)]
    return {"x": _plain(x), "mean": _plain(mean), "low": _plain(low), "high": _plain(high), "n": count}


def evaluation_curve(runs: Sequence[RunLog], name: str) -> dict[str, list] | None:
    """As `curve`, for an evaluation; one run keeps the interval it was measured with, over prompts."""
    by_step: dict[int, list[Evaluated]] = {}
    for run in runs:
        for item in run.evaluations.get(name, ()):
            by_step.setdefault(item.step, []).append(item)
    if not by_step:
        return None
    points = []
    for step in sorted(by_step):
        items = by_step[step]
        one = (items[0].value, items[0].low, items[0].high)
        points.append((step, *(one if len(items) == 1 else interval([item.value for item in items]))))
    x, mean, low, high = zip(*points)
    return {"x": _plain(x), "mean": _plain(mean), "low": _plain(low), "high": _plain(high),
            "n": [len(by_step[step]) for step in sorted(by_step)]}  # fmt: skip


def panels(studies: Sequence[Study]) -> list[dict[str, Any]]:
    """Every metric that anything was logged under, in its section; what no section names comes last."""
    names = sorted({n for s in studies for run in s.runs for n in run.metrics if not n.startswith("eval/")})
    names = [n for n in names if not n.startswith("seconds/") or n == "seconds/step"]
    evaluated = list(dict.fromkeys(n for s in studies for run in s.runs for n in run.evaluations))
    found: dict[str, list] = {section: [] for section in (*SECTIONS, "Everything else")}
    if "reward" not in names and "loss" in names:  # supervised: the loss is what is learned
        names.remove("loss")
        found["Learning"].append(_panel(studies, "loss"))
    for section, wanted in SECTIONS.items():
        for pattern in wanted:
            taken = [n for n in names if n == pattern or (pattern.endswith("/") and n.startswith(pattern))]
            names = [n for n in names if n not in taken]
            found[section] += [_panel(studies, n) for n in taken]
    found["Everything else"] = [_panel(studies, n) for n in names]
    measured: list[dict[str, Any]] = [
        {"name": n, "note": "held-out prompts", "points": True,
         "series": [evaluation_curve(study.runs, n) for study in studies]} for n in evaluated]  # fmt: skip
    greedy = [panel for panel in measured if panel["name"].endswith(" greedy")]
    found["Learning"] = [*greedy, *found["Learning"], *(panel for panel in measured if panel not in greedy)]
    return [{"title": title, "panels": kept} for title, kept in found.items() if kept]


def _panel(studies: Sequence[Study], name: str) -> dict[str, Any]:
    series = [curve(study.runs, name) for study in studies]
    return {"name": name, "note": NOTES.get(name, ""), "points": False, "series": series}


def final_numbers(study: Study) -> list[dict[str, Any]]:
    """The numbers a study is read for: evaluations before and after, then accuracy and reward at the end.

    Of many evaluations only the greedy ones and the means are among them; the rest is in the tables below.
    """
    numbers = []
    names = list(dict.fromkeys(n for run in study.runs for n in run.evaluations))
    if len(names) > 3:
        names = [n for n in names if " greedy" in n or " mean@" in n] or names[:3]
    for name in names:
        c = evaluation_curve(study.runs, name)
        if c is None:
            continue
        last = len(c["x"]) - 1
        numbers.append({"name": name, "before": c["mean"][0] if last else None, "value": c["mean"][last],
                        "low": c["low"][last], "high": c["high"][last], "kind": "held-out"})  # fmt: skip
    for name in ("accuracy", "reward", "loss"):
        ends = [float(np.mean(end)) for run in study.runs if (end := _end(run.metrics.get(name, {})))]
        same = name == "reward" and all(run.metrics.get("accuracy") == run.metrics["reward"] for run in study.runs
                                        if "reward" in run.metrics)  # fmt: skip
        if ends and not same and not (name == "loss" and numbers):
            value, low, high = _plain(interval(ends))
            numbers.append({"name": name, "before": None, "value": value, "low": low, "high": high, "kind": "training"})
    return numbers


def _end(by_step: Mapping[int, float]) -> list[float]:
    """The last tenth of the finite values."""
    values = [value for _, value in sorted(by_step.items()) if math.isfinite(value)]
    return values[-max(1, len(values) // 10) :]


def times(study: Study) -> dict[str, float]:
    """Seconds by phase, mean over runs; "other" is what the steps took besides. {} when no phase was timed."""
    totals: dict[str, list[float]] = {}
    for run in study.runs:
        spent = {name[len("seconds/") :]: float(np.nansum(list(by_step.values())))
                 for name, by_step in run.metrics.items() if name.startswith("seconds/")}  # fmt: skip
        whole = spent.pop("step", 0.0)
        if not spent and not whole:
            continue
        rest = whole - sum(spent.values())
        name = "other" if spent else "whole step"
        for phase, seconds in (spent | ({name: rest} if rest > 0.01 * whole else {})).items():
            totals.setdefault(phase, []).append(seconds)
    means = {phase: sum(seconds) / len(study.runs) for phase, seconds in totals.items()}
    return {phase: means[phase] for phase in sorted(means, key=lambda p: (p == "other", -means[p]))}


def lengths(runs: Sequence[RunLog]) -> dict[str, Any] | None:
    """Histograms of completion lengths in tokens, of the sampled rows of the first and the last third of the steps."""
    sized = [(row["step"], len(row["tokens"])) for run in runs for row in run.samples
             if isinstance(row.get("tokens"), list)]  # fmt: skip
    if not sized:
        return None
    longest, last = max(n for _, n in sized), max(step for step, _ in sized)
    first = min(step for step, _ in sized)
    width = max(1, math.ceil((longest + 1) / 24))
    edges = np.arange(0, longest + width + 1, width)
    third = (last - first) / 3
    parts = {"first third": [n for step, n in sized if step <= first + third],
             "last third": [n for step, n in sized if step >= last - third]}  # fmt: skip
    if last == first:
        parts = {"all": parts["first third"]}
    shares = {name: (np.histogram(n, edges)[0] / max(len(n), 1)).tolist() for name, n in parts.items()}
    return {"edges": edges.tolist(), "shares": shares, "rows": {name: len(n) for name, n in parts.items()}}


def samples(runs: Sequence[RunLog]) -> list[list[Mapping[str, Any]]]:
    """The sampled rows of each run: steps are thinned out evenly until the page stays small."""
    kept: list[list[Mapping[str, Any]]] = []
    for run in runs:
        steps = sorted({row["step"] for row in run.samples})
        tokens = sum(len(row.get("tokens") or ()) for row in run.samples)
        share = min(1.0, MAX_SAMPLED_TOKENS / len(runs) / max(tokens, 1))
        count = max(1, int(len(steps) * share))
        chosen = {steps[round(i)] for i in np.linspace(0, len(steps) - 1, count)} if steps else set()
        kept.append([_short(row) for row in run.samples if row["step"] in chosen])
    return kept


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {key: _plain(row.get(key) or [], 4) for key in ("log_probs", "advantages")}
    return {**row, **numbers}


def _means(points: np.ndarray) -> list[float]:
    """Column means of the finite entries."""
    finite = np.isfinite(points)
    sums = np.where(finite, points, 0.0).sum(axis=0)
    return [float(s / c) if c else math.nan for s, c in zip(sums, finite.sum(axis=0))]


def _plain(values: Sequence[float | None], digits: int = 6) -> list[float | None]:
    """Numbers for JSON: few digits, and None where not finite."""
    return [None if v is None or not math.isfinite(v) else float(f"{v:.{digits}g}") for v in values]
