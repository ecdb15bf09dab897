"""Kinds of TPU: what a chip has, by the name that topologies begin with; the numbers and where they are from."""

from __future__ import annotations

from typing import NamedTuple

from mlrl.types import Refused


class Chip(NamedTuple):
    """What a chip can do at most, and how JAX sees it.

    devices            JAX devices in a chip; everything else is of the whole chip
    hbm_bytes          of memory that the compiler lets programs use (the first number is measured; see below)
    flops              bf16 products, in FLOP/s
    hbm_bandwidth      bytes/s
    ici_bandwidth      bytes/s that a chip sends over all of its links to other chips of its slice
    dcn_bandwidth      bytes/s that a chip sends to other slices; 0.0: not known
    source             of the numbers
    """

    devices: int
    hbm_bytes: float
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    source: str


_GIB = 2**30
_DOCS = "docs.cloud.google.com/tpu/docs/"

# hbm_bytes is what libtpu 0.0.42.1 said was available when it was given a program too large (data sheets: 32, 16, 95,
# 32 and 192 GiB). Data sheets give the interconnect for both directions together; half of it is sent.
CHIPS = {
    "v4": Chip(2, 2 * 15.25 * _GIB, 275e12, 1200e9, 300e9, 0.0,
               _DOCS + "v4; links: Jouppi et al. 2023, six of 50 GB/s"),
    "v5e": Chip(1, 15.75 * _GIB, 197e12, 819e9, 400e9 / 2, 6.4e12 / 8 / 256,
                _DOCS + "v5e, read in 2026; its network per pod, divided by 256 chips"),
    "v5p": Chip(1, 95.74 * _GIB, 459e12, 2765e9, 1200e9 / 2, 50e9 / 8, _DOCS + "v5p, read in 2026"),
    "v6e": Chip(1, 31.25 * _GIB, 918e12, 1638e9, 800e9 / 2, 100e9 / 8,
                _DOCS + "v6e, read in 2026; the network between slices from memory"),
    "tpu7x": Chip(2, 2 * 94.75 * _GIB, 2307e12, 7380e9, 1200e9 / 2, 100e9 / 8,
                  _DOCS + "tpu7x, read in 2026; bandwidths from memory"),
}  # fmt: skip


def chip_of(topology: str) -> tuple[str, Chip]:
    """The kind of chip of a topology's name, such as v5p:4x4x4, and its numbers. Raises Refused for an unknown one."""
    kind = topology.partition(":")[0]
    if kind not in CHIPS:
        raise Refused(f"there is no TPU {kind!r} in mlrl.costs.chips: name a topology of {', '.join(CHIPS)}, such as "
                      "v5p:4x4x4")  # fmt: skip
    return kind, CHIPS[kind]
