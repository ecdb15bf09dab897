"""Curricula: how often each source of a task is sampled, as (init, weights, update) with explicit state."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mlrl.types import Array, Batch, CurriculumFn, Metrics, Prompts, Refused, Task, require_whole


def fixed(rates: Sequence[float] = ()) -> CurriculumFn:
    """The same weights in every step.

    Args:
      rates: one number per source, in any scale; () takes the task's own rates.
    Raises: Refused at the start, if they are not one for each source, negative, not finite or all 0.
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
    Raises: Refused, if steps is below 1 or rehearsal not in [0, 1].
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


def dump(*, window: int = 300, temperature: float = 0.1, exploration: float = 1.0) -> CurriculumFn:
    """DUMP: a source is sampled by how large its advantages were lately, and by how seldom it was tried.

        u_j = mean |A| over the last `window` rows of source j + exploration * sqrt(2 ln(N + 1) / (n_j + 1))
        weights = softmax(u / temperature)

    with n_j the rows of source j so far, N = sum_j n_j, and |A| of a row the mean over its actions, before rows are
    selected; unscored rows do not count. Before the first step all sources have the same weight. With advantages that
    are divided by the group's deviation, sources are favoured whose prompts are solved half of the time, and one whose
    prompts are always or never solved is left to the exploration.

    Args:
      window: rows that are remembered of each source; a row stays until `window` newer ones of its source came.
      temperature: of the softmax; advantages have the scale of 1.
      exploration: 1.0 is UCB1's; 0.0 none.
    Raises: Refused, if window is no whole number of at least 1, temperature not above 0, or exploration below 0.
    Reference: Wang et al. 2025, "DUMP: Automated Distribution-Level Curriculum Learning for RL-based LLM
      Post-training". Left out: their code also takes the mean reward of each validation for one more advantage.
    """
    require_whole("dump", "window", window, 1)
    if not temperature > 0 or not exploration >= 0:
        raise Refused("dump needs temperature > 0 and exploration >= 0, got "
                      f"temperature={temperature}, exploration={exploration}")  # fmt: skip

    def init(task: Task) -> dict[str, Array]:
        sources = len(task.sources)
        return {"recent": jnp.zeros((sources, window)), "rows": jnp.zeros((sources,), jnp.int32)}

    def weights(state: dict[str, Array]) -> Array:
        rows = state["rows"]
        mean = state["recent"].sum(axis=1) / jnp.clip(rows, 1, window)
        bonus = jnp.sqrt(2.0 * jnp.log(rows.sum() + 1.0) / (rows + 1.0))
        return jax.nn.softmax((mean + exploration * bonus) / temperature)

    def update(state: dict[str, Array], prompts: Prompts, batch: Batch) -> dict[str, Array]:
        actions = batch.rollout.action_mask
        size = jnp.where(actions, jnp.abs(batch.advantages), 0.0).sum(axis=1) / jnp.maximum(actions.sum(axis=1), 1)
        own = jnp.asarray(prompts.source)[:, None] == jnp.arange(len(state["rows"]))  # [B,S]
        own &= (batch.rewards.scored & actions.any(axis=1))[:, None]
        new, place = own.sum(axis=0), jnp.cumsum(own, axis=0) - 1
        newest = own & (place >= new - window)  # of more rows than the window holds, the last
        column = (state["rows"] + place) % window
        row, source = jnp.indices(own.shape)
        recent = state["recent"].at[source, jnp.where(newest, column, window)].set(size[row], mode="drop")
        return {"recent": recent, "rows": state["rows"] + new.astype(jnp.int32)}

    return CurriculumFn(init, weights, update)


def as_metrics(weights: Array, task: Task) -> Metrics:
    """The weights [S] by the sources' names; {} for a task of one source, whose weight is always 1."""
    named = {f"curriculum/{source}": weights[i] for i, source in enumerate(task.sources)}
    return named if len(task.sources) > 1 else {}


def _normalized(rates: Sequence[float], task: Task) -> Array:
    values = np.asarray(rates or task.rates, np.float64)
    if values.shape != (len(task.sources),):
        raise Refused(f"{task.name} has {len(task.sources)} sources ({', '.join(task.sources)}): rates must be one "
                      f"number for each, got {list(rates)}")  # fmt: skip
    if not np.isfinite(values).all() or (values < 0).any() or values.sum() == 0:
        raise Refused(f"{task.name}: rates must be finite, not negative and not all zero, got {values.tolist()}")
    return jnp.asarray(values / values.sum(), jnp.float32)
