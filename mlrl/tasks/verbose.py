"""Demonstrations that say more, or less, than is needed: each step before the answer is written at random often."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mlrl.types import Array, Refused, Task


def verbose(task: Task, *, fewest: int = 0, most: int = 2, seed: int = 0) -> Task:
    """A task whose demonstrations write each of their steps `fewest` to `most` times, one after the other.

    A step ends in the example's separator; what follows the last separator, the answer, is written once. With fewest=0
    steps are left out too: 1+2+3+4= may be answered 3,6,10 or 6,6,10 or 3,10 or 10. A policy that learned from them
    knows short answers and long ones, and what remains to learn is which a problem needs.

    Args:
      task: in the graph, with `Prompts.example["separator"]` [N], such as `puzzles.arithmetic(scratchpad=True)` or a
        mixture of them. A negative separator leaves the demonstration as it is.
      fewest, most: times that a step is written, drawn evenly for each step of each example.
      seed: of these draws; an example always has the same demonstration.
    Returns: the task with other `targets`, which are wider.
    Raises: Refused, if the task is on the host or has no separators, or unless 0 <= fewest <= most and most >= 1.
    """
    if not task.in_graph:
        raise Refused(f"verbose needs a task in the graph, and {task.name} is on the host")
    if not 0 <= fewest <= most or most < 1:
        raise Refused(f"verbose needs 0 <= fewest <= most and most >= 1, got fewest={fewest}, most={most}")
    row = jnp.zeros((1,), jnp.int32)
    if "separator" not in jax.eval_shape(task.at, row, row).example:
        raise Refused(f'verbose needs example["separator"], which {task.name} lacks: give it scratchpad=True')
    pad_id = task.vocabulary.pad_id

    def times(source: Array, index: Array, steps: int) -> Array:
        """[N,steps] how often each step is written."""
        key = jax.random.key(seed, impl="threefry2x32")
        draw = lambda s, i: jax.random.randint(  # noqa: E731
            jax.random.fold_in(jax.random.fold_in(key, s), i), (steps,), fewest, most + 1)  # fmt: skip
        return jax.vmap(draw)(jnp.asarray(source), jnp.asarray(index))

    def targets(source: Array, index: Array) -> tuple[Array, Array]:
        tokens, valid = task.targets(source, index)
        separator = task.at(source, index).example["separator"]
        ends = valid & (tokens == separator[:, None])
        step = jnp.cumsum(ends, axis=1) - ends
        columns = tokens.shape[1]
        often = jnp.take_along_axis(times(source, index, columns), step, axis=1)
        return repeated(tokens, valid, step, jnp.where(step < ends.sum(axis=1)[:, None], often, 1), most, pad_id)

    return dataclasses.replace(task, targets=jax.jit(targets))


def repeated(tokens: Array, valid: Array, step: Array, times: Array, most: int, pad_id: int) -> tuple[Array, Array]:
    """Rows in which each step stands `times` times in succession.

    Args:
      tokens, valid: [N,T], packed to the left.
      step: [N,T] number of the step that a token belongs to, ascending.
      times: [N,T] the same for all tokens of a step, at most `most`.
    Returns: (tokens, valid), both [N, T + (most - 1) * (T - 2)]: the last step is written once, and has two tokens.
    """
    columns = tokens.shape[1]
    width = columns + (most - 1) * max(columns - 2, 0)
    earlier = (step[:, None, :] < step[:, :, None]) & valid[:, None, :]  # [N,T,T'] whether T' is of an earlier step
    same = (step[:, None, :] == step[:, :, None]) & valid[:, None, :]
    begins = jnp.sum(jnp.where(earlier, times[:, None, :], 0), axis=2)
    offset = jnp.sum(same & (jnp.arange(columns)[None, None] < jnp.arange(columns)[None, :, None]), axis=2)
    length = same.sum(axis=2)
    copy = jnp.arange(most)
    place = begins[:, :, None] + copy * length[:, :, None] + offset[:, :, None]  # [N,T,most]
    written = valid[:, :, None] & (copy < times[:, :, None])
    row = jnp.broadcast_to(jnp.arange(tokens.shape[0])[:, None, None], place.shape)
    place = jnp.where(written, place, width)
    out = jnp.full((tokens.shape[0], width), pad_id, tokens.dtype)
    out = out.at[row, place].set(jnp.broadcast_to(tokens[:, :, None], place.shape), mode="drop")
    return out, jnp.zeros(out.shape, bool).at[row, place].set(True, mode="drop")
