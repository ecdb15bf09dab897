"""The server: a bare interpreter that forks once for every program, watches the clock, and ends what is left.

Started by `pool.py` as `python -P -s -S` with an environment of one variable, PYTHONHASHSEED=0, so that sets of text
have one order in every run. A message is 8 bytes of length and JSON. The server never reads what a program wrote.
"""

import base64
import contextlib
import gc
import json
import os
import select
import shutil
import signal
import sys
import time

from . import guard, inside, walls

_REQUESTS, _ANSWERS = 0, 1


def main(folder, scratch_root, without):
    """Serves jobs until the parent closes the pipe."""
    guard.preload()
    server = walls.Server(folder, without)
    nothing = os.open(os.devnull, os.O_RDWR)
    server.enter()
    own_files = "namespaces" in server.standing
    scratch = "" if own_files or "landlock" not in server.standing else os.path.join(scratch_root, "box")
    gc.collect()
    gc.freeze()  # a child's collections do not copy the pages of what was imported
    _send({"standing": sorted(server.standing), "missing": server.missing})
    while True:
        job = _receive()
        if scratch:
            os.mkdir(scratch, 0o700)
            if server.root:
                with contextlib.suppress(OSError):
                    os.chown(scratch, walls.NOBODY, walls.NOBODY)
        try:
            _send(_serve(server, job, nothing, scratch))
        finally:
            if scratch:
                shutil.rmtree(scratch)


def _serve(server, job, nothing, scratch):
    """One program, from fork to the end of its last descendant."""
    started = time.monotonic()
    (output, output_end), (channel, channel_end) = os.pipe(), os.pipe()
    child = server.fork()
    if child == 0:
        try:
            _become_program(server, job, nothing, output_end, channel_end, scratch)
        finally:
            os._exit(1)
    os.close(output_end)
    os.close(channel_end)
    try:
        why, said = _watch(started + job["limits"]["seconds"], output, channel, job["limits"]["output_bytes"])
    finally:
        for descriptor in (output, channel):
            os.close(descriptor)
        end, cpu_seconds = _end(child)
    return {"why": why, "end": end, "cpu_seconds": cpu_seconds, "seconds": time.monotonic() - started,
            **{name: base64.b64encode(data).decode() for name, data in said.items()}}  # fmt: skip


def _become_program(server, job, nothing, output_end, channel_end, scratch):
    os.setsid()
    for descriptor, number in ((nothing, 10), (output_end, 11), (channel_end, 12)):
        os.dup2(descriptor, number)
    for descriptor, number in ((10, 0), (11, 1), (11, 2), (12, inside.CHANNEL)):
        os.dup2(descriptor, number)
    os.closerange(inside.CHANNEL + 1, os.sysconf("SC_OPEN_MAX") if sys.platform != "linux" else 1024)
    server.around_program(job["limits"], scratch)
    inside.perform(job, language_only=not server.standing & {"namespaces", "seccomp"})


def _watch(deadline, output, channel, most):
    """Reads both pipes until the channel closes; returns why it stopped, and what came."""
    said = {"output": bytearray(), "channel": bytearray()}
    names = {output: "output", channel: "channel"}
    poll = select.poll()
    for descriptor in (output, channel, _REQUESTS):
        poll.register(descriptor, select.POLLIN)
    while names:
        left = deadline - time.monotonic()
        if left <= 0:
            return "timeout", said
        for descriptor, event in poll.poll(left * 1000.0 + 1.0):
            if descriptor == _REQUESTS:
                if event & select.POLLIN:
                    poll.unregister(descriptor)  # the next job is waiting; it is not the end of the parent
                    continue
                raise EOFError  # the parent is gone: `_end` is called, and the server ends
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                poll.unregister(descriptor)
                del names[descriptor]
                continue
            said[names[descriptor]] += piece
            if len(said[names[descriptor]]) > most:
                del said[names[descriptor]][most:]
                return "output", said
    return "", said


def _end(child):
    """Kills the program's process group and whatever left it; returns how the program ended, and its processor time."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    end = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
    # Daemons: their parent has died, so they are this process's children now (PR_SET_CHILD_SUBREAPER, or process 1).
    while True:
        with contextlib.suppress(OSError):
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                for orphan in map(int, file.read().split()):
                    os.kill(orphan, signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.001)
        except ChildProcessError:
            return end


def _read_exactly(size):
    data = b""
    while len(data) < size:
        piece = os.read(_REQUESTS, size - len(data))
        if not piece:
            os._exit(0)
        data += piece
    return data


def _receive():
    return json.loads(_read_exactly(int.from_bytes(_read_exactly(8), "big")))


def _send(message):
    data = json.dumps(message).encode()
    view = memoryview(len(data).to_bytes(8, "big") + data)
    while view:
        view = view[os.write(_ANSWERS, view):]
