"""Trains an experiment as a user would and watches its memory and its compilations from outside.

    python -m benchmarks.soak EXPERIMENT.gin [--gin.NAME=VALUE ...]

Set the number of steps with an override of the experiment's own. The first fifth of the steps warms up; over the
rest, memory (of the process and its workers) must not grow by more than 2 % and nothing may be compiled.
Writes soak.json beside this file; the exit status is 1 if memory grew or something was compiled.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import psutil

HERE = pathlib.Path(__file__).resolve().parent
MOST_GROWTH = 0.02  # of the memory after warming up


def memory_mib(process):
    """Memory of a process and of those it started, in MiB, without the pages of files, which the system takes back
    when others need room; 0.0 once it is gone."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            info = one.memory_info()
            total += info.rss - getattr(info, "shared", 0)
        except psutil.NoSuchProcess:
            pass
    return total / 2**20


def steps_of(metrics):
    """The rows of metrics.jsonl that are whole, as they stand."""
    if not metrics.is_file():
        return []
    return [json.loads(line) for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]


def watch(command, metrics, every_seconds=1.0):
    """Runs a command to its end. Returns [(step, MiB), ...] as time went by."""
    seen = []
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        process = psutil.Process(run.pid)
        while run.poll() is None:
            time.sleep(every_seconds)
            rows = steps_of(metrics)
            try:
                seen.append((rows[-1]["step"] if rows else 0, memory_mib(process)))
            except psutil.NoSuchProcess:
                break
    if run.returncode:
        raise SystemExit(f"soak: the run ended with exit status {run.returncode}; run it alone: {' '.join(command)}")
    return seen


def verdict(seen, rows):
    """What grew after the first fifth of the steps, from a line fitted to all later measurements."""
    last = rows[-1]["step"]
    steps, memory = np.asarray([point for point in seen if last / 5 <= point[0] < last], float).T
    slope, start = np.polyfit(steps, memory, 1)
    compilations = {row["step"]: row["compilations"] for row in rows if row["step"] >= last / 5}
    first = compilations[min(compilations)]
    return {
        "steps": last,
        "measurements": len(memory),
        "warm_mib": float(start + slope * steps[0]),
        "mib_per_100_steps": float(100 * slope),
        "growth_share": float(slope * (steps[-1] - steps[0]) / (start + slope * steps[0])),
        "mib_by_step": [[int(step), round(mib, 1)] for step, mib in seen[:: max(1, len(seen) // 40)]],
        "compilations_when_warm": first,
        "compilations_after": {str(step): count - first for step, count in compilations.items() if count != first},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    arguments, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        metrics = pathlib.Path(folder, "run", "metrics.jsonl")
        train = [sys.executable, "-m", "mlrl", "train", arguments.experiment, "--run_dir", str(metrics.parent)]
        seen = watch([*train, *overrides], metrics)
        result = {"command": ["train", arguments.experiment, *overrides], **verdict(seen, steps_of(metrics))}
    (HERE / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return int(result["growth_share"] > MOST_GROWTH or bool(result["compilations_after"]))


if __name__ == "__main__":
    sys.exit(main())
