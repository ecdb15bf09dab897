"""Topologies: the devices of TPU slices that are not there, described by libtpu."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from typing import Any

import jax

from mlrl.types import Refused, require_whole

# What libtpu reads as it loads: not to ask a machine without a TPU for one, and not to lock out another process.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip

# How a slice of so many chips lies, unless it is asked for otherwise (docs.cloud.google.com/tpu/docs, read in 2026).
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
          1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16"}  # fmt: skip


def require_libtpu() -> None:
    """Raises Refused where the compiler for TPUs is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise Refused("libtpu, the compiler for TPUs, is not installed: pip install 'jax[tpu]'")


def require_name(topology: str, slices: int) -> None:
    """Raises Refused for what cannot be the name of a topology, or a number of slices."""
    require_whole("compile", "slices", slices, 1)
    if leased := re.fullmatch(r"(v4|v5p|v5e|v5litepod|v6e)-(\d+)", topology):
        raise Refused(_arrangement(topology, leased[1], int(leased[2])))
    if not re.fullmatch(r"\w+:\d+(x\d+){1,2}", topology):
        raise Refused(f"{topology!r} is no topology: name a kind and its chips along two or three axes, as v5e:4x4 or "
                      "v5p:4x4x4")  # fmt: skip


def _arrangement(name: str, kind: str, count: int) -> str:
    """What to write in place of the name that a cloud gives a slice, as v5p-64 or v5litepod-256."""
    chips = count // 2 if kind in ("v4", "v5p") else count  # these names count cores
    kind = "v5e" if kind == "v5litepod" else kind
    shapes = _FLAT if kind in ("v5e", "v6e") else _CUBES
    counted = f"has {chips} chips, since {kind}'s names count cores, two a chip" if chips != count else (
        f"has {chips} chips")  # fmt: skip
    asked = f"write {kind}:{shapes[chips]}" if chips in shapes else "write how they lie, as v5e:4x4 or v5p:2x4x4"
    return f"{name} {counted}: {asked}, unless it was asked for in another shape"


def described(topology: str, slices: int = 1) -> Sequence[Any]:
    """The devices of `slices` slices of a topology. Needs ENVIRONMENT before libtpu is first loaded.

    Raises: Refused, if libtpu is not installed or does not know the topology.
    """
    require_libtpu()
    require_name(topology, slices)
    from jax.experimental import topologies

    more = {"num_slices": slices} if slices > 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices
    except (RuntimeError, ValueError, jax.errors.JaxRuntimeError) as error:
        said = str(error).strip().splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise Refused(f"libtpu knows no topology {topology}: {said}") from error
