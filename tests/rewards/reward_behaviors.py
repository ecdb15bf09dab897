"""Rewards that misbehave on demand; a worker imports this module, so it is a light one."""

import os
import signal
import subprocess
import sys
import time


def behave(completion, example):
    """Does what the completion says."""
    if completion == "hang":
        while True:
            pass
    if completion == "sleep":
        time.sleep(60.0)
    if completion == "raise":
        raise KeyError("no such key")
    if completion == "nan":
        return float("nan")
    if completion == "text":
        return "0.5"
    if completion == "list":
        return [0.5]
    if completion == "none":
        return None
    if completion == "exit":
        sys.exit(3)
    if completion == "die":
        os._exit(3)
    if completion == "signal":
        os.kill(os.getpid(), signal.SIGSEGV)
    if completion == "flood":
        print("x" * 1_000_000)
        os.write(1, b"y" * 1_000_000)
        os.write(2, b"z" * 1_000_000)
    if completion == "read":
        return len(sys.stdin.read())
    if completion == "parts":
        return {"reward": 1, "style": 0.25}
    if completion == "single":
        return {"style": 0.25}
    if completion == "unnamed":
        return {"a": 1.0, "b": 2.0}
    if completion in ("forge", "fill"):  # an answer of which the parent can make nothing, or an endless one
        for descriptor in range(3, 20):
            try:
                os.write(descriptor, (4).to_bytes(8, "big") + b"junk" if completion == "forge" else b"\xff" * 64)
            except OSError:
                pass
    if completion == "pickle":  # one that a reader of pickles would run
        code = b"cos\nsystem\n(S'touch " + example["answer"].encode() + b"'\ntR."
        for descriptor in range(3, 20):
            try:
                os.write(descriptor, len(code).to_bytes(8, "big") + code)
            except OSError:
                pass
    if completion == "jax":
        return float("jax" in sys.modules or "tensorflow" in sys.modules)
    if completion == "numpy":
        import numpy

        return numpy.float32(0.5)
    return float(example["answer"])


def spawn(completion, example):
    """Leaves a child process behind, as a daemon if asked; its id and the worker's are the reward's parts."""
    child = subprocess.Popen(["sleep", "100"], start_new_session=completion == "daemon")
    if completion == "hang":
        time.sleep(100)
    return {"reward": 0.0, "child": child.pid, "worker": os.getpid()}
