"""Times mlrl beside bare JAX, TRL and tunix, in turns: `make bench`. Writes results.json and RESULTS.md.

    python -m benchmarks.run              everything; the environments of TRL and tunix are made first, once
    python -m benchmarks.run --quick      the smaller model beside bare JAX, in under 5 minutes; to benchmarks/quick
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import weights
from benchmarks.comparing import BARE, OURS, Start, fastest, in_turns, ratios, summarized
from benchmarks.measuring import ceiling, machine
from benchmarks.peers import environments
from benchmarks.peers.protocol import Lost, Worker
from benchmarks.peers.shapes import MODELS, ROWS, Settings
from benchmarks.table import as_markdown

HERE = pathlib.Path(__file__).resolve().parent


class Case(NamedTuple):
    """What is compared: the case of all sides, rows of `shapes.ROWS`, a model of `shapes.MODELS`, and with whom."""

    name: str
    rows: str
    model: str
    others: tuple[str, ...] = (BARE,)


ALL = (BARE, "TRL", "tunix")
# The step comes first: the settings with which it is fastest are then those of the other cases.
NAMES = {"full": ("step", "update", "scoring", "prefill", "decode"), "tail": ("step", "update", "decode")}
CASES = tuple(Case(name, rows, model, ALL) for rows, names in NAMES.items() for model in ("d128x2", "d256x4")
              for name in names)  # fmt: skip
QUICK = tuple(case._replace(others=(BARE,)) for case in CASES
              if case.model == "d128x2" and (case.rows == "full" or case.name == "step"))  # fmt: skip
TINY = (*(Case(name, "tiny", "tiny", ALL) for name in NAMES["full"]), Case("step", "tinytail", "tiny", ALL))
# What is tried, and the fastest is taken; the first where nothing is tried. In torch, a device is all cores.
TRIED = {
    OURS: (Settings(16), Settings(8, 2), Settings(16, 2), Settings(32, 2), Settings(64, 2)),
    BARE: (Settings(16), Settings(16, 2)),
    "TRL": (Settings(16), Settings(32), Settings(64)),
    "tunix": (Settings(16), Settings(64), Settings(64, 2)),
}


def command(side: str) -> list[str]:
    """What starts a side's worker, but for its arguments."""
    if side in environments.PEERS:
        return environments.command(side)
    return [sys.executable, "-m", "benchmarks.cases", side]


def start(case: Case, folder: pathlib.Path, side: str, settings: Settings) -> Worker:
    """A side's worker for a case; its weights are written when first needed."""
    at = folder / f"{case.model}-{case.rows}"
    if not at.exists():
        weights.write(at, MODELS[case.model], ROWS[case.rows])
    arguments = [case.name, case.model, case.rows, str(at), *map(str, settings)]
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={settings.devices}"} if settings.devices > 1 else {}
    return Worker(command(side) + arguments, folder=HERE.parent, **flags)


def settings_of(case: Case, starts: Start, chosen: dict[tuple, Settings], search: bool,
                missing: dict[str, str]) -> dict:  # fmt: skip
    """The settings of each side; those of a step are searched for, if asked, and put into `chosen`."""
    count, group, found = ROWS[case.rows].count, ROWS[case.rows].group, {}
    for side in (OURS, *case.others):
        if side in missing:
            continue
        fitting = [one for one in TRIED[side] if one.micro_batch_rows <= count and one.micro_batch_rows % group == 0]
        fitting = fitting or [Settings(count)]
        known = chosen.get((side, case.rows, case.model), fitting[0])
        try:
            found[side] = fastest(starts, side, fitting) if search and case.name == "step" else known
        except Lost as lost:
            missing[f"{side}, {case.name}, {case.rows}, {case.model}"] = str(lost)
        else:
            chosen[side, case.rows, case.model] = found[side]
    return found


def measured(case: Case, folder: pathlib.Path, repeats: int, ceiling_flops: float, missing: dict[str, str],
             chosen: dict[tuple, Settings], search: bool) -> dict:  # fmt: skip
    """One comparison; sides that are lost are added to `missing`."""
    starts = functools.partial(start, case, folder)
    settings = settings_of(case, starts, chosen, search, missing)
    found, lost = in_turns(starts, settings, repeats)
    missing |= {f"{side}, {case.name}, {case.rows}, {case.model}": why for side, why in lost.items()}
    sides = summarized(found, settings)
    result = {"case": case.name, "rows": case.rows, "model": case.model, "repeats": repeats, "sides": sides,
              "ratios": ratios(case.name, case.rows, case.model, sides)}  # fmt: skip
    flops = sides.get(OURS, {}).get("about", {}).get("flops")
    return result | ({"ceiling_share": flops / sides[OURS]["median_seconds"] / ceiling_flops} if flops else {})


def naming(case: Mapping[str, Any]) -> list[str]:
    """Of a measured case: what a `Case` is named by."""
    return [case["case"], case["rows"], case["model"]]


def measured_before(out: pathlib.Path, again: Sequence[str]) -> list[dict]:
    """The cases of out/results.json that are not measured again."""
    path = out / "results.json"
    found = json.loads(path.read_text())["cases"] if path.exists() else []
    return [case for case in found if ",".join(naming(case)) not in again]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="beside bare JAX only")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: whether everything runs")
    parser.add_argument("--repeats", type=int, default=0, help="rounds of each comparison; 5, or 3 with --quick")
    parser.add_argument("--out", type=pathlib.Path, help="where results.json and RESULTS.md go")
    parser.add_argument("--only", nargs="+", help="these comparisons, as step,tail,d128x2; others stay")
    given = parser.parse_args()
    out = given.out or (HERE / "quick" if given.quick else HERE)
    every = QUICK if given.quick else TINY if given.tiny else CASES
    cases = [case for case in every if not given.only or ",".join(case[:3]) in given.only]
    kept = measured_before(out, given.only) if given.only else []
    chosen = {(side, case["rows"], case["model"]): Settings(**one["settings"])
              for case in kept if case["case"] == "step" for side, one in case["sides"].items()}  # fmt: skip
    missing = {}
    for peer in {other for case in cases for other in case.others} & set(environments.PEERS):
        problem = environments.make(peer)
        if problem:
            print(f"{peer}'s environment could not be made: {problem}")
            missing[peer] = f"its environment could not be made: {problem}"
    results = {"machine": machine(), "ceiling_flops": ceiling(), "cases": kept, "missing": missing,
               "quick": given.quick}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            repeats = given.repeats or (3 if given.quick else 5)
            one = measured(case, pathlib.Path(folder), repeats, results["ceiling_flops"], missing, chosen,
                           search=not given.quick)  # fmt: skip
            order = [list(each[:3]) for each in (*TINY, *CASES)]
            results["cases"] = sorted([*results["cases"], one], key=lambda each: order.index(naming(each)))
            said = ", ".join(f"{ratio['ratio']:.2f} of {other}" for other, ratio in one["ratios"].items())
            print(f"{case.name}, {case.rows}, {case.model}: {said}", flush=True)
            done = [naming(each) for each in results["cases"]]
            results["unmeasured"] = [", ".join(each[:3]) for each in every if list(each[:3]) not in done]
            out.mkdir(parents=True, exist_ok=True)  # written after each, so that what was measured is kept
            (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            (out / "RESULTS.md").write_text(as_markdown(results))
    print(as_markdown(results))


if __name__ == "__main__":
    main()
