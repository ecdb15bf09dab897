"""Tests run on the CPU with eight virtual devices and a compilation cache shared between runs."""

import gc
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Tests compile hundreds of tiny programs and run each for a moment. Unoptimized, an update took 0.8 s to compile in
# place of 7.2. What is given wins, so that both can be tested:
# XLA_FLAGS="--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true" make test
_FLAGS = {"--xla_force_host_platform_device_count": "8", "--xla_backend_optimization_level": "0",
          "--xla_cpu_use_fusion_emitters": "false"}  # fmt: skip
_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([_given, *(f"{k}={v}" for k, v in _FLAGS.items() if k not in _given)]).strip()
_CACHE = pathlib.Path(__file__).resolve().parent.parent / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def pytest_collection_finish():
    """What was imported stays, and tracing makes few cycles: looking for them took a seventh of two files' time."""
    gc.freeze()
    gc.set_threshold(200_000, 20, 50)
