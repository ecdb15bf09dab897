"""Trials: what a drill does many times. Each has a number, a limit of time, and an outcome that is kept in a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).resolve().parent
KEPT = HERE / "trials"  # finished trials of drills that were cut; not in the repository


class Outcome(NamedTuple):
    """What came of a trial: which kind of trial it was, how it came out in a word or two, and what was wrong, if so."""

    kind: str
    came: str
    wrong: str = ""


TrialFn = Callable[[int], Outcome]  # of the trial's number


class Drill(NamedTuple):
    """A drill: `prepared(seed, steps)` is a context that gives the function of a trial's number.

    what      what a trial does and how it must come out, in a sentence or two
    count     trials of the full form
    short     trials of the short form, which CI runs
    seconds   limit of one trial; past it, it hung
    steps     of each run in the full and in the short form, where that can be chosen
    """

    name: str
    what: str
    count: int
    short: int
    seconds: float
    prepared: Callable[[int, int], contextlib.AbstractContextManager[TrialFn]]
    steps: tuple[int, int] = (0, 0)


class Late(BaseException):
    """A trial that is past its limit; no Exception, so that no handler of those that are tried takes it for its own."""


def chance(*names: Any) -> random.Random:
    """Randomness that depends on these names alone, and not on what was drawn before."""
    return random.Random("/".join(map(str, names)))


def run(drill: Drill, numbers: Sequence[int], seed: int, *, steps: int = 0, kept: pathlib.Path | None = None,
        say: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:  # fmt: skip
    """Makes the trials of these numbers and returns a record of each; those in the file `kept` are not made again.

    Trials that were made with other code, another seed or other steps are made anew. A failure is said at once, with
    the command that repeats it.
    """
    same = {"seed": seed, "code": sources(), "steps": steps}
    known = {record["number"]: record for record in _lines(kept) if same.items() <= record.items()}
    made_with = {"commit": commit()}
    missing = [number for number in numbers if number not in known]
    if missing:
        with drill.prepared(seed, steps) as trial:
            for number in missing:
                begun = time.perf_counter()
                outcome = judged(trial, number, drill.seconds)
                seconds = round(time.perf_counter() - begun, 3)
                known[number] = {"number": number, **same, **made_with, "seconds": seconds, **outcome._asdict()}
                if outcome.wrong:
                    say(f"{drill.name} {number}: {outcome.kind}: {outcome.wrong}")
                    say(f"  again: {again(drill, number, seed)}")
                if kept is not None:
                    _add_line(kept, json.dumps(known[number]))
    return [known[number] for number in numbers]


def judged(trial: TrialFn, number: int, seconds: float) -> Outcome:
    """The trial's outcome; one that raises or is past its limit came out wrong."""
    try:
        with limited(seconds):
            return trial(number)
    except Late:
        return Outcome("any", "hung", f"it was not over after {seconds:g} s")
    except Exception as error:
        return Outcome("any", "raised", f"{type(error).__name__}: {error}"[:2000])


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises Late within, on the main thread, once the time is over; again every second if that was swallowed."""

    def late(*_: Any) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    others = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # of whoever runs us, as a test's own limit
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *others)


def again(drill: Drill, number: int, seed: int) -> str:
    """The command that repeats one trial."""
    return f"python -m drills {drill.name} --seed {seed} --only {number}"


def sources() -> str:
    """A short name for the code that the trials try: a digest of mlrl's and the drills' files."""
    digest = hashlib.sha256()
    for folder in (HERE.parent / "mlrl", HERE.parent / "gin", HERE):
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".gin")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


def commit() -> str:
    """Of the checkout; with a + where files differ from it."""
    said = subprocess.run(["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=HERE, capture_output=True,
                          text=True, check=False)  # fmt: skip
    return said.stdout.strip() or "unknown"


def _add_line(path: pathlib.Path, line: str) -> None:
    path.parent.mkdir(exist_ok=True)
    text = path.read_text() if path.is_file() else ""
    with path.open("a") as file:
        file.truncate(text.rfind("\n") + 1)  # what a cut left of a line
        file.write(f"{line}\n")


def _lines(path: pathlib.Path | None) -> list[dict[str, Any]]:
    """The whole lines of a file; the last may be cut."""
    if path is None or not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
