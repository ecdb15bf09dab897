"""mlrl: reinforcement learning for language models, in JAX. The public surface, imported on first use."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from typing import Any

__version__ = "0.1.0"

# Where each public name lives. Importing mlrl imports none of these files: not jax, not TensorFlow.
_HOMES = {
    "Batch": "types",
    "Prompts": "types",
    "Refused": "types",
    "Rewards": "types",
    "Rollout": "types",
    "Scores": "types",
    "Task": "types",
    "TrainState": "types",
    "generate": "generation",
    "restore": "checkpoints",
    "save": "checkpoints",
    "score": "scoring",
    "update": "updates",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """A public name from its file, or a module of the package: `mlrl.generate`, `mlrl.rewards`."""
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted({*__all__, *(name for name in modules if not name.startswith("_"))})
