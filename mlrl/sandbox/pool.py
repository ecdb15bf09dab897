"""A pool of servers that stay warm and run many programs at once, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent import futures
from typing import Any

from mlrl.sandbox.results import Job, Limits, Result, result_of, without_answers

WALLS = ("namespaces", "landlock", "seccomp")
_FOLDER = pathlib.Path(__file__).resolve().parent
_GRACE_SECONDS = 2.0  # for a server to say that a program's time is over
_START_SECONDS = 30.0
# Loads this folder as a package of its own: nothing of mlrl, no folder on the path, no site-packages.
_BOOT = """
import importlib.util, json, sys
folder, scratch, without = json.loads(sys.argv[1])
spec = importlib.util.spec_from_file_location("sandbox", folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules["sandbox"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from sandbox import server
server.main(folder, scratch, without)
"""
_log = logging.getLogger("mlrl")
_told: set[str] = set()


def run(program: str, expressions: Sequence[str] = (), limits: Limits = Limits(), *, seed: int = 0,
        without: Sequence[str] = ()) -> Result:  # fmt: skip
    """Runs one program in a sandbox of its own; for more than one, a Pool is faster.

    Args:
      program: Python, run as a script with nothing on its standard input.
      expressions: evaluated in the program's namespace, in order; equally untrusted.
      limits: of the whole job.
      seed: of the program's `random`. Two runs with different seeds tell whether its values depend on it.
      without: walls to do without; see Pool.
    Raises:
      Refused: as Pool.
    """
    with contextlib.closing(Pool(limits, workers=1, without=without)) as pool:
        return pool.run([Job(program, tuple(expressions), seed)])[0]


class Pool:
    """Runs jobs, `workers` at once, each in a process of its own. Servers start at the first call and stay warm; they
    end with `close`, when the pool is dropped, and with the process that made it.

    Args:
      limits: of every job.
      workers: jobs at once; 0: as many as this process has processors. More than that shares them, so that a limit
        of wall clock is reached sooner.
      without: walls of WALLS to do without, for a test, or for a system that has none. With neither namespaces nor
        seccomp a guard in the language is all there is, which does not hold against a program that means harm; a
        pool takes that only where `without` names both.
    Raises:
      Refused: limits or workers are out of range; at the first call, if the system has neither namespaces nor
        seccomp, or the server cannot start.
    """

    def __init__(self, limits: Limits = Limits(), *, workers: int = 0, without: Sequence[str] = ()):
        _check(limits, workers, without)
        self.limits, self._without = limits, tuple(without)
        self._slots: list[_Server | None] = [None] * (workers or _processors())
        self._lock = threading.Lock()
        self._finalize = weakref.finalize(self, _close, self._slots, os.getpid())

    def close(self) -> None:
        """Ends the servers and whatever they run; a later call starts new ones."""
        _close(self._slots, os.getpid())

    def walls(self) -> tuple[str, ...]:
        """Which of WALLS stand around this pool's programs; starts a server if there is none."""
        with self._lock:
            server = self._slots[0] = self._slots[0] or _Server(self._without)
            return server.standing

    def run(self, jobs: Sequence[Job], *, seconds: float = float("inf")) -> list[Result]:
        """The jobs' results, in order; after `seconds` what runs is stopped, and what has not begun is "not_run"."""
        deadline = time.monotonic() + seconds
        results = [without_answers(job, "not_run", "the time of the call was over before its turn") for job in jobs]
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(len(jobs)):
            todo.put(number)

        def serve(slot: int) -> None:
            with contextlib.suppress(queue.Empty):
                while time.monotonic() < deadline:
                    number = todo.get_nowait()
                    results[number] = self._one(slot, jobs[number], deadline)

        with self._lock:
            slots = range(min(len(self._slots), len(jobs)))
            with futures.ThreadPoolExecutor(max(1, len(slots))) as threads:
                serving = [threads.submit(serve, slot) for slot in slots]
                try:
                    for served in serving:
                        served.result()
                except BaseException:  # Refused, or Ctrl-C: nobody waits for the rest
                    deadline = 0.0
                    for server in self._slots:
                        if server is not None:
                            server.interrupt()
                    raise
        return results

    def _one(self, slot: int, job: Job, deadline: float) -> Result:
        server = self._slots[slot]
        if server is None:
            server = self._slots[slot] = _Server(self._without)
        seconds = min(self.limits.seconds, deadline - time.monotonic())
        limits = self.limits._replace(seconds=seconds)._asdict()
        request = {"program": job.program, "expressions": list(job.expressions), "seed": job.seed, "limits": limits}
        try:
            return result_of(job, server.ask(request, seconds + _GRACE_SECONDS), self.limits.cpu_seconds)
        except (TimeoutError, EOFError, OSError) as error:
            self._slots[slot] = None
            server.kill()
            return without_answers(job, "died", f"its server ended or does not answer ({type(error).__name__})")


class _Server:
    """One server process, its two pipes, and a folder for scratch folders where there is no namespace for them."""

    def __init__(self, without: tuple[str, ...]):
        self.scratch = tempfile.TemporaryDirectory(prefix="mlrl-sandbox-", ignore_cleanup_errors=True)
        settings = json.dumps([str(_FOLDER), self.scratch.name, without])
        # -I, but for one variable: PYTHONHASHSEED, which -I would not read.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", "-B", "-c", _BOOT, settings], env={"PYTHONHASHSEED": "0"}, cwd="/",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdin and self.process.stdout  # as pipes
        self._requests, self._answers = self.process.stdin, self.process.stdout
        try:
            hello = self._receive(time.monotonic() + _START_SECONDS)
            _judge(hello, without)
            self.standing = tuple(hello["standing"])
        except (TimeoutError, EOFError, OSError) as error:
            self.kill()
            raise _refused(f"the sandbox's server did not start ({type(error).__name__}): {sys.executable} must run "
                           "with -S") from error  # fmt: skip
        except BaseException:
            self.kill()
            raise

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        data = json.dumps(request).encode()
        deadline = time.monotonic() + seconds
        view = memoryview(len(data).to_bytes(8, "big") + data)
        while view:
            view = view[os.write(self._requests.fileno(), view) :]
        return self._receive(deadline)

    def interrupt(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def kill(self) -> None:
        self._requests.close()  # it ends its program and itself, and leaves nobody for others to reap
        try:
            self.process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.interrupt()
            self.process.wait()
        self._answers.close()
        self.scratch.cleanup()

    def _receive(self, deadline: float) -> dict[str, Any]:
        return json.loads(self._read(int.from_bytes(self._read(8, deadline), "big"), deadline))

    def _read(self, size: int, deadline: float) -> bytes:
        data, pipe, poll = b"", self._answers.fileno(), select.poll()
        poll.register(pipe, select.POLLIN)
        while len(data) < size:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000.0):
                raise TimeoutError
            piece = os.read(pipe, size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data


def _judge(hello: dict[str, Any], without: tuple[str, ...]) -> None:
    """Raises Refused without any wall that nobody gave up; logs in one line, once, what is missing."""
    missing = {name: why for name, why in hello["missing"].items() if name not in without}
    words = ", ".join(f"{name} ({why})" for name, why in missing.items())
    if not {"namespaces", "seccomp"} & set(hello["standing"]) and missing.keys() & {"namespaces", "seccomp"}:
        raise _refused(f"the sandbox has no wall on this system: {words}; run on Linux, in a container that allows "
                       f"seccomp, or pass without={WALLS} to trust programs to a guard in the language")  # fmt: skip
    if missing and words not in _told:
        _told.add(words)
        _log.warning("sandbox: does without %s; what stands: %s", words, ", ".join(hello["standing"]))


def _check(limits: Limits, workers: int, without: Sequence[str]) -> None:
    if not limits.seconds > 0.0:
        raise _refused(f"Limits.seconds must be more than 0, got {limits.seconds!r}")
    for name, lowest in zip(Limits._fields[1:], (1, 1 << 20, 1, 4096, 8)):
        if not getattr(limits, name) >= lowest:
            raise _refused(f"Limits.{name} must be at least {lowest:g}, got {getattr(limits, name)!r}")
    if isinstance(limits.cpu_seconds, float):
        raise _refused(f"Limits.cpu_seconds must be a whole number, got {limits.cpu_seconds!r}")
    if workers < 0:
        raise _refused(f"Pool: workers must be 0 or more, got {workers!r}")
    if set(without) - set(WALLS):
        raise _refused(f"Pool: without names walls of {WALLS}, got {tuple(without)!r}")


def _refused(words: str) -> Exception:
    from mlrl.types import Refused  # late: it imports JAX, which a worker process of a reward must not hold

    return Refused(words)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _close(slots: list[_Server | None], owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork of the process that started the servers
    for number, server in enumerate(slots):
        slots[number] = None
        if server is not None:
            server.kill()
