"""Worker processes that run people's reward functions: time limits, retries and restarts are the parent's."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import pickle
import queue
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import cloudpickle

from mlrl.rewards.knobs import explicit
from mlrl.types import Refused

_LONGEST_ANSWER = 64 << 20  # bytes
_SCRIPT = pathlib.Path(__file__).with_name("worker.py")
REASONS = ("raised", "hung", "not_finite", "wrong_type", "died", "not_applicable")


class Call(NamedTuple):
    """One call to make: the row it is for, which of the pool's functions, and that function's arguments."""

    row: int
    which: int
    completion: str
    example: Mapping[str, Any]


class Answer(NamedTuple):
    """What came of a call: its entries ("reward" among them), or one of REASONS and a detail in words."""

    entries: dict[str, float]
    reason: str
    detail: str


NOT_RUN = Answer({}, "not_run", "too many rows had failed before it")


class _Process:
    """One worker process and its two pipes."""

    def __init__(self, settings: bytes, payload: bytes, startup_seconds: float):
        # A worker must never take the accelerator from the run it serves.
        self.mark = f"MLRL_WORKER={os.getpid()}-{secrets.token_hex(8)}"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        environment |= dict([self.mark.split("=")])
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
            start_new_session=True,  # its own group: killed whole, and Ctrl-C does not reach it
        )
        assert self.process.stdin and self.process.stdout  # as pipes
        self._pipes = self.process.stdin, self.process.stdout
        self.requests, self.answers = (pipe.fileno() for pipe in self._pipes)
        os.set_blocking(self.requests, False)
        os.set_blocking(self.answers, False)
        try:
            deadline = time.monotonic() + startup_seconds
            self._send(settings, deadline)
            self._send(payload, deadline)
            _, reason, detail = _answer(self._receive(deadline))
        except TimeoutError:
            self.kill()
            raise Refused(f"it was not loaded within startup_seconds={startup_seconds:g}") from None
        except (EOFError, OSError, ValueError):
            raise Refused(f"its worker ended while loading it ({self.kill()})") from None
        except BaseException:
            self.kill()
            raise
        if reason != "ready":
            self.kill()
            raise Refused(f"{detail} (it must be importable, or picklable by cloudpickle)")

    def ask(self, request: bytes, timeout_seconds: float) -> Answer:
        """The answer to a request; after a TimeoutError, EOFError, OSError or ValueError the process must be killed."""
        deadline = time.monotonic() + timeout_seconds
        self._send(request, deadline)
        return Answer(*_answer(self._receive(deadline)))

    def interrupt(self) -> None:
        """Kills the whole process group, so that whoever waits for an answer sees the end of it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def kill(self) -> str:
        """Kills the process and all below it, closes both pipes, and says in words how the process ended."""
        left = _left(self.process.pid, self.mark)
        self.interrupt()  # before wait(): until the leader is reaped, the group's id is still ours
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pipe in self._pipes:
            pipe.close()
        code = self.process.wait()
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    def _send(self, data: bytes, deadline: float) -> None:
        view = memoryview(len(data).to_bytes(8, "big") + data)
        while view:
            _wait(self.requests, select.POLLOUT, deadline)
            with contextlib.suppress(BlockingIOError):
                view = view[os.write(self.requests, view) :]

    def _receive(self, deadline: float) -> bytes:
        size = int.from_bytes(self._read(8, deadline), "big")
        if size > _LONGEST_ANSWER:
            raise ValueError("what its worker wrote is no answer")
        return self._read(size, deadline)

    def _read(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            _wait(self.answers, select.POLLIN, deadline)
            with contextlib.suppress(BlockingIOError):
                piece = os.read(self.answers, min(size - len(data), 1 << 20))
                if not piece:
                    raise EOFError
                data += piece
        return bytes(data)


def _answer(data: bytes) -> tuple[dict[str, float], str, str]:
    """What a worker answered; ValueError if it is no answer, as when a function wrote into the channel."""
    try:
        entries, reason, detail = json.loads(data)
        numbers = all(isinstance(entry, float) for entry in entries.values())
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("what its worker wrote is no answer") from error
    if not (numbers and isinstance(reason, str) and isinstance(detail, str) and (reason or "reward" in entries)):
        raise ValueError("what its worker wrote is no answer")
    return entries, reason, detail


def _left(pid: int, mark: str) -> list[int]:
    """The processes that a worker's functions started, though they left its group or outlived it; Linux only.

    They are below it, or have its mark in their environment.
    """
    parents: dict[int, int] = {}
    found = [pid]
    for name in filter(str.isdecimal, os.listdir("/proc") if os.path.isdir("/proc/self") else ()):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(name)] = int(pathlib.Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[1])
            if mark.encode() in pathlib.Path("/proc", name, "environ").read_bytes() and int(name) != pid:
                found.append(int(name))
    for one in found:  # grows as it is read
        found += [child for child, parent in parents.items() if parent == one and child not in found]
    return found[1:]


