"""Rotary positions, and the ways in which their frequencies are stretched for longer rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from mlrl.types import Array

# (frequency [half], theta) -> (frequency [half], magnitude): what is done to the frequencies, in radians a position,
# and a factor on the rotated vectors. Numpy: it is a constant of the compiled program.
Scaling = Callable[[np.ndarray, float], tuple[np.ndarray, float]]


def unscaled(frequency: np.ndarray, theta: float) -> tuple[np.ndarray, float]:
    """The frequencies as they are."""
    del theta
    return frequency, 1.0


def rotary(x: Array, positions: Array, *, theta: float = 10_000.0, scaling: Scaling = unscaled) -> Array:
    """Rotates pairs of features by angles that grow with the position (half-split convention).

    With x = [x1, x2] along the last axis and angle_i = position * theta ** (-2i / head_width):
        [x1 cos - x2 sin,  x2 cos + x1 sin] * magnitude

    Args:
      x: [B, L, ..., head_width], any axes between.
      positions: [B, L] int32, 0 for the first token of a row.
      theta: the base of the geometric series of wavelengths.
      scaling: what is done to the frequencies, and the magnitude.
    Returns: the rotated x, same shape and dtype; the rotation itself is computed in fp32.
    Reference: Su et al. 2021, RoFormer (the half-split layout is that of Llama and Qwen weights).
    """
    half = x.shape[-1] // 2
    frequency, magnitude = scaling(float(theta) ** (-np.arange(half) / half), float(theta))
    angle = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequency, jnp.float32)  # [B, L, half]
    angle = angle.reshape(angle.shape[:2] + (1,) * (x.ndim - 3) + (half,))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if magnitude != 1.0:
        cos, sin = cos * magnitude, sin * magnitude
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def unrotated(x: Array, positions: Array) -> Array:
    """x as it is, for models whose positions are learned."""
    del positions
    return x


@dataclasses.dataclass(frozen=True)
class Linear:
    """frequency / factor. Reference: Chen et al. 2023, position interpolation."""

    factor: float

    def __call__(self, frequency: np.ndarray, theta: float) -> tuple[np.ndarray, float]:
        del theta
        return frequency / self.factor, 1.0


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Long wavelengths are divided by `factor`, short ones stay, those between are interpolated.

    With turns = original_tokens * frequency / 2 pi, the full turns within the rows of pretraining, and
    keep = clip((turns - low_turns) / (high_turns - low_turns), 0, 1):
        frequency * (keep + (1 - keep) / factor)

    Reference: Llama 3.1 (rope_type "llama3").
    """

    factor: float
    low_turns: float
    high_turns: float
    original_tokens: int

    def __call__(self, frequency: np.ndarray, theta: float) -> tuple[np.ndarray, float]:
        del theta
        turns = self.original_tokens * frequency / (2 * math.pi)
        keep = np.clip((turns - self.low_turns) / (self.high_turns - self.low_turns), 0.0, 1.0)
        return frequency * (keep + (1 - keep) / self.factor), 1.0


@dataclasses.dataclass(frozen=True)
class Yarn:
    """Frequencies below `slow_turns` full turns are divided by `factor`, those above `fast_turns` stay; a ramp between.

    The ramp runs over the index i of the frequency, between the (fractional) indices that make so many turns:
        index(turns) = half * log(original_tokens / (2 pi turns)) / log(theta)
    rounded outwards if `whole_indices`. Rotated vectors are multiplied by `magnitude`.

    Reference: Peng et al. 2023, YaRN, with magnitude = 0.1 log(factor) + 1.
    """

    factor: float
    original_tokens: int
    magnitude: float
    fast_turns: float = 32.0
    slow_turns: float = 1.0
    whole_indices: bool = True

    def __call__(self, frequency: np.ndarray, theta: float) -> tuple[np.ndarray, float]:
        half = len(frequency)

        def index(turns: float) -> float:
            return half * math.log(self.original_tokens / (2 * math.pi * turns)) / math.log(theta)

        low, high = index(self.fast_turns), index(self.slow_turns)
        if self.whole_indices:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        stretched = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0.0, 1.0)
        return frequency * (1 - stretched + stretched / self.factor), self.magnitude
