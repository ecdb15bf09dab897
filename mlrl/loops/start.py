"""Where a run's first parameters come from."""

from __future__ import annotations

from mlrl.models.transformer import Transformer, initialize
from mlrl.types import Array, Params


def random_parameters(model: Transformer, key: Array) -> Params:
    """Random parameters; see mlrl.models.transformer.initialize."""
    return initialize(model, key)
