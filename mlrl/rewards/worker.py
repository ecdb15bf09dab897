"""The worker process of host rewards: calls from stdin, answers to stdout; standard library only.

Started as a script by `mlrl.rewards.workers`, never imported. A message is 8 bytes of length and a pickle; an answer is
JSON, since whoever reads a pickle runs what it says, and a function can write into our descriptors.
"""

import json
import math
import os
import pickle
import queue
import signal
import sys
import threading
from collections.abc import Mapping

MAX_DETAIL_CHARACTERS = 300


def _read_exactly(stream, size):
    data = b""
    while len(data) < size:
        piece = stream.read(size - len(data))
        if not piece:
            _end()  # the parent is gone; nobody waits for an answer, and a hung call must not outlive it
        data += piece
    return data


def _end():
    """Ends this process and the others of its group, which its functions started."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def read_message(stream):
    """The next pickled message, as bytes; ends the process at the end of the stream."""
    return _read_exactly(stream, int.from_bytes(_read_exactly(stream, 8), "big"))


def write_message(descriptor, message):
    """Writes one answer whole."""
    data = json.dumps(message).encode()
    view = memoryview(len(data).to_bytes(8, "big") + data)
    while view:
        view = view[os.write(descriptor, view) :]


def _number(value):
    """`value` as a Python float, or TypeError: text and arrays with a shape are not numbers."""
    if not hasattr(type(value), "__float__") or getattr(value, "shape", ()) != ():
        raise TypeError
    return float(value)


def _short(text):
    text = " ".join(str(text).split())
    return text if len(text) <= MAX_DETAIL_CHARACTERS else text[:MAX_DETAIL_CHARACTERS] + "..."


def judge(value):
    """What a function returned -> (entries with "reward", reason, detail); reason "" when it can be used."""
    if value is None:
        return {}, "not_applicable", "it returned None"
    try:
        if isinstance(value, Mapping):
            entries = {str(name): _number(entry) for name, entry in value.items()}
            if len(entries) == 1:
                entries = {"reward": next(iter(entries.values()))}
            if "reward" not in entries:
                names = _short(sorted(entries))
                return {}, "wrong_type", f'it returned a mapping without an entry "reward": {names}'
        else:
            entries = {"reward": _number(value)}
    except Exception:  # __float__ and __repr__ are the user's code too
        try:
            shown = _short(repr(value))
        except Exception:
            shown = "a value that cannot be shown"
        wanted = "a number, a mapping of numbers or None"
        return {}, "wrong_type", f"it must return {wanted}, not {type(value).__name__} {shown}"
    for name, entry in entries.items():
        if not math.isfinite(entry):
            return {}, "not_finite", f"it returned {entry} as {name}"
    return entries, "", ""


def call(function, completion, example):
    """One call, judged; whatever the function raises, sys.exit included, becomes the reason "raised"."""
    try:
        return judge(function(completion, example))
    except BaseException as error:
        try:
            message = str(error)
        except Exception:
            message = "(its message cannot be shown)"
        return {}, "raised", _short(f"{type(error).__name__}: {message}" if message else type(error).__name__)


def _private_streams():
    """Moves the pipes to descriptors of our own, so that nothing the function prints or reads meets them."""
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    answers = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)
    return requests, answers


def _keep_orphans():
    """What a function leaves running stays below this process, also what left its group: so its parent finds it."""
    try:
        import ctypes

        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    except (ImportError, OSError, AttributeError):
        pass  # not on Linux


def _limit_memory(size_bytes):
    if size_bytes > 0:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size_bytes, size_bytes))


def main():
    """Loads the functions, says so, then answers calls until stdin closes."""
    requests, answers = _private_streams()
    own_process = os.getpid()
    _keep_orphans()
    path, memory_bytes = pickle.loads(read_message(requests))
    sys.path[:] = path
    payload = read_message(requests)
    # Read ahead in a thread: it sees the parent's end even while a call never returns.
    inbox = queue.SimpleQueue()

    def read_ahead():
        while True:
            inbox.put(read_message(requests))

    threading.Thread(target=read_ahead, daemon=True).start()
    try:
        functions = pickle.loads(payload)
    except BaseException as error:
        write_message(answers, ({}, "broken", _short(f"{type(error).__name__}: {error}")))
        os._exit(1)
    _limit_memory(memory_bytes)
    write_message(answers, ({}, "ready", ""))
    while True:
        try:
            which, completion, example = pickle.loads(inbox.get())
            answer = call(functions[which], completion, example)
        except BaseException as error:
            why = f"the example cannot be loaded in a worker: {type(error).__name__}: {error}"
            answer = {}, "raised", _short(why)
        if os.getpid() != own_process:
            os._exit(0)  # a child that the function forked and let run on
        write_message(answers, answer)


if __name__ == "__main__":
    main()
