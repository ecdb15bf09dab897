"""Kills a run at a random moment, resumes it, and compares what it became with the undisturbed run, bit by bit."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator

import psutil

from drills import worlds
from drills.trials import Drill, Outcome, TrialFn, chance

EARLY = 0.2  # of the kills come before the first step


@contextlib.contextmanager
def prepared(seed: int, steps: int) -> Iterator[TrialFn]:
    """Trains the run undisturbed, twice: the first compiles, the second says how long it takes."""
    del steps
    with tempfile.TemporaryDirectory(prefix="drill-kills-") as name:
        folder = pathlib.Path(name)
        worlds.write(folder)
        start, begun = worlds.starter(), 0.0
        for run in ("first", "undisturbed"):
            begun = time.perf_counter()
            process = start(folder, run)
            process.join()
            assert process.exitcode == 0, (folder / f"{run}.log").read_text()
        whole_seconds, read = time.perf_counter() - begun, worlds.reader(folder)
        undisturbed = read(folder / "undisturbed")
        assert not worlds.difference(read(folder / "first"), undisturbed), "two undisturbed runs differ"

        def trial(number: int) -> Outcome:
            luck, run, log = chance("kills", seed, number), f"run{number}", folder / f"run{number}.log"
            after = -1 if luck.random() < EARLY else luck.randrange(worlds.STEPS)
            wait = luck.uniform(0.0, whole_seconds / (2 if after < 0 else worlds.STEPS))
            alive = killed(start(folder, run), folder / run, after, wait)
            reached = steps_done(folder / run)
            kind = "before its first step" if reached < 0 else "after its first step"
            if alive:
                return Outcome(kind, "left processes", f"still alive after the kill: {alive}")
            process = start(folder, run)
            try:
                process.join()
            finally:
                process.kill()
            if process.exitcode:
                return Outcome(kind, "not resumed", f"exit status {process.exitcode}: {log.read_text()[-600:]}")
            wrong = worlds.difference(read(folder / run), undisturbed) or worlds.traced(log)
            shutil.rmtree(folder / run)
            if wrong:
                return Outcome(kind, "another state", f"killed {wait:.2f} s after step {after}: {wrong}")
            return Outcome(kind, "bitwise the same")

        yield trial


def killed(process, run: pathlib.Path, after: int, wait: float) -> list[str]:
    """Kills a process so many seconds after a step; names those of its children that live on three seconds later."""
    while steps_done(run) < after and process.is_alive():
        time.sleep(0.003)
    process.join(wait)
    children = []
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.join()
    _, alive = psutil.wait_procs(children, timeout=3.0)
    names = []
    for one in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            names += [" ".join(one.cmdline())] if one.status() != psutil.STATUS_ZOMBIE else []
    return names


def steps_done(run: pathlib.Path) -> int:
    """The last step in a run's log; -1 before the log was opened."""
    log = run / "metrics.jsonl"
    return log.read_text().count("\n") - 1 if log.is_file() else -1


KILLS = Drill(
    "kills", "A run with host rewards, a curriculum that adapts and checkpoints every three steps is killed (`kill "
    "-9`) a random moment after a random step, or before its first, and started again: its last state is bitwise, and "
    "its log line by line, that of the undisturbed run, and no worker process is left.", 100, 1, 300.0,
    prepared)  # fmt: skip
