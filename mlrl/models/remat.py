"""Rematerialization: what a layer keeps of its forward pass for the backward pass; the rest is computed again.

Memory is bought with time. Without it (`none`) a layer keeps every intermediate array, and those of attention grow with
the square of a row's length. What is computed twice is the same, and so are gradients, to rounding.

Reference: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

Layer = Callable[..., Any]  # (a flax module, arrays) -> the residual stream after the layer, and the layer's cache


def none(layer: Layer, **how: Any) -> Layer:
    """Keeps everything: the identity."""
    del how
    return layer


def dots(layer: Layer, **how: Any) -> Layer:
    """Keeps the products with kernels, [B,L,...], and not those of attention, [B,heads,L,L], nor what is elementwise.
    """
    return nn.remat(layer, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable, **how)


def full(layer: Layer, **how: Any) -> Layer:
    """Keeps the layer's input [B,L,D] alone: the whole layer is computed twice."""
    return nn.remat(layer, **how)
