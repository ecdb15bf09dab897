"""One comparison: workers take turns at the same work, and every figure is a ratio of two turns of one round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from benchmarks.peers.protocol import Lost, Worker
from benchmarks.peers.shapes import Settings

OURS, BARE = "mlrl", "bare JAX"
# The most that mlrl's seconds may be of the other's: (case, rows, model, other), None for any model.
GOALS = {
    ("decode", "full", None, BARE): 1 / 0.85,  # 0.85 of its tokens a second
    ("update", "full", None, BARE): 1.15,
    ("step", "full", "d128x2", "TRL"): 0.60,
    ("step", "full", "d256x4", "TRL"): 0.75,
    ("step", "full", None, "tunix"): 0.40,
    ("step", "tail", None, "TRL"): 0.25,
    ("step", "tail", None, "tunix"): 0.20,
}

Start = Callable[[str, Settings], Worker]  # (side, settings) -> its worker


def goal(case: str, rows: str, model: str, other: str) -> float | None:
    """The goal of a comparison, or None where there is none."""
    return GOALS.get((case, rows, model, other), GOALS.get((case, rows, None, other)))


def fastest(start: Start, side: str, candidates: Sequence[Settings]) -> Settings:
    """The settings with which a side's warm turn is shortest; of one candidate nothing is run. Raises Lost.

    Of each, the best of up to three turns; no more are taken once they took two seconds.
    """
    seconds = {}
    for settings in candidates if len(candidates) > 1 else ():
        worker = start(side, settings)
        try:
            worker.ready()
            taken = [worker.turn()["seconds"]]
            while sum(taken) < 2 and len(taken) < 3:
                taken.append(worker.turn()["seconds"])
            seconds[settings] = min(taken)
        finally:
            worker.close()
    return min(seconds, key=seconds.get) if seconds else candidates[0]


def in_turns(start: Start, settings: Mapping[str, Settings], repeats: int) -> tuple[dict[str, dict], dict[str, str]]:
    """Rounds of one turn of each side: what each side measured, and why sides are missing.

    All sides get ready at once; from then on one works while the others wait. A side that is lost is left out.

    Args:
      settings: the sides, with their settings.
    Returns: {side: {"about": what it said when ready, "turns": what it answered each turn}}, {side: a line}
    """
    found, missing = {}, {}
    workers = {side: start(side, each) for side, each in settings.items()}
    try:
        for side, worker in workers.items():
            try:
                found[side] = {"about": worker.ready(), "turns": []}
            except Lost as lost:
                missing[side] = str(lost)
        for _ in range(repeats):
            for side in list(found):
                try:
                    found[side]["turns"].append(workers[side].turn())
                except Lost as lost:
                    missing[side] = str(lost)
                    del found[side]
    finally:
        for worker in workers.values():
            worker.close()
    return found, missing


def summarized(found: Mapping[str, dict], settings: Mapping[str, Settings]) -> dict[str, dict]:
    """Medians and quartiles of each side."""
    sides = {}
    for side, said in found.items():
        seconds = [turn["seconds"] for turn in said["turns"]]
        sides[side] = {
            "median_seconds": float(np.median(seconds)), "quartiles_seconds": np.percentile(seconds, [25, 75]).tolist(),
            "turns_seconds": seconds, "cpu_seconds": float(np.median([turn["cpu_seconds"] for turn in said["turns"]])),
            "peak_mib": max(turn["peak_mib"] for turn in said["turns"]),
            "settings": settings[side]._asdict(),
            "about": {name: value for name, value in said["about"].items() if name != "ready"},
        }  # fmt: skip
        parts = [turn["parts"]["rollout"] for turn in said["turns"] if turn.get("parts")]
        sides[side] |= {"rollout_seconds": float(np.median(parts))} if parts else {}
    return sides


def ratios(case: str, rows: str, model: str, sides: Mapping[str, dict]) -> dict[str, dict]:
    """mlrl's seconds to each other side's, turn by turn: median, quartiles, and whether the goal is met."""
    found = {}
    for other in sides if OURS in sides else ():
        if other == OURS:
            continue
        paired = np.asarray(sides[OURS]["turns_seconds"]) / np.asarray(sides[other]["turns_seconds"])
        most, ratio = goal(case, rows, model, other), float(np.median(paired))
        found[other] = {"ratio": ratio, "quartiles": np.percentile(paired, [25, 75]).tolist(), "goal_at_most": most,
                        "met": None if most is None else ratio <= most}  # fmt: skip
    return found
