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


def require_libtpu() -> None:
    """Raises Refused where the compiler for TPUs is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise Refused("libtpu, the compiler for TPUs, is not installed: pip install 'mlrl[tpu]'")


def require_name(topology: str, slices: int) -> None:
    """Raises Refused for what cannot be the name of a topology, or a number of slices."""
    require_whole("compile", "slices", slices, 1)
    if not re.fullmatch(r"\w+:\d+(x\d+){1,2}", topology):
        raise Refused(f"{topology!r} is no topology: name a kind and its chips along two or three axes, as v5e:4x4 or "
                      "v5p:4x4x4")  # fmt: skip


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
