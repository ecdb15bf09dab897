"""Hostile programs in the sandbox, varied at random: none escapes, outlives its limit, or leaves anything behind."""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
import textwrap
import time
from collections.abc import Iterator
from typing import Any

import psutil

from drills.trials import Drill, Outcome, TrialFn, chance
from mlrl.sandbox.pool import Pool
from mlrl.sandbox.results import Job, Limits
from tests.hostile_programs import ENDLESS, FILES, MEMORY, NETWORK, PROCESSES, PYTHON

SECRET = "what nobody may read"
LIMITS = Limits(seconds=1.0, cpu_seconds=1, memory_bytes=64 << 20)
KINDS = {"endless": ENDLESS, "memory": MEMORY, "processes": PROCESSES, "files": FILES, "network": NETWORK,
         "python": PYTHON}  # fmt: skip
WALLS = {"all walls": (), "landlock and seccomp": ("namespaces",), "seccomp": ("namespaces", "landlock")}
SPARE_SECONDS = 4.0  # past a program's limit: its server's start, and a machine that others use too


@contextlib.contextmanager
def prepared(seed: int, steps: int) -> Iterator[TrialFn]:
    """Makes a secret that may not be read, and a pool for each set of walls that this system has."""
    del steps
    with tempfile.TemporaryDirectory(prefix="drill-programs-") as name, contextlib.ExitStack() as stack:
        folder, pools = pathlib.Path(name), {}
        folder.chmod(0o777)
        secret, target = folder / "secret", folder / "target"
        secret.write_text(SECRET)
        secret.chmod(0o666)
        for walls, without in WALLS.items():
            pools[walls] = stack.enter_context(contextlib.closing(Pool(LIMITS, workers=1, without=without)))
            pools[walls].run([Job("x = 1")])
        descriptors = opened()

        def trial(number: int) -> Outcome:
            luck = chance("programs", seed, number)
            walls, kind = luck.choice(list(WALLS)), luck.choice(list(KINDS))
            program, (source, allowed, _) = luck.choice(list(KINDS[kind].items()))
            job = Job(varied(luck, source.replace("SECRET", str(secret)).replace("TARGET", str(target))), ("f()",))
            begun = time.monotonic()
            (result,) = pools[walls].run([job])
            seconds = time.monotonic() - begun
            wrong = {
                "it got at the secret": SECRET in repr(result) or "root:" in repr(result),
                "it wrote outside": secret.read_text() != SECRET or sorted(os.listdir(folder)) != ["secret"],
                f"it took {seconds:.1f} s": seconds > LIMITS.seconds + SPARE_SECONDS,
                f"it ended as {result.status}, {result.detail}": result.status == "ok" and "ok" not in allowed,
                "a process of it is alive": bool(alive_below(pools[walls])),
                f"descriptors {opened() - descriptors}": len(opened()) > len(descriptors),
                "the next program does not run": pools[walls].run([Job("x = 1", ("x",))])[0].status != "ok",
            }
            said = "; ".join(words for words, true in wrong.items() if true)
            return Outcome(kind, result.status, said and f"{program!r} behind {walls}: {said}")

        yield trial


def varied(luck: Any, source: str) -> str:
    """The same program, written another way: after work, in a handler, as text that is run, or many times."""
    how = luck.choice(("as it is", "later", "handled", "text", "after output", "after allocation"))
    if "\0" in source:  # no other way to write it
        return source
    body = textwrap.indent(source, "    ")
    return {
        "as it is": source,
        "later": f"x = sum(i * i for i in range({luck.randrange(10**5)}))\n{source}",
        "handled": f"def f(): raise ValueError\ntry:\n{body}\nexcept MemoryError: raise\n",
        "text": f"exec(compile({source!r}, 'a', 'exec'), globals())",
        "after output": f"print({'y' * luck.randrange(2000)!r})\n{source}",
        "after allocation": f"held = bytearray({luck.randrange(1 << 22)})\n{source}",
    }[how]


def opened() -> set[str]:
    """Descriptors that this process holds."""
    return set(os.listdir("/proc/self/fd"))


def alive_below(pool: Pool, seconds: float = 3.0) -> list[psutil.Process]:
    """Programs that still run beneath a pool's servers after some time."""
    deadline = time.monotonic() + seconds
    while True:
        found = [psutil.Process(server.process.pid) for server in pool._slots if server is not None]
        if "namespaces" in pool.walls():
            found = [inner for outer in found for inner in outer.children()]
        found = [program for server in found for program in server.children(recursive=True)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.02)


PROGRAMS = Drill(
    "programs", "A hostile program of the tests (endless loops, memory, processes, files, network, tricks of Python), "
    "written another way at random, runs in the sandbox behind one of three sets of walls. It reads no secret, writes "
    "nothing outside, ends in its time with an answer that says why, and leaves no process and no descriptor; the next "
    "program runs.", 100, 12, 30.0, prepared)  # fmt: skip
