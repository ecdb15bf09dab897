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

from mlrl.costs.chips import chip_of
from mlrl.pods import ahead, topologies
from mlrl.pods.ahead import Result
from mlrl.types import Refused


def report(experiment: str, overrides: Sequence[str], topology: str, slices: int, json_file: str) -> int:
    """Compiles an experiment in another process and prints what comes of it; the exit status: 0 if everything fits.

    Args:
      experiment: its gin file.
      overrides: the command line's, as given.
      json_file: a file for the numbers; "" for none, "-" to print them in place of the text.
    """
    command = [sys.executable, "-m", "mlrl", "compile", experiment, "--topology", topology, "--slices", str(slices)]
    found = summary(topology, slices, compile_elsewhere([*command, *overrides], topology, slices))
    numbers = json.dumps({"experiment": experiment} | found, indent=2)
    print(numbers if json_file == "-" else text(found))
    if json_file not in ("", "-"):
        pathlib.Path(json_file).write_text(numbers + "\n")
    return 0 if found["fits"] else 1


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
    seconds = [r["runs"] * r["predicted_seconds"] for r in results if "predicted_seconds" in r]
    fits = bool(results) and all(r["fits"] for r in results)
    step_fits = bool(results) and all(r["fits"] for r in results if r.get("runs", 1))
    return {
        "topology": topology, "slices": slices, "chips": results[0]["chips"] if results else 0, "fits": fits,
        "unit": results[0].get("unit", "step") if results else "step",
        "predicted_seconds": sum(seconds) if step_fits else None, "programs": list(results),
    }  # fmt: skip


def text(found: Result) -> str:
    """The summary for people."""
    kind, chip = chip_of(found["topology"])
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["programs"][0]["mesh"].items() if size > 1)
    slices = f"{found['slices']} slices of " if found["slices"] > 1 else ""
    lines = [f"{slices}{found['topology']}: {found['chips']} chips of {kind}, each with {in_bytes(chip.hbm_bytes)} for "
             f"programs; mesh: {mesh}", "All numbers below are of one chip."]  # fmt: skip
    for result in found["programs"]:
        lines += ["", *_program(result)]
    if found["predicted_seconds"] is not None:
        least = in_seconds(found["predicted_seconds"])
        lines += ["", f"a {found['unit']:<10} predicted to take at least {least}, by a roofline that nothing has "
                  "measured (docs/pods.md)"]  # fmt: skip
    return "\n".join(lines)


def _program(r: Result) -> list[str]:
    """A program's lines: what it needs, does and sends."""
    if "arguments_bytes" not in r:
        missing = in_bytes(r.get("missing_bytes", 0.0))
        what = f"does not fit: needs {in_bytes(r['needed_bytes'])}, {missing} too much" if "needed_bytes" in r else (
            r["said"])  # fmt: skip
        return [f"{r['program']:<12} {what}"]
    fits = f"fits, {in_bytes(r['spare_bytes'])} to spare" if r["fits"] else (
        f"does not fit: {in_bytes(r['missing_bytes'])} too much")  # fmt: skip
    parts = {name: r[f"{name}_bytes"] for name in ("arguments", "temporaries", "output", "code", "beside")}
    sent, phases = r["sent_bytes"], r["predicted_phases"]
    kinds = ", ".join(f"{kind} {in_bytes(count)}" for kind, count in sent.items()) or "nothing"
    loops = f" ({r['unknown_loops']} loop(s) of unknown length counted once)" if r["unknown_loops"] else ""
    lines = {
        "memory": f"{fits}: " + ", ".join(f"{name} {in_bytes(size)}" for name, size in parts.items() if size),
        "products": ", ".join(f"{name} {_flops(count)}" for name, count in r["flops"].items()),
        "sends": kinds + loops,
        "predicted": f"{in_seconds(r['predicted_seconds'])}: " + "; ".join(
            f"{name} {in_seconds(t['products'])} of products, {in_seconds(t['memory'])} of memory"
            for name, t in phases.items()) + f"; links {in_seconds(r['predicted_links_seconds'])}" + (
            "" if r["predicted_network_seconds"] == 0 else f"; network {in_seconds(r['predicted_network_seconds'])}"),
        "compiled": f"in {r['compile_seconds']:.1f} s ({r['compile_cpu_seconds']:.1f} s of a core), after "
                    f"{r['trace_seconds']:.1f} s of tracing",
    }  # fmt: skip
    title, name = ([r["program"]], "") if len(r["program"]) > 12 else ([], r["program"])
    return title + [f"{'' if i else name:<12} {part:<10} {line}" for i, (part, line) in enumerate(lines.items())]


def in_bytes(count: float) -> str:
    """A size in the unit that fits, such as 3.02 MiB."""
    return _in_units(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _flops(count: float) -> str:
    return _in_units(count, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def in_seconds(seconds: float | None) -> str:
    """A time in the unit that fits, such as 16.7 us; "unknown" for None."""
    if seconds is None:
        return "unknown"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms" if seconds >= 1e-3 else (
        f"{1e6 * seconds:.3g} us")  # fmt: skip


def _in_units(count: float, step: int, units: Sequence[str]) -> str:
    for unit in units:
        if count < step or unit == units[-1]:
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"
        count /= step
    return ""
