"""Broken and hostile host rewards, mixed at random: each row says what was wrong with it, and no step is stalled."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import psutil

from drills.broken import behave
from drills.programs import opened
from drills.trials import Drill, Outcome, TrialFn, chance
from mlrl.rewards.workers import Call, WorkerPool

TIMEOUT_SECONDS = 0.3
START_SECONDS = 5.0  # of each worker that has to be started, on a machine that others use too
# What a reward does: how its row must be answered; "" is a reward.
BEHAVIOURS = {
    "right": {""}, "parts": {""}, "floods its outputs": {""}, "closes its outputs": {""}, "reads its input": {""},
    "changes folder and environment": {""}, "starts a process": {""}, "starts a thread": {""},
    "raises": {"raised"}, "raises an error that cannot be shown": {"raised"}, "raises BaseException": {"raised"},
    "exits": {"raised"}, "recurses": {"raised", "died"}, "nan": {"not_finite"}, "inf": {"not_finite"},
    "a text": {"wrong_type"}, "a list": {"wrong_type"}, "an object": {"wrong_type"}, "a part of NaN": {"not_finite"},
    "a huge number": {"not_finite", "wrong_type"}, "none": {"not_applicable"}, "dies": {"died"}, "crashes": {"died"},
    "stops itself": {"hung"}, "loops": {"hung"}, "sleeps": {"hung"}, "loops and catches all": {"hung"},
    "hangs with a process": {"hung"}, "leaves a daemon": {""}, "fills its memory": {"raised", "died", "hung"},
    "writes into its channel": {"died", "hung"}, "forges an answer": {"died"}, "closes its channel": {"died", "hung"},
}  # fmt: skip


@contextlib.contextmanager
def prepared(seed: int, steps: int) -> Iterator[TrialFn]:
    """Nothing is shared: each trial has workers of its own."""
    del steps
    me = psutil.Process()

    def trial(number: int) -> Outcome:
        luck = chance("rewards", seed, number)
        worst = luck.choice(list(BEHAVIOURS))
        said = ["right"] * luck.randrange(1, 6) + [worst] + luck.sample(list(BEHAVIOURS), luck.randrange(3))
        luck.shuffle(said)
        before, children = opened(), set(me.children(recursive=True))
        mark = f"drill-{os.getpid()}-{number}"
        os.environ["MLRL_DRILL"] = mark
        pool = WorkerPool([behave], timeout_seconds=TIMEOUT_SECONDS, workers=luck.choice((1, 2)), memory_bytes=1 << 31)
        begun = time.monotonic()
        try:
            answers = pool.run([Call(row, 0, text, {"answer": "1"}) for row, text in enumerate(said)],
                               max_failed_rows=len(said))  # fmt: skip
            seconds = time.monotonic() - begun
        finally:
            pool.close()
            del os.environ["MLRL_DRILL"]
        failing = sum(BEHAVIOURS[text] != {""} for text in said)
        most = 2 * START_SECONDS + 2 * failing * (TIMEOUT_SECONDS + START_SECONDS)  # two tries, each with a new worker
        wrong = [f"{text}: {answer.reason or answer.entries}" for text, answer in zip(said, answers)
                 if answer.reason not in BEHAVIOURS[text]]  # fmt: skip
        wrong += [f"it took {seconds:.1f} s of {most:.1f}"] if seconds > most else []
        wrong += [f"descriptors {opened() - before}"] if len(opened()) > len(before) else []
        wrong += [f"left {name}" for name in marked(mark)]
        wrong += [f"left a child {child}" for child in set(me.children(recursive=True)) - children]
        answer = answers[said.index(worst)]
        return Outcome("host reward", answer.reason or "a reward", wrong and f"{said}: {'; '.join(wrong)}" or "")

    yield trial


def marked(mark: str, seconds: float = 3.0) -> list[str]:
    """Processes with our mark in their environment that still run after some time; they are ended then."""
    deadline = time.monotonic() + seconds
    while True:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and process.environ().get("MLRL_DRILL") == mark:
                    found.append(process)
        if not found or time.monotonic() > deadline:
            names = []
            for process in found:
                with contextlib.suppress(psutil.Error):
                    names.append(" ".join(process.cmdline()))
                    process.kill()
            return names
        time.sleep(0.05)


REWARDS = Drill(
    "rewards", "A handful of completions is judged by host rewards of which one to three are broken or hostile, of "
    f"{len(BEHAVIOURS)} kinds: they raise, hang, loop, die, crash, flood, start processes, return nonsense. Each row "
    "says what was wrong with it, right rows have their reward, the call is over in its time, and no process and no "
    "descriptor is left.", 100, 6, 60.0, prepared)  # fmt: skip
