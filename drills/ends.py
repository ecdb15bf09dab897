"""Ends of a run that are no kills of one process, and disks that do not take what is written: nothing is lost."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from drills import worlds
from drills.trials import Drill, Outcome, TrialFn, chance

REPO = pathlib.Path(__file__).resolve().parent.parent
# A command that sees a small file system of its own at `run`, or one that cannot be written to; without root.
_FULL = "mount -t tmpfs -o size={size}k tmpfs {run} && \"$@\"; status=$?; cp -r {run}/. {run}.kept; exit $status"
_READ_ONLY = "mount --bind {run} {run} && mount -o remount,bind,ro {run} && exec \"$@\""
_LIMITED = ("import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); "
            "runpy.run_module('mlrl', run_name='__main__', alter_sys=True)")  # fmt: skip


class Many:
    """The experiment's folder, and runs in it as the command line starts them."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.started: list[subprocess.Popen] = []
        worlds.write(folder)
        self.read = worlds.reader(folder)

    def start(self, run: str, count: int = 1, before: tuple[str, ...] = (), body: tuple[str, ...] = ("-m", "mlrl"),
              devices: int = 1) -> list[subprocess.Popen]:  # fmt: skip
        """Starts a run in `count` processes with so many devices together."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
        flags.append(f"--xla_force_host_platform_device_count={devices // count}")
        given = {"XLA_FLAGS": " ".join(flags), "PYTHONPATH": os.pathsep.join([str(REPO), str(self.folder)])}
        if count > 1:
            given |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
        mesh = [f"--gin.mesh.devices={devices}"] if devices > 1 else []
        command = [*before, sys.executable, *body, "train", "my.gin", "--run_dir", run, *mesh]
        many = [subprocess.Popen(command, cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                 env=os.environ | given | ({"JAX_PROCESS_ID": str(i)} if count > 1 else {}))
                for i in range(count)]  # fmt: skip
        self.started += many
        return many

    def wait_for_step(self, run: str, step: int, many: list[subprocess.Popen]) -> None:
        log = self.folder / run / "metrics.jsonl"
        while not (log.is_file() and log.read_text().count("\n") > step) and all(one.poll() is None for one in many):
            time.sleep(0.02)

    def ended(self, many: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
        said = [one.communicate()[0] for one in many]
        return [one.returncode for one in many], said

    def end_all(self) -> None:
        """Ends what still runs, of a trial that is past its limit."""
        for one in self.started:
            one.kill()
            one.wait()
        self.started.clear()

    def whole(self, run: str, **how: Any) -> str:
        """Lets a run go on to its end; what was wrong."""
        statuses, said = self.ended(self.start(run, **how))
        return "" if not any(statuses) else f"it does not go on: {statuses} {said[0][-500:]}"


def one_line(said: str) -> str:
    """What is wrong with the last words of a run that could not go on."""
    words = [line for line in said.splitlines() if line.startswith("mlrl: ")]
    if "Traceback" in said or "--debug shows the trace" in said:
        return f"a trace or an error that nobody foresaw: {said[-700:]}"
    return "" if len(words) == 1 else f"{len(words)} lines say what happened: {said[-500:]}"


def told(many: Many, run: str, luck: Any) -> str:
    """SIGTERM at a random step: saved, said, exit status 143."""
    started = many.start(run)
    many.wait_for_step(run, luck.randrange(1, worlds.STEPS - 2), started)
    started[0].send_signal(signal.SIGTERM)
    (status,), (said,) = many.ended(started)
    if status != 143 or "told to end after step" not in said:
        return f"exit status {status}: {said[-500:]}"
    return one_line(said)


def disk(many: Many, run: str, luck: Any) -> str:
    """A file system that is full after a part of the run."""
    (many.folder / run).mkdir()
    size = luck.randrange(40, 400)
    script = _FULL.format(size=size, run=run)
    (many.folder / f"{run}.kept").mkdir()
    (status,), (said,) = many.ended(many.start(run, before=("unshare", "-Urm", "sh", "-c", script, "sh")))
    shutil.rmtree(many.folder / run)
    (many.folder / f"{run}.kept").rename(many.folder / run)
    return one_line(said) if status else ""


def limited(many: Many, run: str, luck: Any) -> str:
    """No file may be longer than so many bytes."""
    body = ("-c", _LIMITED.format(size=luck.choice((200, 1000, 3000, 6000, 12000))))
    (status,), (said,) = many.ended(many.start(run, body=body))
    return one_line(said) if status else ""


def read_only(many: Many, run: str, luck: Any) -> str:
    """The folder of a run that had begun cannot be written to."""
    started = many.start(run)
    many.wait_for_step(run, luck.randrange(1, worlds.STEPS - 2), started)
    started[0].kill()
    many.ended(started)
    script = _READ_ONLY.format(run=run)
    (status,), (said,) = many.ended(many.start(run, before=("unshare", "-Urm", "sh", "-c", script, "sh")))
    return one_line(said) if status == 2 else f"exit status {status}: {said[-500:]}"


def one_of_four(many: Many, run: str, luck: Any) -> str:
    """One of four processes is killed: all end, and none hangs."""
    started = many.start(run, count=4, devices=4)
    many.wait_for_step(run, luck.randrange(1, 6), started)
    started[luck.randrange(4)].kill()
    statuses, said = many.ended(started)
    return "" if all(statuses) else f"some went on: {statuses} {said}"


def all_four(many: Many, run: str, luck: Any) -> str:
    """All of four processes are killed at once."""
    started = many.start(run, count=4, devices=4)
    many.wait_for_step(run, luck.randrange(1, 6), started)
    for one in started:
        one.kill()
    many.ended(started)
    return ""


CASES: dict[str, Callable[[Many, str, Any], str]] = {
    "SIGTERM": told, "a limit of file sizes": limited, "a full disk": disk, "a read-only folder": read_only,
    "one of four processes killed": one_of_four, "four of four processes killed": all_four,
}  # fmt: skip
_MOUNTS = ("a full disk", "a read-only folder")


@contextlib.contextmanager
def prepared(seed: int, steps: int) -> Iterator[TrialFn]:
    """Trains the run undisturbed, on one device and, for the cases of four processes, on four."""
    del steps
    names = tuple(CASES)
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode:
        names = tuple(name for name in names if name not in _MOUNTS)
    with tempfile.TemporaryDirectory(prefix="drill-ends-") as folder:
        many, undisturbed = Many(pathlib.Path(folder)), {}

        def as_undisturbed(devices: int) -> Any:
            if devices not in undisturbed:
                assert not (wrong := many.whole(f"undisturbed{devices}", devices=devices)), wrong
                undisturbed[devices] = many.read(many.folder / f"undisturbed{devices}")
            return undisturbed[devices]

        def trial(number: int) -> Outcome:
            name, run = names[number % len(names)], f"run{number}"
            devices = 4 if "four" in name else 1
            wanted = as_undisturbed(devices)
            try:
                wrong = CASES[name](many, run, chance("ends", seed, number)) or many.whole(run, devices=devices)
            finally:
                many.end_all()
            compare = close if devices > 1 else worlds.difference  # other sums of gradients: up to rounding
            wrong = wrong or compare(many.read(many.folder / run), wanted)
            return Outcome(name, "wrong" if wrong else "nothing lost", wrong)

        yield trial


def close(found: Any, wanted: Any) -> str:
    """As worlds.difference, where four processes and one may differ by rounding: the states, and the steps logged."""
    if [line["step"] for line in found[1]] != [line["step"] for line in wanted[1]]:
        return f"metrics.jsonl has the steps {[line['step'] for line in found[1]]}"
    for number, (a, b) in enumerate(zip(found[0], wanted[0], strict=True)):
        if not np.allclose(np.asarray(a, float), np.asarray(b, float), atol=2e-5):
            return f"leaf {number} of the last state is not that of the undisturbed run"
    return ""


ENDS = Drill(
    "ends", "A run is told to end (SIGTERM), or has a full disk, a limit of file sizes or a read-only folder, or loses "
    "one or all of its four processes, at a random step. It says in one line what happened, and started again as it "
    "should be, it ends as the undisturbed run does: bitwise with one process, up to rounding with four.", 30, 1, 300.0,
    prepared)  # fmt: skip
