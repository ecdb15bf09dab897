"""Where a run's time goes: what was compiled and why, traces of a few steps, and shares of what devices can do."""

from __future__ import annotations

import contextlib
import json
import logging
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from mlrl.costs.devices import Peak, peak_of
from mlrl.costs.work import Cost
from mlrl.types import Refused

_log = logging.getLogger("mlrl")
# Where JAX says why it traces something anew, and then also what it writes to its compilation cache.
_LOUD = ("jax._src.interpreters.partial_eval", "jax._src.compilation_cache", "jax._src.compiler")
_SAID = ("TRACING CACHE MISS", "Writing jit_", "Not writing", "PERSISTENT COMPILATION CACHE MISS")
_SLOW_SECONDS = 0.1
_open: list[CompileLog] = []


class CompileLog:
    """compilations.jsonl: a line for each program that took 0.1 s or longer, and for every one after the first step.

    {"step", "program", "seconds", "why"}: the steps that were done, the function's name, seconds of compiling it or of
    reading it from the compilation cache, and, after the first step, what JAX says differs from when it was last
    traced: a shape, mostly.
    """

    def __init__(self, path: pathlib.Path):
        self._path, self._why = path, ""
        self.step, self._settled = 0, False  # steps done; whether one of them was done by this process

    def compiled(self, program: str, seconds: float) -> None:
        """Notes a program that was compiled, with the last reason heard."""
        why, self._why = self._why, ""
        if seconds < _SLOW_SECONDS and not self._settled:
            return
        name = re.sub(r"^jit\((.*)\)$", r"\1", program)
        line = {"step": self.step, "program": name, "seconds": round(seconds, 3), "why": why}
        with contextlib.suppress(OSError), self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def after(self, step: int) -> None:
        """Notes that a step is done, after which nothing should be compiled any more.

        From then on JAX explains what is: in the first step, explaining took a quarter of the time of a short run.
        """
        self.step = step
        if not self._settled:
            self._settled = True
            jax.config.update("jax_explain_cache_misses", True)

    def heard(self, said: str) -> None:
        """Notes why something is traced, in JAX's words."""
        _, _, differs = said.partition("For the closest previous key:")
        self._why = " ".join(differs.split()) or ("not seen before" if "never seen" in said else "")

    @contextlib.contextmanager
    def opened(self) -> Iterator[CompileLog]:
        """Listens meanwhile."""
        explained = jax.config.jax_explain_cache_misses
        _open.append(self)
        try:
            yield self
        finally:
            _open.remove(self)
            jax.config.update("jax_explain_cache_misses", explained)


def _on_event(event: str, seconds: float, **about: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        for log in _open:
            log.compiled(str(about.get("fun_name", "?")), seconds)


def _on_record(record: logging.LogRecord) -> bool:
    """Takes JAX's explanations, so that they are not printed as warnings."""
    said = record.getMessage()
    if not _open or not said.startswith(_SAID):
        return True
    if said.startswith(_SAID[0]):
        for log in _open:
            log.heard(said)
    return False


jax.monitoring.register_event_duration_secs_listener(_on_event)
for _name in _LOUD:
    logging.getLogger(_name).addFilter(_on_record)


class Steps(NamedTuple):
    """The steps that are traced, counted from 1; (0, 0): none."""

    first: int = 0
    last: int = 0

    @classmethod
    def parse(cls, text: str) -> Steps:
        """"20:22", or "20" for one step. Raises Refused."""
        found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
        steps = cls(int(found[1]), int(found[2] or found[1])) if found else cls()
        if not 1 <= steps.first <= steps.last:
            raise Refused(f"--profile_steps is {text!r}: give the first and the last step, as 20:22")
        return steps


class Trace:
    """A trace of some steps in a folder, for TensorBoard's profile plugin, xprof or Perfetto."""

    def __init__(self, folder: pathlib.Path, steps: Steps):
        self._folder, self._steps, self._running = folder, steps, False

    def after(self, step: int) -> None:
        """Begins or ends the trace, after so many steps."""
        if self._running and step >= self._steps.last:
            self.close()
        elif self._steps.last > step >= self._steps.first - 1 and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def close(self) -> None:
        """Ends a trace that is under way, and says where it is."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            _log.warning("steps %d to %d are traced in %s: open it with xprof or TensorBoard", *self._steps,
                         self._folder)  # fmt: skip


def shares(cost: Cost | None, line: dict[str, float], seconds: float, peak: Peak | None) -> dict[str, float]:
    """FLOP/s of a step by formula, and their share of what the devices can do (MFU); {} where the cost is not known.

    Decoding counts up to the longest row, where that is the number of turns it can take.
    """
    if cost is None:
        return {}
    rate = (cost.flops + cost.decode_flops * _decoded(cost, line)) / seconds
    return {"flops_per_second": rate} | ({"mfu": rate / (peak.flops * cost.devices)} if peak else {})


def bandwidth(cost: Cost | None, line: dict[str, float], peak: Peak | None) -> dict[str, float]:
    """Bytes/s of weights and caches that decoding reads by formula, and their share of what the devices' memory can do;
    {} where the cost is not known or the rollout was not timed in this step.

    The time is that of the whole rollout, prompts included, so that decoding itself reads no slower than this.
    """
    seconds = line.get("seconds/rollout", 0.0)
    if cost is None or not cost.decode_bytes or not seconds:
        return {}
    rate = cost.decode_bytes * _decoded(cost, line) / seconds
    share = {"bandwidth_share": rate / (peak.bandwidth * cost.rollout_devices)} if peak else {}
    return {"decode_bytes_per_second": rate} | share


def _decoded(cost: Cost, line: dict[str, float]) -> float:
    """The share of decoding's turns that a step took: up to its longest row."""
    longest = line.get("length/max", 0.0)
    return min(1.0, longest / (cost.decode_turns + 1)) if longest else 1.0


def peak() -> Peak | None:
    """The peak of this process's devices, if it is known."""
    return peak_of(jax.devices()[0].device_kind)
