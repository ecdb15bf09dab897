"""Times mlrl beside bare JAX, TRL and tunix, in turns: `make bench`. Writes results.json and RESULTS.md.

    python -m benchmarks.run              everything; the environments of TRL and tunix are made first, once
    python -m benchmarks.run --quick      beside bare JAX only, in a few minutes
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
import tempfile
from typing import NamedTuple

from benchmarks import weights
from benchmarks.comparing import BARE, OURS, fastest, in_turns, ratios, summarized
from benchmarks.measuring import ceiling, machine
from benchmarks.peers import environments
from benchmarks.peers.protocol import Lost, Worker
from benchmarks.peers.shapes import MODELS, ROWS
from benchmarks.table import as_markdown

HERE = pathlib.Path(__file__).resolve().parent


class Case(NamedTuple):
    """What is compared: the case of all sides, rows of `shapes.ROWS`, a model of `shapes.MODELS`, and with whom."""

    name: str
    rows: str
    model: str
    others: tuple[str, ...] = (BARE,)


ALL = (BARE, "TRL", "tunix")
NAMES = {"full": ("decode", "prefill", "scoring", "update", "step"), "tail": ("decode", "update", "step")}
CASES = tuple(Case(name, rows, model, ALL if name in ("decode", "step") else (BARE,))
              for rows, names in NAMES.items() for model in ("d128x2", "d256x4") for name in names)  # fmt: skip
QUICK = tuple(case._replace(others=(BARE,)) for case in CASES if (case.rows, case.model) != ("tail", "d256x4"))
TINY = (Case("decode", "tiny", "tiny", ALL), Case("update", "tinytail", "tiny"), Case("step", "tinytail", "tiny", ALL))
# Rows of a micro-batch: what is tried, and the fastest is taken. Ours and bare JAX's was found once, on two cores.
MICRO = {OURS: (16,), BARE: (16,), "TRL": (16, 32, 64), "tunix": (16, 64, 256)}


def command(side: str) -> list[str]:
    """What starts a side's worker, but for its arguments."""
    if side in environments.PEERS:
        return environments.command(side)
    return [sys.executable, "-m", "benchmarks.cases", side]


def start(case: Case, folder: pathlib.Path, side: str, micro_batch_rows: int) -> Worker:
    """A side's worker for a case; its weights are written when first needed."""
    at = folder / f"{case.model}-{case.rows}"
    if not at.exists():
        weights.write(at, MODELS[case.model], ROWS[case.rows])
    arguments = [case.name, case.model, case.rows, str(at), str(micro_batch_rows)]
    return Worker(command(side) + arguments, folder=HERE.parent)


def measured(case: Case, folder: pathlib.Path, repeats: int, ceiling_flops: float, missing: dict[str, str]) -> dict:
    """One comparison; sides that are lost are added to `missing`."""
    starts, micro = functools.partial(start, case, folder), {}
    count, group = ROWS[case.rows].count, ROWS[case.rows].group
    for side in (OURS, *case.others):
        if side in missing:
            continue
        fitting = [rows for rows in MICRO[side] if rows <= count and rows % group == 0] or [count]
        try:
            micro[side] = fastest(starts, side, fitting if case.name == "step" else fitting[:1])
        except Lost as lost:
            missing[f"{side}, {case.name}, {case.rows}, {case.model}"] = str(lost)
    found, lost = in_turns(starts, micro, repeats)
    missing |= {f"{side}, {case.name}, {case.rows}, {case.model}": why for side, why in lost.items()}
    sides = summarized(found, micro)
    result = {"case": case.name, "rows": case.rows, "model": case.model, "repeats": repeats, "sides": sides,
              "ratios": ratios(case.name, case.rows, case.model, sides)}  # fmt: skip
    flops = sides.get(OURS, {}).get("about", {}).get("flops")
    return result | ({"ceiling_share": flops / sides[OURS]["median_seconds"] / ceiling_flops} if flops else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="beside bare JAX only")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: whether everything runs")
    parser.add_argument("--repeats", type=int, default=0, help="rounds of each comparison; 5, or 3 with --quick")
    parser.add_argument("--out", type=pathlib.Path, default=HERE, help="where results.json and RESULTS.md go")
    given = parser.parse_args()
    cases = QUICK if given.quick else TINY if given.tiny else CASES
    missing = {}
    for peer in {other for case in cases for other in case.others} & set(environments.PEERS):
        problem = environments.make(peer)
        if problem:
            print(f"{peer}'s environment could not be made: {problem}")
            missing[peer] = f"its environment could not be made: {problem}"
    results = {"machine": machine(), "ceiling_flops": ceiling(), "cases": [], "missing": missing, "quick": given.quick}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            repeats = given.repeats or (3 if given.quick else 5)
            one = measured(case, pathlib.Path(folder), repeats, results["ceiling_flops"], missing)
            results["cases"].append(one)
            said = ", ".join(f"{ratio['ratio']:.2f} of {other}" for other, ratio in one["ratios"].items())
            print(f"{case.name}, {case.rows}, {case.model}: {said}", flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (given.out / "RESULTS.md").write_text(as_markdown(results))
    print(as_markdown(results))


if __name__ == "__main__":
    main()
