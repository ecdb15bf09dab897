"""`mlrl compile`: programs are compiled in a process of their own, since the compiler may end it; then the report."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from mlrl.pods import ahead, topologies
from mlrl.pods.ahead import Result
from mlrl.pods.chips import CHIPS, chip_of
from mlrl.types import Refused

_GIB = 2**30


def compile_elsewhere(command: Sequence[str], topology: str, slices: int) -> list[Result]:
    """Results of all programs, from processes that run `command --results FILE`; see ahead.compile_all.

    A program whose compilation ends its process gets a result that names the signal, and the others are still tried.
    """
    topologies.require_name(topology, slices)
    chip_of(topology)
    topologies.require_libtpu()
    environment = os.environ | topologies.ENVIRONMENT
    with tempfile.TemporaryDirectory() as folder:
        file, ended, seen = pathlib.Path(folder, "results.jsonl"), {}, -1
        while True:
            done = subprocess.run([*command, "--results", str(file)], env=environment, capture_output=True, text=True)
            found = ahead.read(file)
            if done.returncode >= 0 or len(found) == seen:
                break
            seen = len(found)
            if found:
                ended[found[-1]["program"]] = signal.Signals(-done.returncode).name
        if done.returncode and not (found and done.returncode < 0):
            raise Refused(_last_line(done))
    for result in found:
        if "fits" not in result:
            name = ended.get(result["program"], "an error")
            result |= {"fits": False, "said": f"the compiler was ended by {name}: no result"}
    return found


def _last_line(done: subprocess.CompletedProcess) -> str:
    """What the process said last, as the command line would say it."""
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
    ours = [line.removeprefix("mlrl: ") for line in lines if line.startswith("mlrl: ")]
    if ours:
        return ours[-1]
    how = f"was ended by {signal.Signals(-done.returncode).name}" if done.returncode < 0 else f"gave {done.returncode}"
    return f"the process that compiles {how}: {lines[-1]}"


def summary(topology: str, slices: int, results: Sequence[Result]) -> Result:
    """All results and what follows of them: whether everything fits, and the predicted seconds of a step or round."""
    seconds = [r["runs"] * r["predicted_seconds"] for r in results if r["fits"]]
    fits = bool(results) and all(r["fits"] for r in results)
    return {
        "topology": topology, "slices": slices, "chips": results[0]["chips"] if results else 0, "fits": fits,
        "unit": "round" if any(r["program"] == "annotate" for r in results) else "step",
        "predicted_seconds": sum(seconds) if fits else None, "programs": list(results),
    }  # fmt: skip


def text(found: Result) -> str:
    """The summary for people."""
    kind, chip = chip_of(found["topology"])
    first = found["programs"][0]
    mesh = ", ".join(f"{axis} {size}" for axis, size in first["mesh"].items())
    slices = f"{found['slices']} slices of " if found["slices"] > 1 else ""
    lines = [f"{slices}{found['topology']}: {found['chips']} chips of {kind}, {chip.hbm_bytes / _GIB:.2f} GiB of memory "
             f"each; mesh: {mesh}", "All numbers are of one chip."]  # fmt: skip
    for result in found["programs"]:
        lines += ["", *_program(result)]
    if found["predicted_seconds"] is not None:
        lines += ["", f"predicted    {_seconds(found['predicted_seconds'])} a {found['unit']}, by a roofline: a lower "
                  "bound that nothing has measured (docs/pods.md)"]  # fmt: skip
    return "\n".join(lines)


def _program(r: Result) -> list[str]:
    """A program's lines."""
    if not r["fits"]:
        missing = r.get("missing_bytes", 0.0)
        what = (f"does not fit: needs {_gib(r['needed_bytes'])}, {_gib(missing)} too much" if missing else r["said"])
        return [f"{r['program']:<12} {what}"]
    flops, sent = r["flops"], r["sent_bytes"]
    phases = ", ".join(f"{name} {count / 1e12:,.3g}" for name, count in flops.items())
    kinds = ", ".join(f"{kind} {_gib(count)}" for kind, count in sent.items())
    loops = f"; {r['unknown_loops']} loop(s) of unknown length counted once" if r["unknown_loops"] else ""
    times = "; ".join(f"{name}: products {_seconds(t['products'])}, memory {_seconds(t['memory'])}"
                      for name, t in r["predicted_phases"].items())  # fmt: skip
    return [
        f"{r['program']:<12} fits, with {_gib(r['spare_bytes'])} to spare: arguments {_gib(r['arguments_bytes'])}, "
        f"temporaries {_gib(r['temporaries_bytes'])}, output {_gib(r['output_bytes'])}, program {_gib(r['code_bytes'])}",
        f"{'':<12} TFLOPs by formula: {phases}",
        f"{'':<12} sends {_gib(sum(sent.values()))}{': ' if kinds else ''}{kinds}{loops}",
        f"{'':<12} predicted {_seconds(r['predicted_seconds'])} ({times}; links {_seconds(r['predicted_links_seconds'])})",
        f"{'':<12} compiled in {r['compile_seconds']:.1f} s, after {r['trace_seconds']:.1f} s of tracing",
    ]  # fmt: skip


def _gib(count: float) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB / 100 else f"{count / 2**20:.2f} MiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 or seconds == 0 else f"{1000 * seconds:.3g} ms"
