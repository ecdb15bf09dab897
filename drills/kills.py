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
            moment = chance("kills", seed, number).uniform(0.0, whole_seconds)
            run, log = f"run{number}", folder / f"run{number}.log"
            alive, reached = killed(start(folder, run), moment), steps_done(folder / run)
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
                return Outcome(kind, "another state", f"killed after {moment:.2f} s, at step {reached}: {wrong}")
            return Outcome(kind, "bitwise the same")

        yield trial


def killed(process, moment: float) -> list[str]:
    """Kills a process after so many seconds; names those of its children that live on three seconds later."""
    process.join(moment)
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
    "-9`) at a moment drawn evenly over its time, and started again: its last state is bitwise, and its log line by "
    "line, that of the undisturbed run, and no worker process is left.", 100, 1, 300.0, prepared)  # fmt: skip
