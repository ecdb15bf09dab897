"""Trains as a user would and watches from outside: memory, descriptors and tokens a second flat, nothing compiled."""

from __future__ import annotations

import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import psutil

from drills import experiments
from drills.trials import Drill, Outcome, TrialFn

MOST_GROWTH = 0.02  # of the memory after warming up,
SPARE_MIB = 8.0  # or so much, where a short run has only begun to fill what it keeps
LEAST_SPEED = 0.7  # tokens a second of the last quarter beside those of the second; others may use the machine
CASES = {"in the graph": "in_graph", "on the host": "host"}


def held(process: psutil.Process) -> tuple[float, int]:
    """Memory in MiB and descriptors of a process and of those it started; memory without the pages of files, which the
    system takes back when others need room. Those that are gone hold nothing."""
    memory, descriptors = 0, 0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            info = one.memory_info()
            memory += info.rss - getattr(info, "shared", 0)
            descriptors += one.num_fds()
    return memory / 2**20, descriptors


def steps_of(metrics: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl that are whole, as they stand."""
    if not metrics.is_file():
        return []
    return [json.loads(line) for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]


def watch(command: Sequence[str], folder: pathlib.Path, metrics: pathlib.Path,
          every_seconds: float = 0.5) -> list[tuple[int, float, int]]:  # fmt: skip
    """Runs a command in a folder to its end. Returns [(step, MiB, descriptors), ...] as time went by."""
    seen = []
    with (folder / "said").open("w") as said:
        with subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stderr=said) as run:
            process = psutil.Process(run.pid)
            while run.poll() is None:
                time.sleep(every_seconds)
                rows = steps_of(metrics)
                with contextlib.suppress(psutil.NoSuchProcess):
                    seen.append((rows[-1]["step"] if rows else 0, *held(process)))
    if run.returncode:
        raise RuntimeError(f"the run ended with exit status {run.returncode}: {(folder / 'said').read_text()[-500:]}")
    return seen


def verdict(seen: Sequence[tuple[int, float, int]], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What grew after the first fifth of the steps: memory from a line fitted to all later measurements, descriptors
    and tokens a second from the second quarter of the run to the last."""
    last = rows[-1]["step"]
    steps, memory, _ = np.asarray([point for point in seen if last / 5 <= point[0] < last], float).T
    slope, start = np.polyfit(steps, memory, 1) if len(set(steps)) > 1 else (0.0, memory[0])
    compilations = {row["step"]: row["compilations"] for row in rows if row["step"] >= last / 5}
    first = compilations[min(compilations)]
    quarter = lambda pairs, n: [value for step, value in pairs if (n - 1) * last / 4 <= step < n * last / 4]
    opened = [(step, descriptors) for step, _, descriptors in seen]
    speed = [(row["step"], row["tokens_per_second"]) for row in rows if "tokens_per_second" in row]
    warm = float(start + slope * steps[0])
    return {
        "steps": last,
        "measurements": len(memory),
        "warm_mib": warm,
        "growth_mib": float(slope * (steps[-1] - steps[0])),
        "growth_share": float(slope * (steps[-1] - steps[0]) / warm),
        "descriptors": [max(quarter(opened, n), default=0) for n in (2, 4)],
        "speed_ratio": float(np.median(quarter(speed, 4)) / np.median(quarter(speed, 2))),
        "compilations_when_warm": first,
        "compilations_after": {str(step): count - first for step, count in compilations.items() if count != first},
    }


def complaints(found: dict[str, Any]) -> list[str]:
    """What of a verdict is not flat."""
    said, (early, late) = [], found["descriptors"]
    if found["growth_share"] > MOST_GROWTH and found["growth_mib"] > SPARE_MIB:
        said.append(f"memory grew by {found['growth_mib']:.1f} MiB, {found['growth_share']:.1%}")
    if 0 < early < late:
        said.append(f"descriptors grew from {early} to {late}")
    if found["speed_ratio"] < LEAST_SPEED:
        said.append(f"tokens a second fell to {found['speed_ratio']:.0%}")
    if found["compilations_after"]:
        said.append(f"compiled after warming up, by step: {found['compilations_after']}")
    return said


@contextlib.contextmanager
def prepared(seed: int, steps: int) -> Iterator[TrialFn]:
    """Writes the experiments."""
    with tempfile.TemporaryDirectory(prefix="drill-soak-") as name:
        experiments.write(pathlib.Path(name))

        def trial(number: int) -> Outcome:
            where = list(CASES)[number % len(CASES)]
            folder, run = pathlib.Path(name, CASES[where]), f"run{number}"
            train = [sys.executable, "-m", "mlrl", "train", "my.gin", "--run_dir", run, f"--gin.STEPS={steps}",
                     f"--gin.SEED={seed + number}", "--gin.Recording.save_every_steps=100"]  # fmt: skip
            metrics = folder / run / "metrics.jsonl"
            found = verdict(watch(train, folder, metrics), steps_of(metrics))
            came = (f"memory {found['growth_mib']:+.1f} MiB of {found['warm_mib']:.0f}; descriptors "
                    f"{found['descriptors'][0]} and {found['descriptors'][1]}; tokens/s x {found['speed_ratio']:.2f}; "
                    f"{len(found['compilations_after'])} late compilations")  # fmt: skip
            return Outcome(f"{steps} steps, rewards {where}", came, "; ".join(complaints(found)))

        yield trial


SOAK = Drill(
    "soak", "A run of many steps, with rewards in the graph and with rewards on the host. After its first fifth the "
    f"memory of its processes grows by at most {MOST_GROWTH:.0%} (or {SPARE_MIB:g} MiB), descriptors do not "
    f"grow, tokens a second do not fall below {LEAST_SPEED:.0%}, and nothing is compiled.", 2, 1, 7200.0, prepared,
    (2000, 150))  # fmt: skip
