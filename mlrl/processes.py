"""One run in several processes, each with devices of its own: what one of them does, and what all have to know.

Every process runs the same program, and all meet in every function below but `join` and `is_first`: a process that
skips one leaves the others waiting.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import pickle
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mlrl.types import Refused


def join() -> None:
    """Joins the run's other processes, if there are any; to be called before JAX looks for devices.

    On Cloud TPU, GKE, Slurm and under mpirun JAX finds the others by itself. Elsewhere the environment of each process
    says it: JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES, JAX_PROCESS_ID.

    Raises: Refused, if only some of the three are given, or the others are not found.
    """
    if jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if 0 < len(given) < len(names):
        missing = next(name for name in names if name not in given)
        raise Refused(f"{' and '.join(given)} are set, but {missing} is not: set all three, or none")
    if given:
        numbers = [given[name] for name in names[1:]]
        if not all(number.isdecimal() for number in numbers) or not int(numbers[1]) < int(numbers[0]):
            raise Refused(f"JAX_PROCESS_ID={numbers[1]} and JAX_NUM_PROCESSES={numbers[0]} must be whole numbers, the "
                          "first one below the second")  # fmt: skip
        with _failures_refused(given[names[0]]):
            jax.distributed.initialize(given[names[0]], int(numbers[0]), int(numbers[1]))
    elif os.environ.get("JAX_PLATFORMS") != "cpu":
        try:
            jax.distributed.initialize()
        except ValueError:  # it knows of no cluster that this process is in
            pass
        except RuntimeError as error:  # JAX was used before, as in a notebook that calls mlrl.main: too late to join
            if "must be called before" not in str(error):
                raise


@contextlib.contextmanager
def _failures_refused(address: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, jax.errors.JaxRuntimeError) as error:
        said = str(error).strip().splitlines()[0]
        raise Refused(f"the run's other processes were not found at {address}: {said}") from error


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def on_host(tree: Any) -> Any:
    """Arrays as numpy arrays, whole on the host of every process."""
    def whole(x: Any) -> Any:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return jax.device_get(x)

    return jax.tree.map(whole, tree)


def in_shares(count: int, compute: Callable[[range], Sequence[Any]]) -> list[Any]:
    """compute(range) -> one picklable result each, of 0 .. count: every process computes its share, and has all.

    Raises: Refused, in every process, if it was raised in one.
    """
    total, index = jax.process_count(), jax.process_index()
    own = range(count * index // total, count * (index + 1) // total)
    return [result for share in everywhere(lambda: list(compute(own))) for result in share]


def together(compute: Callable[[], Any]) -> Any:
    """What compute() gives in this process, if it was refused in none; in compute() the processes must not meet.

    Raises: Refused, in every process, with the words of those that refused it: a file may be missing on one host only.
    """
    if jax.process_count() == 1:
        return compute()
    try:
        value, words = compute(), ""
    except Refused as error:
        value, words = None, str(error)
    said = exchanged((words, socket.gethostname()))
    refusing = [i for i, (words, _) in enumerate(said) if words]
    if not refusing:
        return value
    words, host = said[refusing[0]]
    all_alike = len(refusing) == len(said) and len({words for words, _ in said}) == 1
    raise Refused(words if all_alike else f"process {refusing[0]} on {host}: {words}")


def everywhere(compute: Callable[[], Any]) -> list[Any]:
    """What compute() gave in each process, in their order, everywhere. Raises Refused as `in_shares` does."""
    if jax.process_count() == 1:
        return [compute()]
    try:
        mine = (compute(), "")
    except Refused as error:
        mine = (None, str(error))
    found = exchanged(mine)
    said = next((words for _, words in found if words), "")
    if said:
        raise Refused(said)
    return [value for value, _ in found]


def by_first(compute: Callable[[], Any]) -> Any:
    """What compute() gives in the first process, everywhere; the others wait. Raises Refused as `in_shares` does."""
    return everywhere(lambda: compute() if is_first() else None)[0]


def require_shared(folder: str | os.PathLike, seconds: float = 10.0) -> None:
    """Refuses a folder that is not one and the same for all processes: each would keep a part of every checkpoint.

    The first process writes a file there, which the others must see within so many seconds.

    Raises: Refused, in every process.
    """
    if jax.process_count() == 1:
        return

    def write() -> pathlib.Path:
        path = pathlib.Path(folder, f".seen-by-all-{uuid.uuid4().hex}")
        path.touch()
        return path

    def look() -> str:
        end = time.monotonic() + seconds
        while not mark.exists():
            if time.monotonic() > end:
                return (f"{folder} is not one folder for all processes: process {jax.process_index()} on "
                        f"{socket.gethostname()} does not see what the first one wrote there; name a folder on a disk, "
                        "or in a mounted bucket, that all of them share")  # fmt: skip
            time.sleep(0.1)
        return ""

    mark = by_first(write)
    said = everywhere(look)
    by_first(lambda: mark.unlink(missing_ok=True))
    if any(said):
        raise Refused(next(filter(None, said)))


def exchanged(value: Any) -> list[Any]:
    """The values of all processes, in their order; they travel by pickle."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data))).reshape(-1)
    room = 1 << int(sizes.max()).bit_length()  # of few different sizes, since each is compiled
    gathered = multihost_utils.process_allgather(np.pad(data, (0, room - len(data))))
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(gathered.reshape(len(sizes), -1), sizes)]


class Preemption:
    """Notices that this run is to end (SIGTERM), wherever it was said; all processes learn of it at the same step."""

    def __init__(self) -> None:
        self._said = threading.Event()
        self._before: Any = None  # who listened to the signal

    def __enter__(self) -> Preemption:
        # Several processes have a service for it, which listens since they joined.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, lambda *_: self._said.set())
        return self

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def came(self, step: int) -> bool:
        """Whether the run is to end after this step; to be asked once a step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._said.is_set()
