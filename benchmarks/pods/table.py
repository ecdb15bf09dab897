"""Compiles GRPO on large models for TPU slices, and writes the table of docs/pods.md. Nothing runs.

    python -m benchmarks.pods.table                     compiles what results.json has not yet, and writes the table
    python -m benchmarks.pods.table --minutes 40        the same, but begins nothing after so many minutes
    python -m benchmarks.pods.table --only "qwen3_8b v5e"   only cells whose names begin so

Each cell takes up to five minutes of a core. Every chip learns from a row at a time, or from a part of one where
`sequence` chips share a row; rollouts split each layer over `tensor` chips. A cell that the compiler was ended on, or
refused, stays in the table with what was said.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

from benchmarks.pods import libtpu
from mlrl.costs.chips import chip_of
from mlrl.pods.command import in_bytes, in_seconds

HERE = pathlib.Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results.json", HERE.parent.parent / "docs" / "pods.md"
BEGIN, END = "<!-- made by python -m benchmarks.pods.table -->", "<!-- that was it -->"
NAMES = {"qwen3_06b": "Qwen3-0.6B", "qwen3_8b": "Qwen3-8B", "qwen3_32b": "Qwen3-32B", "llama3_70b": "Llama-3-70B"}


class Cell(NamedTuple):
    """A model of gin/models on a slice; how many chips split a layer in rollouts, and a row in the update.

    prompts_each   prompts of a step, 8 rows each, for each chip
    """

    model: str
    topology: str
    chips: int
    tensor: int
    prompts_each: float = 2
    sequence: int = 1

    @property
    def prompts(self) -> int:
        return int(self.prompts_each * self.chips)

    @property
    def gin(self) -> str:
        """The experiment, beside the model."""
        lines = [f"PROMPTS = {self.prompts}", f"MICRO_BATCH = {self.chips // self.sequence}",
                 f"ROLLOUT_TENSOR = {self.tensor}"]  # fmt: skip
        if self.sequence == 1:
            return "\n".join(["include 'benchmarks/pods/grpo.gin'", *lines])
        return "\n".join(["include 'benchmarks/pods/long.gin'", *lines, f"SEQUENCE = {self.sequence}"])

    @property
    def tokens(self) -> int:
        """Of a row."""
        return 2048 if self.sequence == 1 else 32768

    def __str__(self) -> str:
        return f"{self.model} {self.topology}" + (f" {self.tokens}" if self.sequence > 1 else "")


CELLS = (
    Cell("qwen3_06b", "v5e:2x2", 4, 1), Cell("qwen3_8b", "v5e:4x4", 16, 8), Cell("qwen3_06b", "v6e:2x2", 4, 1),
    Cell("qwen3_8b", "v6e:4x4", 16, 8), Cell("qwen3_8b", "v5e:8x8", 64, 8), Cell("qwen3_32b", "v6e:8x8", 64, 8),
    Cell("qwen3_32b", "v5e:8x16", 128, 8, 1), Cell("llama3_70b", "v6e:16x16", 256, 8, 1),
    Cell("qwen3_06b", "v5p:2x2x1", 4, 1), Cell("qwen3_8b", "v5p:2x2x4", 16, 4), Cell("qwen3_32b", "v5p:4x4x4", 64, 8),
    Cell("llama3_70b", "v5p:4x4x8", 128, 8), Cell("qwen3_06b", "v5e:4x4", 16, 1),
    Cell("qwen3_8b", "v6e:16x16", 256, 8), Cell("llama3_70b", "v5p:8x8x16", 1024, 8),
    Cell("qwen3_06b", "v5e:4x4", 16, 8, 1 / 4, 4), Cell("qwen3_8b", "v5p:2x2x4", 16, 8, 1, 4),
    Cell("qwen3_8b", "v6e:8x8", 64, 8, 1 / 4, 8),
)  # fmt: skip


def compiled(cell: Cell, seconds: float) -> dict[str, Any]:
    """What `mlrl compile` says of a cell."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "cell.gin")
        path.write_text(
            "from __gin__ import dynamic_registration\n"
            f"include 'gin/models/{cell.model}.gin'\n{cell.gin}\n"
        )
        command = [sys.executable, "-m", "mlrl", "compile", str(path), "--topology", cell.topology, "--json", "-"]
        try:
            done = subprocess.run(command, env=libtpu.environment(), capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"said": f"not compiled within {seconds / 60:.0f} minutes"}
    if done.returncode not in (0, 1):
        return {"said": done.stderr.strip().splitlines()[-1]}
    return {name: value for name, value in json.loads(done.stdout).items() if name != "experiment"}


def row(cell: Cell, found: dict[str, Any]) -> str:
    """A line of the table."""
    split = f"fsdp {cell.chips // cell.sequence}" + (f", sequence {cell.sequence}" if cell.sequence > 1 else "")
    shown = [NAMES[cell.model], cell.topology, str(cell.chips), f"{split} / tensor {cell.tensor}"]
    shown.append(f"{8 * cell.prompts:,} x {cell.tokens:,}")
    if "programs" not in found:
        return "| " + " | ".join([*shown, found["said"], "", "", "", ""]) + " |"
    programs = {one["program"]: one for one in found["programs"]}
    room = chip_of(cell.topology)[1].hbm_bytes

    def memory(one: dict[str, Any]) -> str:
        if "spare_bytes" in one:
            return f"{in_bytes(room - one['spare_bytes'])}{'' if one['fits'] else ' (too much)'}"
        return f"{in_bytes(one['needed_bytes'])} (too much)" if "needed_bytes" in one else one["said"]

    sent = [in_bytes(sum(one["sent_bytes"].values())) if "sent_bytes" in one else "" for one in programs.values()]
    seconds = [in_seconds(one.get("predicted_seconds")) for one in programs.values()]
    return "| " + " | ".join([*shown, in_bytes(room), *map(memory, programs.values()), " / ".join(sent),
                              " / ".join(seconds)]) + " |"  # fmt: skip


def write(results: dict[str, Any]) -> None:
    """Puts the table of what is known between its marks in docs/pods.md."""
    lines = ["| model | slice | chips | mesh of update / rollout | rows x tokens | a chip's memory | rollout | update "
             "| sent by a chip, rollout / update | predicted, at least, rollout / update |",
             "|" + "---|" * 10]  # fmt: skip
    lines += [row(cell, results[str(cell)]) for cell in CELLS if str(cell) in results]
    left = [str(cell) for cell in CELLS if str(cell) not in results]
    lines += ["", f"Not compiled yet: {', '.join(left)}."] if left else []
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + "\n".join([BEGIN, "", *lines, "", END]) + rest.partition(END)[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing after so many")
    parser.add_argument("--cell_minutes", type=float, default=20.0, help="give a cell up after so many")
    parser.add_argument("--only", default="", help="only cells whose names begin so")
    arguments, start = parser.parse_args(), time.monotonic()
    problem = libtpu.install()
    if problem:
        sys.exit(problem)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for cell in CELLS:
        late = time.monotonic() - start > 60 * arguments.minutes
        if str(cell) in results or not str(cell).startswith(arguments.only) or late:
            continue
        results[str(cell)] = compiled(cell, 60 * arguments.cell_minutes)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(row(cell, results[str(cell)]), flush=True)
        write(results)
    write(results)


if __name__ == "__main__":
    main()
