"""What runs in a program's own process: the program, then expressions in its namespace, each value sent as it comes.

The channel is descriptor 3. What comes over it is the program's claim: a program that finds the descriptor can write
to it. So the caller never sends what it expects, and compares values itself: to forge an answer is to know it.
"""

import json
import os
import random
import sys

from . import guard, values

CHANNEL = 3
MAX_DETAIL_CHARACTERS = 300


def perform(job, *, language_only):
    """Runs a job and never returns: the process ends, whatever the program did."""
    leave, write, code = os._exit, os.write, 1
    try:
        _perform(job, language_only, lambda message: _send(write, message))
        sys.stdout.flush()
        sys.stderr.flush()
        code = 0
    finally:
        leave(code)


def _send(write, message):
    view = memoryview(json.dumps(message).encode() + b"\n")
    while view:
        view = view[write(CHANNEL, view):]


def _perform(job, language_only, send):
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", closefd=False), open(2, "w", closefd=False)
    random.seed(job["seed"])
    own = {"__name__": "__main__", "__builtins__": guard.builtins_for(language_only=language_only)}

    def prepared(source, mode):
        if language_only:
            guard.check(source)
        return compile(source, f"<{mode}>", mode, dont_inherit=True)

    message = _attempt(lambda: prepared(job["program"], "exec"), "invalid")
    if "result" in message:
        code = message.pop("result")
        message = _attempt(lambda: exec(code, own), "raised")
    message.pop("result", None)
    send(message)
    if message["status"] != "ok":
        return
    for expression in job["expressions"]:
        message = _attempt(lambda: prepared(expression.strip(), "eval"), "invalid")  # noqa: B023
        if "result" in message:
            code = message.pop("result")
            message = _attempt(lambda: values.encode(eval(code, own)), "raised")  # noqa: B023
        if "result" in message:
            message["value"] = message.pop("result")
        send(message)


def _attempt(act, failure):
    """{"status": "ok", "result"} or {"status", "detail"}: nothing that `act` raises leaves, sys.exit included."""
    try:
        return {"status": "ok", "result": act()}
    except MemoryError:
        return {"status": "memory", "detail": "MemoryError"}
    except values.NotAValue as error:
        return {"status": "not_a_value", "detail": str(error)}
    except guard.Refusal as error:
        return {"status": "refused", "detail": str(error)}
    except BaseException as error:
        try:
            detail = f"{type(error).__name__}: {error}"[:MAX_DETAIL_CHARACTERS]
        except BaseException:
            detail = "an exception that cannot be shown"
        return {"status": failure, "detail": detail}
