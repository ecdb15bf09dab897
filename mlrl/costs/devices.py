"""What the devices at hand can do at most, by the name that JAX has for their kind; unknown for a CPU."""

from __future__ import annotations

from typing import NamedTuple

from mlrl.costs.chips import CHIPS


class Peak(NamedTuple):
    """Of one JAX device: bf16 products in FLOP/s, and bytes/s of its memory."""

    flops: float
    bandwidth: float


_TPUS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
         "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x"}  # fmt: skip
# Of NVIDIA's data sheets, from memory: dense bf16 tensor cores (fp16 for the T4), without sparsity.
_GPUS = {
    "NVIDIA B200": (2250e12, 8.0e12), "NVIDIA H200": (989e12, 4.8e12), "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA H100 PCIe": (756e12, 2.0e12), "NVIDIA A100-SXM4-80GB": (312e12, 2.04e12),
    "NVIDIA A100-SXM4-40GB": (312e12, 1.56e12), "NVIDIA L4": (121e12, 0.3e12), "Tesla T4": (65e12, 0.32e12),
}  # fmt: skip


def peak_of(kind: str) -> Peak | None:
    """The peak of a device of this kind (`jax.Device.device_kind`); None where it is not known."""
    if kind in _GPUS:
        return Peak(*_GPUS[kind])
    if kind in _TPUS:
        chip = CHIPS[_TPUS[kind]]
        return Peak(chip.flops / chip.devices, chip.hbm_bandwidth / chip.devices)
    return None
