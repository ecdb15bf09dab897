"""The page of docs/ that says how often what was tried and how it came out; made of what the drills recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_TOP = """# Reliability: what was tried, and how often

Made by `python -m drills`; [drills](../drills) holds the drills. A drill does one thing many times, each time with
another seed, and every time has to come out as the drill says. A failure is listed below with the command that repeats
it. Rows may come from runs of different days and of less than the full form: the counts say of how many.
"""


def recorded(drill: Any, records: Sequence[Mapping[str, Any]], machine: str) -> dict[str, Any]:
    """What is kept of a drill's trials, for its rows of the table."""
    kinds = {}
    for kind in sorted({record["kind"] for record in records}):
        own = [record for record in records if record["kind"] == kind]
        kinds[kind] = {"trials": len(own), "right": sum(not record["wrong"] for record in own),
                       "came": dict(Counter(record["came"] for record in own).most_common()),
                       "minutes": round(sum(record["seconds"] for record in own) / 60, 1)}  # fmt: skip
    failures = [{key: record[key] for key in ("number", "seed", "kind", "wrong")} for record in records
                if record["wrong"]]  # fmt: skip
    return {"what": drill.what, "count": drill.count, "kinds": kinds, "failures": failures, "machine": machine,
            "commit": ", ".join(dict.fromkeys(record["commit"] for record in records))}  # fmt: skip


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page, of what `recorded` gave for each drill."""
    lines = [_TOP]
    lines += [f"- **{name}**: {found['what']}" for name, found in results.items()]
    lines += ["", "| drill | what | trials (full form) | as they must | came out | minutes | machine | commit |",
              "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, found in results.items():
        for kind, row in found["kinds"].items():
            came = ", ".join(f"{count} {word}" for word, count in row["came"].items())
            whole = f"{row['trials']}" if len(found["kinds"]) > 1 else f"{row['trials']} ({found['count']})"
            cells = (name, kind, whole, row["right"], came, f"{row['minutes']:.1f}", found["machine"], found["commit"])
            lines.append(f"| {' | '.join(map(str, cells))} |")
        if len(found["kinds"]) > 1:
            trials, right, minutes = (sum(row[key] for row in found["kinds"].values())
                                      for key in ("trials", "right", "minutes"))  # fmt: skip
            lines.append(f"| {name} | all | {trials} ({found['count']}) | {right} | | {minutes:.1f} | | |")
    failures = [(name, failure) for name, found in results.items() for failure in found["failures"]]
    lines += ["", "## Failures", ""]
    lines += [f"- {name}, {failure['kind']}: {_one_line(failure['wrong'])}; `python -m drills {name} --seed "
              f"{failure['seed']} --only {failure['number']}`" for name, failure in failures] or ["None."]  # fmt: skip
    return "\n".join([*lines, ""])


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
