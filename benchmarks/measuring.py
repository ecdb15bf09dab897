"""What benchmarks share: turns in one process, the machine they ran on, and what its matrix products reach at best."""

from __future__ import annotations

import os
import pathlib
import platform
import time
from importlib.metadata import version

import jax
import jax.numpy as jnp

from mlrl.models.transformer import Config

CONFIG = Config(vocabulary_size=128)  # d128 x 2 layers, 4 heads over 2 key/value heads


def take_turns(sides, repeats):
    """Seconds of each repeat of each side, {name: [repeats]}; the first, with compilation, is not counted."""
    seconds = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            jax.block_until_ready(run(repeat))
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ceiling(size=2048, repeats=10):
    """FLOP/s of the fastest of so many fp32 products of two matrices [size,size]."""
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.float32)
    seconds = take_turns({"product": lambda _, product=jax.jit(jnp.matmul): product(x, x)}, repeats)["product"]
    return 2.0 * size**3 / min(seconds)


def machine():
    """The processor, the load, and versions."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        **{package: version(package) for package in ("jax", "jaxlib", "flax", "optax")},
    }


def _lines(path):
    return pathlib.Path(path).read_text().splitlines() if os.path.exists(path) else []
