"""How a step's time and peak memory grow with rows, length, vocabulary and group, beside what formulas say.

    python -m benchmarks.growth              writes GROWTH.md beside this file
    python -m benchmarks.growth --tiny       two small points a sweep, to see that it runs; writes nothing
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from benchmarks import cases
from benchmarks.measuring import ceiling, machine
from benchmarks.peers import shapes
from benchmarks.peers.protocol import Lost, Turns, Worker
from mlrl import advantages, meshes
from mlrl.costs.work import of_step
from mlrl.loops import online
from mlrl.models.transformer import parameter_count

HERE = pathlib.Path(__file__).resolve().parent
MIB = 2**20


class Point(NamedTuple):
    """A whole step of full rows, and the model."""

    rows: int = 64
    length: int = 64
    vocabulary: int = 256
    group: int = 8
    width: int = 64
    layers: int = 2
    prompt: int = 16
    micro: int = 16


SWEEPS = {
    "rows": [Point(rows=n) for n in (64, 128, 256, 512, 1024)],
    "length": [Point(rows=16, length=n) for n in (64, 128, 256, 512, 1024, 2048)],
    "vocabulary": [Point(rows=16, vocabulary=n) for n in (256, 2048, 16_384, 65_536, 152_064)],
    "group": [Point(group=n) for n in (1, 2, 4, 8, 16, 32, 64)],
}
TINY = {"rows": [Point(rows=n, length=8, group=2, width=16, layers=1, micro=4) for n in (4, 8)]}


def experiment(point: Point) -> online.Experiment:
    """The online experiment of a point; its advantage also knows groups of one."""
    model = shapes.Model(point.width, point.layers, 2, 1, point.width // 2, 3 * point.width, point.vocabulary)
    rows = shapes.Rows(point.rows // point.group, point.group, point.prompt, point.length, 0.0)
    made = cases.experiment(model, rows, "", shapes.Settings(min(point.micro, point.rows)))
    never = dataclasses.replace(made.task.vocabulary, eos_ids=(-1,))
    return dataclasses.replace(made, advantage_fn=advantages.task_relative,
                               task=dataclasses.replace(made.task, vocabulary=never))  # fmt: skip


def large_arrays(point: Point, parameters: int) -> int:
    """Bytes of what a step holds at once, by formula: the parameters four times (gradients and two moments), and the
    larger of the rollout (keys and values of all rows, and the logits of one column of them in the few copies that
    drawing makes) and of the update (a micro-batch's logits, and what its layers keep for the backward pass).
    """
    columns, micro = point.prompt + point.length, min(point.micro, point.rows)
    cache = 2 * point.layers * point.rows * columns * (point.width // 2)
    drawing = 3 * point.rows * point.vocabulary
    logits = 3 * micro * point.length * point.vocabulary
    layers = point.layers * micro * (2 * 2 * columns * columns + columns * 20 * point.width)
    return 4 * (4 * parameters + max(cache + drawing, logits + layers))


def work(point: Point, turns: Turns) -> None:
    """A point's turns, in a process of its own."""
    with meshes.use(cases.mesh_of(shapes.Settings(point.micro))()):
        parts = online.prepare(experiment(point))
        cost = of_step(parts, online.programs(parts))
        parameters = parameter_count(parts.model.config)
        turn = cases.whole_steps(parts)
        about = {"flops": cost.flops + cost.decode_flops, "bytes": large_arrays(point, parameters)}
        turns.serve(lambda number: jax.block_until_ready(turn(number)) and None, **about)


def measured(point: Point, repeats: int) -> dict:
    """Median seconds, peak memory above what the imports took, and the formulas' numbers. Raises Lost."""
    worker = Worker([sys.executable, "-m", "benchmarks.growth", "--point", *map(str, point)], folder=HERE.parent)
    try:
        about = worker.ready()
        turns = [worker.turn() for _ in range(repeats)]
    finally:
        worker.close()
    seconds = float(np.median([turn["seconds"] for turn in turns]))
    mib = max(turn["peak_mib"] for turn in turns) - about["imported_mib"]
    return {"seconds": seconds, "mib": mib, "flops": about["flops"], "bytes": about["bytes"]}


def lines_of(name: str, points: Sequence[Point], found: Sequence[dict | str]) -> list[str]:
    """A sweep as a table; times and memory also as multiples of its first point's."""
    head = f"| {name} | seconds | x | FLOPs by formula | x | GFLOP/s | peak MiB | MiB by formula |"
    lines = ["", head, "|---|---|---|---|---|---|---|---|"]
    first = next((one for one in found if isinstance(one, dict)), None)
    for point, one in zip(points, found):
        value = getattr(point, name)
        if isinstance(one, str):
            lines.append(f"| {value:,} | not measured: {one} | | | | | | |")
            continue
        seconds, flops = one["seconds"], one["flops"]
        cells = (f"{value:,}", f"{seconds:.3f}", f"{seconds / first['seconds']:.1f}", f"{flops / 1e9:,.1f} G",
                 f"{flops / first['flops']:.1f}", f"{flops / seconds / 1e9:.1f}", f"{one['mib']:,.0f}",
                 f"{one['bytes'] / MIB:,.0f}")  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def attempted(point: Point, repeats: int) -> dict | str:
    """What was measured, or why it was not."""
    try:
        return measured(point, repeats)
    except Lost as lost:
        return str(lost)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="two small points a sweep; writes nothing")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--point", type=int, nargs=len(Point._fields), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point:
        work(Point(*given.point), Turns())
        return
    on, base = machine(), Point()
    lines = [
        "# How a step grows (made by `python -m benchmarks.growth`)", "",
        f"Whole steps of d{base.width} x {base.layers}, fp32, prompts of {base.prompt} tokens, full rows, in",
        f"micro-batches of {base.micro} rows; but for what is swept, rows {base.rows} (16 for length and vocabulary),",
        f"length {base.length}, vocabulary {base.vocabulary}, group {base.group}.",
        f"Medians of {given.repeats} steps after the first, each point in a process of its own; peak memory is what",
        "that process held in these steps above its imports, the compiled programs and what was left of compiling them",
        "included. x: multiples of the sweep's first line. Matrix products are counted by `mlrl.costs`; memory by",
        "formula is that of the large arrays (`growth.large_arrays`).", "",
        f"{on['device']}, {on['processor']}, {on['cores']} cores, load {on['load_before']:.1f} before; "
        f"Python {on['python']}, jax {on['jax']}; fp32 products reach at most {ceiling() / 1e9:.0f} GFLOP/s.",
    ]  # fmt: skip
    for name, points in (TINY if given.tiny else SWEEPS).items():
        found = [attempted(point, given.repeats) for point in points]
        lines += lines_of(name, points, found)
        print("\n".join(lines_of(name, points, found)), flush=True)
    if not given.tiny:
        HERE.joinpath("GROWTH.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
