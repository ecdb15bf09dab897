"""Compiling an experiment's own programs for chips that are not there; each result is a dict that JSON can hold."""

from __future__ import annotations

import json
import math
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mlrl import meshes
from mlrl.loops.states import Program
from mlrl.pods import work
from mlrl.pods.chips import Chip, chip_of
from mlrl.pods.collectives import traffic
from mlrl.pods.roofline import Held, predicted
from mlrl.types import Refused

Result = dict[str, Any]


def compile_all(loop: Any, parts: Any, topology: str, slices: int, results: pathlib.Path) -> None:
    """Compiles the programs of a prepared experiment, and adds a line of JSON to the file `results` for each.

    Programs of which the file has a line already are left out: so one that ends the process is not tried again.

    Args:
      loop: the module of the experiment's loop, with `programs`.
      parts: what its `prepare` made, within meshes.of_devices.
      results: each program's name is written before it is compiled, and its result after.
    Raises: Refused, if the experiment's mesh leaves out devices of the topology.
    """
    kind, chip = chip_of(topology)
    mesh = parts.experiment.mesh()
    devices = len(meshes.present())
    if mesh.size != devices:
        raise Refused(f"the experiment's mesh has {mesh.size} of the {devices} devices of {slices} x {topology}: give "
                      "it all of them (meshes.data_mesh.devices = 0), or name a smaller topology")  # fmt: skip
    programs = loop.programs(parts)
    phases, runs = work.phases(parts, programs), work.runs(parts, programs)
    done = {line["program"] for line in read(results)}
    with results.open("a") as file:
        for name, program in programs.items():
            if name in done:
                continue
            about = {"program": name, "runs": runs[name], "kind": kind, "chips": devices // chip.devices,
                     "mesh": {axis: size for axis, size in mesh.shape.items()}}  # fmt: skip
            print(json.dumps(about), file=file, flush=True)
            result = compiled(program, phases[name], mesh, chip, devices // chip.devices)
            print(json.dumps(about | result), file=file, flush=True)


def read(results: pathlib.Path) -> list[Result]:
    """The lines of a file of results, the last one of each program."""
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    return list({line["program"]: line for line in lines}.values())


def compiled(program: Program, phases: work.Phases, mesh: jax.sharding.Mesh, chip: Chip, chips: int) -> Result:
    """Compiles one program; what it needs per chip, or what the compiler refused it for. Bytes and seconds."""
    arguments = placed(program.arguments, mesh)
    start = time.perf_counter()
    with meshes.use(mesh):
        lowered = program.function.lower(*arguments)
    lowered_at = time.perf_counter()
    jax.config.update("jax_enable_compilation_cache", False)  # what is found there took no time to compile
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return {"fits": False, **refusal(str(error), chip)}
    seconds = time.perf_counter() - lowered_at
    sent = traffic(executable.as_text())
    sent = sent._replace(sent={kind: chip.devices * count for kind, count in sent.sent.items()})
    held = held_by(arguments, chip)
    time_ = predicted(phases, sent, held, chip, chips)
    return {
        "fits": True, **memory(executable.memory_analysis(), chip),
        "flops": {name: one.flops / chips for name, one in phases.items()},
        "sent_bytes": sent.sent, "loops": list(sent.loops), "unknown_loops": sent.unknown_loops,
        "weights_bytes": held.weights, "state_bytes": held.state,
        "trace_seconds": lowered_at - start, "compile_seconds": seconds,
        "predicted_seconds": time_.seconds, "predicted_serial_seconds": _known(time_.serial),
        "predicted_phases": {name: {"products": products, "memory": memory_}
                             for name, products, memory_ in time_.phases},
        "predicted_links_seconds": time_.links, "predicted_network_seconds": _known(time_.network),
    }  # fmt: skip


def placed(arguments: Sequence[Any], mesh: jax.sharding.Mesh) -> tuple[Any, ...]:
    """Shapes and dtypes of a program's arguments with the shardings that the loops give them: the state, then rows."""
    state, *rows = arguments
    whole, split = meshes.replicated(mesh), meshes.rows(mesh)
    shards = dict(mesh.shape).get("data", 1)

    def place(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def row(x: Any) -> Any:
        if not hasattr(x, "shape"):
            return x
        return place(x, split if x.ndim and x.shape[0] % shards == 0 else whole)

    return jax.tree.map(lambda x: place(x, whole), state), *jax.tree.map(row, rows)


def memory(stats: Any, chip: Chip) -> Result:
    """The compiler's bytes of one device, as bytes of a chip. Outputs that reuse the memory of arguments are not counted."""
    found = {
        "arguments_bytes": stats.argument_size_in_bytes, "temporaries_bytes": stats.temp_size_in_bytes,
        "output_bytes": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "code_bytes": stats.generated_code_size_in_bytes,
    }  # fmt: skip
    found = {name: chip.devices * count for name, count in found.items()}
    return found | {"spare_bytes": chip.hbm_bytes - sum(found.values())}


def held_by(arguments: Sequence[Any], chip: Chip) -> Held:
    """What a chip holds of the state, and what of the weights it multiplies with: its part over the tensor and expert
    axes, gathered over all others.
    """
    state = arguments[0]
    on_device = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
                    for x in jax.tree.leaves((state.params, state.opt_state)))  # fmt: skip
    weights = sum(math.prod(x.shape) * x.dtype.itemsize / _kept_apart(x.sharding) for x in jax.tree.leaves(state.params))
    return Held(chip.devices * weights, chip.devices * on_device)


def _kept_apart(sharding: jax.sharding.NamedSharding) -> int:
    named = [axis for entry in sharding.spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
    return math.prod(sharding.mesh.shape[axis] for axis in named if axis in ("tensor", "expert"))


def refusal(said: str, chip: Chip) -> Result:
    """What the compiler said, in a line and, where it ran out of memory, with the bytes that are missing."""
    line = next((line.strip() for line in said.splitlines() if line.strip()), "nothing")
    sizes = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", said) or re.search(
        r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", said
    )
    if not sizes:
        return {"said": line}
    needed, present = (float(sizes[i]) * 1024 ** " KMGT".index(sizes[i + 1] or " ") for i in (1, 3))
    return {"said": line, "needed_bytes": chip.devices * needed, "missing_bytes": chip.devices * (needed - present)}


def _known(seconds: float) -> float | None:
    return None if math.isnan(seconds) else seconds
