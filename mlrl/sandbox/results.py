"""What goes into the sandbox and what comes out: jobs, limits and results, read without trusting who wrote them."""

from __future__ import annotations

import base64
import json
import signal
from typing import Any, NamedTuple

from mlrl.sandbox import values

STATUSES = ("ok", "raised", "invalid", "refused", "not_a_value", "memory", "timeout", "output", "died", "not_run")


class Limits(NamedTuple):
    """What one program may use.

    seconds       wall clock, the start of its process included
    cpu_seconds   whole seconds of processor time
    memory_bytes  address space beyond the interpreter's own
    output_bytes  of what it prints, and of its values as JSON, each
    file_bytes    of its scratch folder (without namespaces: of each file there)
    open_files    descriptors, the four it begins with included
    """

    seconds: float = 2.0
    cpu_seconds: int = 2
    memory_bytes: int = 256 << 20
    output_bytes: int = 64 << 10
    file_bytes: int = 1 << 20
    open_files: int = 16


class Job(NamedTuple):
    """A program, expressions to evaluate in its namespace once it has run, and the seed of its `random`."""

    program: str
    expressions: tuple[str, ...] = ()
    seed: int = 0


class Answer(NamedTuple):
    """What came of one expression: one of STATUSES, the value if that is "ok", else a detail in words."""

    status: str
    value: Any
    detail: str


class Result(NamedTuple):
    """What came of a job.

    status   "ok" if the program ran and every expression has a value; otherwise what went wrong first:
             raised       an exception left it (SystemExit and MemoryError's kin included; see detail)
             invalid      it is not Python            refused  language mode does not allow it
             not_a_value  an expression is not made of numbers, text, None, lists, tuples, sets and dicts
             memory, timeout, output    past that limit
             died         its process ended before its answers came (a signal, os._exit, a closed channel)
             not_run      the time of the whole call was over before its turn
    detail   in words
    answers  one per expression, as far as they came; the rest have the job's status
    output   what it printed, both streams, cut at Limits.output_bytes
    seconds  of wall clock
    """

    status: str
    detail: str
    answers: tuple[Answer, ...]
    output: str
    seconds: float


def result_of(job: Job, said: dict[str, Any], cpu_seconds: int) -> Result:
    """A Result from a server's answer; whatever the program wrote into its channel, this raises nothing."""
    output = base64.b64decode(said["output"]).decode(errors="replace")
    lines = base64.b64decode(said["channel"]).split(b"\n")[:-1]
    messages = [message_of(line) for line in lines[: 1 + len(job.expressions)]]
    status, detail = said["why"], {"timeout": "past its seconds", "output": "past output_bytes"}.get(said["why"], "")
    if len(messages) == 1 + len(job.expressions) or (messages and messages[0].status != "ok"):
        failed = [message for message in messages if message.status != "ok"]
        status, detail = (failed[0].status, failed[0].detail) if failed else ("ok", "")
    elif not status:
        code = said["end"]
        status, detail = "died", f"killed by signal {-code}" if code < 0 else f"exit code {code} before its answers"
        if code in (-signal.SIGXCPU, -signal.SIGKILL) and said["cpu_seconds"] >= cpu_seconds - 0.1:
            status, detail = "timeout", "past its cpu_seconds"
    answers = messages[1:] + [Answer(status, None, detail)] * (1 + len(job.expressions) - max(1, len(messages)))
    return Result(status, detail, tuple(answers), output, said["seconds"])


def message_of(line: bytes) -> Answer:
    """The answer in a line of the channel; one that the sandbox did not write has the status "died"."""
    try:
        message = json.loads(line)
        status, detail = message["status"], str(message.get("detail", ""))
        if status not in STATUSES:
            raise ValueError
        value = values.decode(message["value"]) if status == "ok" and "value" in message else None
        return Answer(status, value, detail)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Answer("died", None, "its channel holds what the sandbox did not write")


def without_answers(job: Job, status: str, detail: str) -> Result:
    """The result of a job that was never run, or whose process said nothing: every expression has this status."""
    return Result(status, detail, (Answer(status, None, detail),) * len(job.expressions), "", 0.0)
