"""Optimizers: chains of optax transformations, and the learning rate they are at."""

from __future__ import annotations

from typing import Any

import optax

from mlrl.types import Array, Refused


def warmup_then_constant(*, peak: float, warmup_steps: int = 0) -> optax.Schedule:
    """Linear from 0 to `peak` in `warmup_steps` optimizer steps, then `peak`."""
    if warmup_steps == 0:
        return optax.constant_schedule(peak)
    return optax.linear_schedule(0.0, peak, warmup_steps)


def warmup_then_cosine(*, peak: float, warmup_steps: int = 0, decay_steps: int, final: float = 0.0) -> optax.Schedule:
    """Linear from 0 to `peak`, then half a cosine down to `final` at optimizer step `decay_steps`."""
    if decay_steps <= warmup_steps:
        raise Refused(f"warmup_then_cosine.decay_steps ({decay_steps}) must exceed warmup_steps ({warmup_steps})")
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, decay_steps, final)


def adamw(*, learning_rate: float | optax.Schedule = 1e-3, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8,
          weight_decay: float = 0.0, max_grad_norm: float = 1.0) -> optax.GradientTransformation:  # fmt: skip
    """AdamW after clipping the gradient's global norm; `max_grad_norm` 0.0 does not clip.

    Reference: Loshchilov and Hutter 2019. The decay applies to every parameter.
    """
    adam = optax.inject_hyperparams(optax.adamw, static_args=("b1", "b2", "eps", "weight_decay"))(
        learning_rate=learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay
    )
    return optax.chain(optax.clip_by_global_norm(max_grad_norm) if max_grad_norm else optax.identity(), adam)


def current_learning_rate(opt_state: Any) -> Array:
    """The learning rate of the last optimizer step; NaN for an optimizer that does not expose one."""
    found = optax.tree_utils.tree_get(opt_state, "learning_rate", default=float("nan"))
    return found
