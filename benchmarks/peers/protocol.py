"""Turns of processes: a worker waits for "go" on its stdin, works, and answers with a line of JSON.

Only the standard library is imported here, since workers live in environments of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Lost(Exception):
    """A worker that could not start, or stopped; the message is its last line."""


def peak_mib() -> float:
    """The most memory that this process has held, in MiB.

    ru_maxrss would do, but on Linux a process is born with its parent's.
    """
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Lets the peak begin anew, where the system can: what compiling took is then left out."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


class Turns:
    """The worker's end. What else is printed goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._imported = peak_mib()
        self._worked = 0.0

    def ready(self, **about: Any) -> None:
        """Says that turns may begin, and with what versions."""
        forget_peak()
        self._say({"ready": True, "imported_mib": self._imported, **about})

    def wait(self) -> bool:
        """Whether another turn is asked for."""
        asked = sys.stdin.readline().strip() == "go"
        self._worked = time.process_time()
        return asked

    def done(self, seconds: float, **about: Any) -> None:
        """Answers a turn; seconds on all processors tell whether the turn had them to itself."""
        worked = time.process_time() - self._worked
        self._say({"seconds": seconds, "cpu_seconds": worked, "peak_mib": peak_mib(), **about})

    def serve(self, turn: Callable[[int], Mapping[str, Any] | None], **about: Any) -> None:
        """Turns of a function, which returns once its work is done; the first, untimed, is before `ready`."""
        turn(0)
        self.ready(**about)
        number = 0
        while self.wait():
            number += 1
            start = time.perf_counter()
            more = turn(number)
            self.done(time.perf_counter() - start, **(more or {}))

    def _say(self, what: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(what) + "\n")
        self._out.flush()


class Worker:
    """The parent's end: a process that does nothing until it is asked for a turn."""

    def __init__(self, command: Sequence[str], *, folder: str | pathlib.Path = ".", **environment: str) -> None:
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder,
                                         stderr=self._errors, env=os.environ | environment)  # fmt: skip

    def ready(self) -> dict[str, Any]:
        """Waits until turns may begin; what the worker says of itself. Raises Lost."""
        return self._heard()

    def turn(self) -> dict[str, Any]:
        """Lets it work once: {"seconds", "peak_mib", ...}. Raises Lost."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        return self._heard()

    def close(self) -> None:
        """Ends the process, by ending its stdin; one that does not stop is killed."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _heard(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        raise Lost(said[-1] if said else f"exit status {status}")
