"""Rope settings: the group of a config.json that stretches rotary frequencies, as a scaling of mlrl.models.rope."""

from __future__ import annotations

import math
from typing import Any

from mlrl.models import rope
from mlrl.models.settings import Settings
from mlrl.types import Refused


def scaling_of(s: Settings, positions: Any) -> rope.Scaling:
    """The scaling that a group of settings describes; `positions` is max_position_embeddings."""
    kind, older = s.any("rope_type", ""), s.any("type", "")
    kind = kind or older or "default"
    s.fixed(partial_rotary_factor=1.0)
    s.any("rope_theta", ())
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise Refused(f"a rope_scaling of type {kind!r} is not known to mlrl: it has {', '.join(_SCALINGS)}")
    scaling = _SCALINGS[kind](s, positions)
    s.all_read()
    return scaling


def _unscaled(s: Settings, positions: Any) -> rope.Scaling:
    del s, positions
    return rope.unscaled


def _linear(s: Settings, positions: Any) -> rope.Scaling:
    del positions
    return rope.Linear(s.number("factor"))


def _llama3(s: Settings, positions: Any) -> rope.Scaling:
    original = s.whole("original_max_position_embeddings", positions or None)
    return rope.Llama3(s.number("factor"), s.number("low_freq_factor"), s.number("high_freq_factor"), original)


def _yarn(s: Settings, positions: Any) -> rope.Scaling:
    original = s.whole("original_max_position_embeddings", positions or None)
    factor = s.number("factor")
    scale = lambda weight: 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
    magnitude = scale(1.0)
    if s.has("mscale") and s.has("mscale_all_dim"):
        magnitude = scale(s.number("mscale")) / scale(s.number("mscale_all_dim"))
    return rope.Yarn(factor, original, s.number("attention_factor", magnitude), s.number("beta_fast", 32.0),
                     s.number("beta_slow", 1.0), s.flag("truncate", True))  # fmt: skip


_SCALINGS = {"default": _unscaled, "linear": _linear, "llama3": _llama3, "yarn": _yarn}


def scaling_back(scaling: rope.Scaling) -> dict[str, Any]:
    """The group of settings of a scaling; {} for none."""
    match scaling:
        case rope.Linear(factor):
            return {"rope_type": "linear", "factor": factor}
        case rope.Llama3(factor, low, high, original):
            return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                    "original_max_position_embeddings": original}  # fmt: skip
        case rope.Yarn(factor, original, magnitude, fast, slow, whole):
            return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
                    "attention_factor": magnitude, "beta_fast": fast, "beta_slow": slow, "truncate": whole}  # fmt: skip
    return {}
