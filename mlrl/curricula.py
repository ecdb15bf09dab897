"""Curricula: how often each source of a task is sampled, as (init, weights, update) with explicit state."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from mlrl.types import Array, CurriculumFn, Refused, Task


def fixed(rates: Sequence[float] = ()) -> CurriculumFn:
    """The same weights in every step.

    Args:
      rates: one number per source, in any scale; () takes the task's own rates.
    """

    def init(task: Task) -> Array:
        return _normalized(rates, task)

    return CurriculumFn(init, lambda state: state, lambda state, prompts, batch: state)


def easy_to_hard(*, steps: int, rehearsal: float = 0.2) -> CurriculumFn:
    """Moves through the sources in their order, from the first to the last, over `steps` steps.

    At step t the middle is m = (S - 1) * min(t / steps, 1). A source i has the weight max(0, 1 - |i - m|), so two
    neighbours share the front; of what is sampled, a share `rehearsal` comes instead from the sources up to the
    front, evenly.

    Args:
      steps: training steps until only the last source (and rehearsal) is left.
      rehearsal: between 0.0 and 1.0.
    """
    if steps < 1:
        raise Refused(f"easy_to_hard: steps must be at least 1, got {steps}")
    if not 0.0 <= rehearsal <= 1.0:
        raise Refused(f"easy_to_hard: rehearsal must lie in [0, 1], got {rehearsal}")

    def init(task: Task) -> dict[str, Array]:
        return {"step": jnp.int32(0), "order": jnp.arange(len(task.sources), dtype=jnp.float32)}

    def weights(state: dict[str, Array]) -> Array:
        order = state["order"]
        middle = (order.shape[0] - 1) * jnp.minimum(state["step"] / steps, 1.0)
        front = jnp.maximum(0.0, 1.0 - jnp.abs(order - middle))
        reached = (order <= jnp.ceil(middle)).astype(jnp.float32)
        return (1 - rehearsal) * front / front.sum() + rehearsal * reached / reached.sum()

    def update(state: dict[str, Array], prompts, batch) -> dict[str, Array]:
        return state | {"step": state["step"] + 1}

    return CurriculumFn(init, weights, update)


def _normalized(rates: Sequence[float], task: Task) -> Array:
    values = np.asarray(rates or task.rates, np.float64)
    if values.shape != (len(task.sources),):
        raise Refused(f"{task.name} has {len(task.sources)} sources ({', '.join(task.sources)}): rates must be one "
                      f"number for each, got {list(rates)}")  # fmt: skip
    if not np.isfinite(values).all() or (values < 0).any() or values.sum() == 0:
        raise Refused(f"{task.name}: rates must be finite, not negative and not all zero, got {values.tolist()}")
    return jnp.asarray(values / values.sum(), jnp.float32)
