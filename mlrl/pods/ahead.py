"""Compiling an experiment's own programs for chips that are not there; each result is a dict that JSON can hold."""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlrl import meshes
from mlrl.costs import flops, work
from mlrl.costs.chips import Chip, chip_of
from mlrl.loops import stages
from mlrl.loops.states import Program
from mlrl.pods import topologies
from mlrl.pods.collectives import traffic
from mlrl.pods.roofline import Held, predicted
from mlrl.types import Refused

Result = dict[str, Any]


@contextlib.contextmanager
def on_topology(topology: str, slices: int) -> Iterator[None]:
    """Makes meshes of the devices of a topology. Raises Refused where libtpu does not know it, or is not there."""
    with meshes.on(topologies.described(topology, slices)):
        yield


def compile_all(loop: Any, parts: Any, topology: str, results: pathlib.Path) -> None:
    """Compiles the programs of a prepared experiment, within `on_topology`; adds lines of JSON to `results` for each.

    Programs of which the file has a line already are left out: so one that ends the process is not tried again.

    Args:
      loop: the module of the experiment's loop, with `programs`.
      parts: what its `prepare` made.
      results: what is known of a program is written before it is compiled, and all of it after.
    Raises: Refused, if the experiment's mesh leaves out devices of the topology.
    """
    kind, chip = chip_of(topology)
    mesh, devices = parts.experiment.mesh(), meshes.mesh().size
    if mesh.size != devices:
        raise Refused(f"the experiment's mesh has {mesh.size} of the {devices} devices of {topology}: give it all of "
                      "them (set meshes.mesh.devices = 0), or name a topology of its size")  # fmt: skip
    programs = loop.programs(parts)
    runs = work.runs(parts, programs)
    programs |= stages.evaluations(parts)  # which are of no step
    unit = "round" if hasattr(parts.experiment, "num_rounds") else "step"
    done = {line["program"] for line in read(results)}
    with results.open("a") as file:
        for name, program in programs.items():
            if name in done:
                continue
            about = {"program": name, "unit": unit, "runs": runs.get(name, 0), "kind": kind,
                     "chips": devices // chip.devices, "mesh": dict(program.mesh.shape)}  # fmt: skip
            print(json.dumps(about), file=file, flush=True)
            result = compiled(name, program, parts, chip)
            print(json.dumps(about | result), file=file, flush=True)


def read(results: pathlib.Path) -> list[Result]:
    """The lines of a file of results, the last one of each program."""
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    return list({line["program"]: line for line in lines}.values())


def compiled(name: str, program: Program, parts: Any, chip: Chip) -> Result:
    """Compiles one program; what it needs per chip, or what the compiler refused it for. Bytes and seconds."""
    mesh = program.mesh
    arguments, chips = placed(program.arguments, mesh), mesh.size // chip.devices
    start = time.perf_counter()
    with meshes.use(mesh):
        traced = program.function.trace(*arguments)
        lowered = traced.lower()
    lowered_at, cpu = time.perf_counter(), time.process_time()
    jax.config.update("jax_enable_compilation_cache", False)  # what is found there took no time to compile
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return {"fits": False, **refusal(str(error), chip)}
    seconds, cpu = time.perf_counter() - lowered_at, time.process_time() - cpu
    products = flops.products(traced.jaxpr)
    phases = work.phases(parts, name, products, program.arguments)
    sent = traffic(executable.as_text())
    sent = sent._replace(sent={kind: chip.devices * count for kind, count in sent.sent.items()})
    held = held_by(arguments, chip, parts.model.config.dtype)
    time_ = predicted(phases, sent, held, chip, chips)
    beside = jax.tree.map(_placed, program.beside, meshes.state_shardings(program.beside, parts.experiment.mesh())) if (
        program.beside) else ()  # fmt: skip
    found = memory(executable.memory_analysis(), arguments, beside, chip)
    return {
        "fits": found["spare_bytes"] >= 0, "missing_bytes": max(0, -found["spare_bytes"]), **found,
        "flops": {phase: one.flops / chips for phase, one in phases.items()},
        "sent_bytes": sent.sent, "unknown_loops": sent.unknown_loops + products.unknown_loops,
        "weights_bytes": held.weights, "state_bytes": held.state,
        "trace_seconds": lowered_at - start, "compile_seconds": seconds, "compile_cpu_seconds": cpu,
        "predicted_seconds": time_.seconds, "predicted_serial_seconds": _known(time_.serial),
        "predicted_phases": {phase: {"products": products_, "memory": memory_}
                             for phase, products_, memory_ in time_.phases},
        "predicted_links_seconds": time_.links, "predicted_network_seconds": _known(time_.network),
    }  # fmt: skip


def placed(arguments: Sequence[Any], mesh: Mesh) -> tuple[Any, ...]:
    """Shapes and dtypes of a program's arguments with the shardings that the loops give them: the state, then rows."""
    state, *rows = arguments
    shards, whole = meshes.row_shards(mesh), NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec(meshes.RULES["rows"]))

    def row(x: Any) -> Any:
        if not hasattr(x, "shape"):
            return x
        return _placed(x, split if x.ndim and x.shape[0] % shards == 0 else whole)

    return jax.tree.map(_placed, state, meshes.state_shardings(state, mesh)), *jax.tree.map(row, rows)


def _placed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def memory(stats: Any, arguments: Sequence[Any], beside: Any, chip: Chip) -> Result:
    """What a chip holds while a program runs, in bytes, from what the compiler says of one device.

    What reuses the memory of arguments is no output. Beside the program lies whatever part of the state it does not
    read, and which is not among its arguments: sampling does without the optimizer's; and on a mesh of its own it reads
    a copy, `beside` all of the state.
    """
    held = lambda tree: sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize  # noqa: E731
                            for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key))
    read = stats.argument_size_in_bytes
    found = {
        "arguments_bytes": read, "temporaries_bytes": stats.temp_size_in_bytes,
        "output_bytes": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "code_bytes": stats.generated_code_size_in_bytes,
        "beside_bytes": held(beside) if beside else max(0, held(arguments[0]) - read),
    }  # fmt: skip
    found = {name: chip.devices * count for name, count in found.items()}
    return found | {"spare_bytes": chip.hbm_bytes - sum(found.values())}


def held_by(arguments: Sequence[Any], chip: Chip, dtype: str) -> Held:
    """What a chip holds of the state, and what of the weights it multiplies with, in the dtype of products: its part
    over the tensor and expert axes, gathered over all others.
    """
    state = arguments[0]
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
               for x in jax.tree.leaves((state.params, state.opt_state)))  # fmt: skip
    products = jnp.dtype(dtype).itemsize
    weights = sum(x.size * min(products, x.dtype.itemsize) / _kept_apart(x.sharding)
                  for x in jax.tree.leaves((state.params, state.frozen)))  # fmt: skip
    return Held(chip.devices * weights, chip.devices * held)


def _kept_apart(sharding: NamedSharding) -> int:
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
