"""A sandbox for Python programs that a model wrote: `run` for one, `Pool` for many within a step's time.

    from mlrl import sandbox
    sandbox.run("def f(x):\n    return x + 1", ("f(1)", "f('a')"))
    # Result(status="raised", answers=(Answer("ok", 2, ""), Answer("raised", None, "TypeError: ...")), ...)

A program runs in a process of its own behind what the kernel offers without a daemon or a binary to install; see
docs/sandbox.md for what that protects from and what it does not. Files:

    results.py  what the caller sees: jobs, limits, results;  pool.py  servers that are kept warm
    server.py   a bare interpreter that forks once per program, watches the clock and kills
    walls.py    namespaces, Landlock, dropped privileges and resource limits; seccomp.py the filter of system calls
    inside.py   what runs in the program's process; guard.py what its Python is refused
    values.py   values as text that can be read without trusting who wrote it

Nothing here imports JAX, and the server imports nothing but the standard library.
"""

import importlib

_HOMES = {"Answer": "results", "Job": "results", "Limits": "results", "Result": "results", "STATUSES": "results",
          "Pool": "pool", "run": "pool"}  # fmt: skip


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'mlrl.sandbox' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mlrl.sandbox.{_HOMES[name]}"), name)


def __dir__():
    return sorted(_HOMES)