def _wait(descriptor: int, event: int, deadline: float) -> None:
    """Waits until the descriptor can be read or written; raises TimeoutError at the deadline."""
    poll = select.poll()
    poll.register(descriptor, event)
    left = deadline - time.monotonic()
    if left <= 0 or not poll.poll(left * 1000.0):
        raise TimeoutError


def _kill_all(slots: list[_Process | None], owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork of the process that started the workers
    for number, process in enumerate(slots):
        slots[number] = None
        if process is not None:
            process.kill()


class WorkerPool:
    """Worker processes for some functions: started at the first call; ended by `close`, at exit, or when
    dropped.

    Args:
      functions: of (completion, example); sent by cloudpickle, so functions of a notebook cell work.
      timeout_seconds: limit of one call; loading the functions is not counted.
      workers: processes. Each runs one call at a time.
      memory_bytes: limit of a worker's address space; 0 sets none.
      startup_seconds: limit for starting a process and loading the functions.
      name: what the functions are called in errors.
    """

    def __init__(self, functions: Sequence[Callable], *, timeout_seconds: float = 5.0, workers: int = 2,
                 memory_bytes: int = 0, startup_seconds: float = 60.0, name: str = "reward"):  # fmt: skip
        self._timeout_seconds = timeout_seconds
        self._startup_seconds = startup_seconds
        self._memory_bytes = memory_bytes
        self._name = name
        try:
            self._payload = cloudpickle.dumps(tuple(explicit(f) for f in functions))
        except Refused as error:
            raise Refused(f"reward {name!r}: {error}") from error
        self._slots: list[_Process | None] = [None] * workers
        self._lock = threading.Lock()
        self._finalize = weakref.finalize(self, _kill_all, self._slots, os.getpid())  # runs at exit too

    def close(self) -> None:
        """Ends the worker processes; a later call starts new ones."""
        _kill_all(self._slots, os.getpid())

    def run(self, calls: Sequence[Call], *, max_failed_rows: int) -> list[Answer]:
        """Makes the calls, each at most twice, and returns their answers in order.

        A call that failed (not one that returned None) is retried once in a worker that works; one that hangs
        delays only itself. When more than `max_failed_rows` rows have failed, what is left is NOT_RUN.
        """
        with self._lock:
            return self._run(calls, max_failed_rows)

    def _run(self, calls: Sequence[Call], max_failed_rows: int) -> list[Answer]:
        answers = [NOT_RUN] * len(calls)
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(len(calls)):
            todo.put(number)
        failed_rows: set[int] = set()
        stop = threading.Event()

        def serve(slot: int) -> None:
            with contextlib.suppress(queue.Empty):
                while not stop.is_set():
                    number = todo.get_nowait()
                    answers[number] = answer = self._twice(slot, calls[number], stop)
                    if answer.reason not in ("", "not_applicable"):
                        failed_rows.add(calls[number].row)
                        if len(failed_rows) > max_failed_rows:
                            stop.set()

        slots = range(min(len(self._slots), len(calls)))
        with futures.ThreadPoolExecutor(max(1, len(slots))) as threads:
            serving = [threads.submit(serve, slot) for slot in slots]
            try:
                futures.wait(serving, return_when=futures.FIRST_EXCEPTION)
                for served in serving:
                    if served.done():
                        served.result()
            except BaseException:  # Refused, or Ctrl-C: what the workers do now is of no use to anybody
                stop.set()
                for process in self._slots:
                    if process is not None:
                        process.interrupt()
                raise
        return answers

    def _twice(self, slot: int, call: Call, stop: threading.Event) -> Answer:
        try:
            request = pickle.dumps((call.which, call.completion, dict(call.example)))
        except Exception as error:
            raise Refused(f"reward {self._name!r}, row {call.row}: its example cannot be sent to a worker: "
                          f"{type(error).__name__}: {error}") from error  # fmt: skip
        answer = self._once(slot, request)
        if answer.reason in ("", "not_applicable") or stop.is_set():
            return answer
        return self._once(slot, request)

    def _once(self, slot: int, request: bytes) -> Answer:
        process = self._slots[slot]
        if process is None:
            settings = pickle.dumps((list(sys.path), self._memory_bytes))
            try:
                process = self._slots[slot] = _Process(settings, self._payload, self._startup_seconds)
            except Refused as error:
                raise Refused(
                    f"reward {self._name!r} cannot be loaded in a worker process: {error}"
                ) from error
        try:
            return process.ask(request, self._timeout_seconds)
        except TimeoutError:
            answer = Answer({}, "hung", f"it ran past timeout_seconds={self._timeout_seconds:g}")
            process.kill()
        except (EOFError, OSError):
            answer = Answer({}, "died", f"its worker ended: {process.kill()}")
        except ValueError as error:
            answer = Answer({}, "died", str(error))
            process.kill()
        self._slots[slot] = None
        return answer
