"""Functions made fit to travel to a process that has no configuration.

A function named in a Gin file arrives as a wrapper that looks its knobs up in this process's configuration at
every call. Such a wrapper cannot be pickled, and a worker process would have no configuration to look into.
Nothing here knows Gin: any `functools.wraps` wrapper that only adds keyword arguments is treated alike.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import cloudpickle

from mlrl.types import Refused


def explicit(f: Callable[..., Any]) -> Callable[..., Any]:
    """f itself if it can be pickled; otherwise the importable function that f wraps, with f's knobs bound.

    The wrapper is called once, here, while the function inside only reports what it is given, so that the
    configuration counts the knobs as used. Functions inside a functools.partial are treated alike.

    Args:
      f: a function.
    Returns:
      A function that means the same in another process.
    Raises:
      Refused: f cannot be pickled, and does not wrap a plain importable function.
    """
    failure = _why_not_picklable(f)
    if failure is None:
        return f
    if isinstance(f, functools.partial):
        knobs = {name: explicit(value) if callable(value) else value for name, value in f.keywords.items()}
        bound = functools.partial(explicit(f.func), *f.args, **knobs)
        bound.__dict__.update(f.__dict__)  # the name an adapter gave it
        return bound
    inner = f
    while hasattr(inner, "__wrapped__") and not _importable(inner):
        inner = inner.__wrapped__
    code = getattr(inner, "__code__", None)
    if inner is f or code is None or code.co_freevars or not _importable(inner):
        raise _cannot_be_sent(failure) from failure
    inner.__code__ = _report.__code__
    try:
        arguments, knobs = f()
    except Exception as error:  # a wrapper that does more than add keyword arguments
        raise _cannot_be_sent(error) from failure
    finally:
        inner.__code__ = code
    knobs = {name: explicit(value) if callable(value) else value for name, value in knobs.items()}
    return functools.partial(inner, *arguments, **knobs)


def _cannot_be_sent(error: Exception) -> Refused:
    return Refused(f"it cannot be sent to a worker process: {type(error).__name__}: {error}")


def _report(*arguments, **knobs):
    return arguments, knobs


def _why_not_picklable(f: Any) -> Exception | None:
    try:
        cloudpickle.dumps(f)
    except Exception as error:
        return error
    return None


def _importable(f: Any) -> bool:
    """Whether a worker process would find this very object under its module and name."""
    found: Any = sys.modules.get(getattr(f, "__module__", None) or "")
    for name in getattr(f, "__qualname__", "").split("."):
        found = getattr(found, name, None)
    return found is not None and found is f
