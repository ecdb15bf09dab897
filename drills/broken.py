"""Host rewards that are broken or hostile, by name; a worker process imports this module, so it is a light one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time


def behave(completion, example):
    """Does what the completion names."""
    return _ACTS[completion]()


def _raise(error):
    raise error


class _Unshowable(Exception):
    def __str__(self):
        raise ValueError("no words")


def _each_descriptor(act):
    for number in range(3, 64):
        with contextlib.suppress(OSError):
            act(number)
    return 1.0


def _forever():
    while True:
        pass


def _forever_whatever_comes():
    while True:
        try:
            _forever()
        except BaseException:
            continue


def _recurse():
    return _recurse() + 1.0


def _process(seconds="100"):
    subprocess.Popen(["sleep", seconds])
    return 1.0


def _daemon():
    subprocess.Popen(["sleep", "100"], start_new_session=True)
    return 1.0


def _thread():
    import threading

    threading.Thread(target=_forever, daemon=True).start()
    return 1.0


def _elsewhere():
    os.chdir("/")
    os.environ["HOME"] = "/nowhere"
    sys.path.clear()
    return 1.0


_ACTS = {
    "right": lambda: 1.0,
    "parts": lambda: {"reward": 1.0, "style": 0.5},
    "floods its outputs": lambda: [os.write(n, b"x" * 10**6) for n in (1, 2)] and 1.0,
    "closes its outputs": lambda: [os.close(n) for n in (1, 2)] and 1.0,
    "reads its input": lambda: 1.0 + len(sys.stdin.read()),
    "changes folder and environment": _elsewhere,
    "starts a process": _process,
    "starts a thread": _thread,
    "raises": lambda: _raise(KeyError("no such key")),
    "raises an error that cannot be shown": lambda: _raise(_Unshowable()),
    "raises BaseException": lambda: _raise(BaseException("x")),
    "exits": lambda: sys.exit(3),
    "recurses": _recurse,
    "nan": lambda: float("nan"),
    "inf": lambda: float("-inf"),
    "a text": lambda: "0.5",
    "a list": lambda: [0.5],
    "an object": lambda: object(),
    "a part of NaN": lambda: {"reward": 1.0, "style": float("nan")},
    "a huge number": lambda: 10**400,
    "none": lambda: None,
    "dies": lambda: os._exit(3),
    "crashes": lambda: os.kill(os.getpid(), 11),
    "stops itself": lambda: os.kill(os.getpid(), 19) or _forever(),
    "loops": _forever,
    "sleeps": lambda: time.sleep(100.0),
    "loops and catches all": _forever_whatever_comes,
    "hangs with a process": lambda: _process() and _forever(),
    "leaves a daemon": _daemon,
    "fills its memory": lambda: len([bytearray(1 << 28) for _ in range(64)]),
    "writes into its channel": lambda: _each_descriptor(lambda n: os.write(n, b"\xff" * 64)),
    "forges an answer": lambda: _each_descriptor(lambda n: os.write(n, (4).to_bytes(8, "big") + b"junk")),
    "closes its channel": lambda: _each_descriptor(os.close),
}  # fmt: skip
