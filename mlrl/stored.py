"""Rows that are stored instead of sampled, as batches: demonstrations, compared candidates, ratings, labelled steps.

Each takes and draws what `prompts.draw` does, and knows what the task knows of its rows: outcomes and labels travel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mlrl import prompts as prompts_lib
from mlrl.batches import unannotated
from mlrl.types import Array, Batch, Refused, Rewards, Task


def demonstrations(task: Task, key: Array, step: Array | int, rows: int, weights: Array) -> Batch:
    """The demonstrations of a step's prompts, each scored 0 and in a group of its own: `prompts.demonstrations`."""
    return unannotated(prompts_lib.demonstrations(task, key, step, rows, weights))


def candidates(task: Task, key: Array, step: Array | int, rows: int, weights: Array) -> Batch:
    """The stored completions of a step's prompts, in whole groups: the C rows of a prompt side by side.

    The outcome of a row is its candidate's, and is also its reward, on its last action. A candidate without an outcome
    (NaN) is a row without a score, which is in no pair and in no loss.

    Args:
      rows: B = N * C.
    Returns: Batch with B rows.
    Raises: Refused, if the task has no candidates or `rows` does not divide by C.
    """
    return _of_candidates(task, key, step, rows, weights)[0]


def ratings(task: Task, key: Array, step: Array | int, rows: int, weights: Array) -> Batch:
    """As `candidates`, but each row is in a group of its own, judged by itself: for KTO, paired data or not."""
    batch = candidates(task, key, step, rows, weights)
    xp = jnp if task.in_graph else np
    return batch.replace(rollout=batch.rollout.replace(group=xp.arange(rows, dtype=xp.int32)))


def labelled_steps(task: Task, key: Array, step: Array | int, rows: int, weights: Array) -> Batch:
    """As `candidates`, for process reward models: mask on the labelled tokens alone, labels in rewards.tokens.

    A candidate with labels needs no outcome.
    """
    batch, labels = _of_candidates(task, key, step, rows, weights)
    known = ~jnp.isnan(labels)
    rewards = batch.rewards.replace(tokens=jnp.where(known, labels, 0.0), scored=known.any(axis=1))
    return batch.replace(rewards=rewards, mask=batch.rollout.action_mask & known)


def candidates_per_prompt(task: Task) -> int:
    """C, without computing a candidate of a task in the graph."""
    row = np.zeros(1, np.int32)
    found = jax.eval_shape(task.candidates, row, row) if task.in_graph else task.candidates(row, row)
    return found.outcome.shape[1]


def first(task: Task, count: int) -> tuple[Batch, Array]:
    """The candidates of the first `count` prompts (`prompts.first`): always the same rows, and their labels [B,L]."""
    prompts = prompts_lib.first(task, count)
    return _rows_of(task, prompts.source, prompts.index)


def _of_candidates(task: Task, key: Array, step: Array | int, rows: int, weights: Array) -> tuple[Batch, Array]:
    """(rows in whole groups, labels [B,L])."""
    each = candidates_per_prompt(task)
    if rows % each:
        raise Refused(f"{task.name} has {each} candidates a prompt, and {rows} rows do not divide into them: set "
                      f"Experiment.rows_per_step to a multiple of {each}")  # fmt: skip
    return _rows_of(task, *prompts_lib.choose(task, key, step, rows // each, weights))


def _rows_of(task: Task, source: Array, index: Array) -> tuple[Batch, Array]:
    found, prompts = task.candidates(source, index), task.at(source, index)
    n, each, width = found.tokens.shape
    flat = lambda x: x.reshape(n * each, *x.shape[2:])  # noqa: E731
    group = np.arange(n, dtype=np.int32).repeat(each)
    valid, outcome = flat(found.valid), flat(found.outcome)
    rollout = prompts_lib.as_rows(task, prompts_lib.repeat(prompts, each), flat(found.tokens), valid, group)
    columns = jnp.arange(rollout.tokens.shape[1])
    last = jnp.max(jnp.where(rollout.action_mask, columns, -1), axis=1, keepdims=True)
    scored = jnp.isfinite(outcome) & valid.any(axis=1)
    outcome = jnp.where(scored, outcome, 0.0)
    rewards = Rewards(tokens=jnp.where(columns == last, outcome[:, None], 0.0), outcome=outcome, scored=scored,
                      parts={"outcome": outcome})  # fmt: skip
    labels = jnp.pad(flat(found.labels), ((0, 0), (columns.size - width, 0)), constant_values=jnp.nan)
    return unannotated(rollout, rewards), labels
