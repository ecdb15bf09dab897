"""A roofline: the step time that chips would need if nothing but their peaks bounded them. Predicted, not measured."""

from __future__ import annotations

from typing import NamedTuple

from mlrl.costs.chips import Chip
from mlrl.costs.work import Phases, Work
from mlrl.pods.collectives import BETWEEN_SLICES, Traffic


class Held(NamedTuple):
    """Bytes on one chip: `weights` that it multiplies with in a pass, and `state` (parameters, their optimizer's)."""

    weights: float
    state: float


class Predicted(NamedTuple):
    """Predicted seconds of a program, and what they are made of.

    seconds    if everything overlaps perfectly: the longest of products with memory, links and network
    serial     if nothing overlaps: their sum
    phases     (name, products, memory): seconds of each phase
    links      seconds of the collectives within slices
    network    seconds of what goes between slices; NaN where its bandwidth is not known
    """

    seconds: float
    serial: float
    phases: tuple[tuple[str, float, float], ...]
    links: float
    network: float


def memory_bytes(work: Work, held: Held, chips: int) -> float:
    """Bytes that a chip moves between its memory and its cores in a phase.

        weight_passes * weights  +  cache_bytes / chips  +  optimizer_steps * 3 * state

    A step of the optimizer reads and writes the state, and writes and reads gradients, which are at most half of it.
    Activations and logits are not counted: they would have to be kept between products by the compiler.
    """
    return work.weight_passes * held.weights + work.cache_bytes / chips + 3.0 * work.optimizer_steps * held.state


def predicted(phases: Phases, traffic: Traffic, held: Held, chip: Chip, chips: int) -> Predicted:
    """The predicted time of one run of a program on `chips` chips:

        max( sum over phases of max(flops / (chips * peak), memory_bytes / memory bandwidth),
             sent within slices / link bandwidth,  sent between slices / network bandwidth )

    It is a lower bound: work is split evenly, every product runs at the chip's bf16 peak, every byte at its full
    bandwidth, collectives use all links of a chip, and the three overlap perfectly. Host rewards take no time.

    Reference: Williams et al. 2009, "Roofline".
    """
    times = tuple(
        (name, work.flops / chips / chip.flops, memory_bytes(work, held, chips) / chip.hbm_bandwidth)
        for name, work in phases.items()
    )
    between = traffic.sent.get(BETWEEN_SLICES, 0.0)
    links = (sum(traffic.sent.values()) - between) / chip.ici_bandwidth
    network = between / chip.dcn_bandwidth if chip.dcn_bandwidth else (float("nan") if between else 0.0)
    cores = sum(max(products, memory) for _, products, memory in times)
    serial = sum(products + memory for _, products, memory in times) + links + network
    return Predicted(max(cores, links, network), serial, times, links, network)
