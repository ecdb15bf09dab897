"""Prompts of a step: which examples are drawn, as a pure function of (key, step, sampling weights)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mlrl.types import Array, Prompts, Refused, Rollout, Task

_FEISTEL_ROUNDS = 8
_GOLDEN = np.uint32(0x9E3779B9)  # 2**32 / golden ratio: spreads the round numbers


def draw(task: Task, key: Array, step: Array | int, rows: int, weights: Array) -> Prompts:
    """The prompts of a step; the data position is `step`, nothing else is remembered.

    Row i of step s has the counter c = s * rows + i. Its source is drawn by `weights`: in every step a source gets
    its share of the rows, rounded up or down at random (systematic sampling), in random order. Its example is
    number shuffled_index(key of the source, c, size of the source). With one source every example is therefore
    visited once per epoch, in an order that differs from epoch to epoch.

    Args:
      task: if it is in the graph, this function is jittable; else it returns numpy arrays.
      key: of the run, the same in every step.
      step: [] int32, from 0; step * rows must stay below 2**32.
      rows: N.
      weights: [S], not negative, not all zero; they need not sum to 1.
    Returns: Prompts with N rows.
    Raises: Refused, if there is not one weight per source.
    """
    source, index = choose(task, key, step, rows, weights)
    return task.at(source, index)


def demonstrations(task: Task, key: Array, step: Array | int, rows: int, weights: Array) -> Rollout:
    """The demonstrations of a step's prompts as rows to learn from: prompt, then target.

    Takes and draws exactly what `draw` does.

    Returns: Rollout with B = rows, L = P + T. Actions are the target's tokens, EOS included; nobody sampled them, so
      their behavior log-probs are NaN. A row is truncated if its target was cut before the EOS. A row
      without a demonstration has no actions.
    """
    source, index = choose(task, key, step, rows, weights)
    return as_rows(task, task.at(source, index), *task.targets(source, index), np.arange(rows, dtype=np.int32))


def played(rows: Rollout) -> Rollout:
    """Rows that nobody played as if an environment had paid nothing: what a reward is tried on before a run."""
    return rows.replace(earned=rows.action_mask.astype(np.float32) * 0)


def as_rows(task: Task, prompts: Prompts, completions: Array, valid: Array, group: Array) -> Rollout:
    """Rows of prompts [B,P] and stored completions [B,T] that nobody sampled. See `demonstrations`.

    Args:
      task: says whether arrays are JAX's or numpy's, and what an EOS is.
      prompts: one per row.
      completions: token ids, padded on the right.
      valid: where they are not padding.
      group: [B] ids in [0, B).
    """
    xp, rows = (jnp if task.in_graph else np), prompts.tokens.shape[0]
    action_mask = xp.pad(valid, ((0, 0), (prompts.tokens.shape[1], 0)))
    last = xp.maximum(valid.sum(axis=1) - 1, 0)
    last_token = xp.take_along_axis(completions, last[:, None], axis=1)[:, 0]
    return Rollout(
        tokens=xp.concatenate([prompts.tokens, completions], axis=1),
        valid=xp.concatenate([prompts.valid, valid], axis=1),
        action_mask=action_mask,
        behavior_log_probs=xp.where(action_mask, xp.float32(np.nan), xp.float32(0)),
        turn=xp.zeros(action_mask.shape, xp.int32),
        role=xp.zeros((rows,), xp.int32),
        group=xp.asarray(group),
        truncated=valid.any(axis=1) & (last_token != task.vocabulary.eos_ids[0]),
        policy_version=xp.zeros((rows,), xp.int32),
    )


def repeat(prompts: Prompts, group_size: int) -> Prompts:
    """One prompt per rollout row: [N] -> [B], B = N * group_size, the rows of prompt 0 first."""
    return jax.tree.map(lambda x: x.repeat(group_size, axis=0), prompts)


def as_drawn(prompts: Prompts, reward_state: Any, task: Task) -> Prompts:
    """The prompts as they are: the identity of Experiment.prompts_fn."""
    del reward_state, task
    return prompts


def first(task: Task, count: int) -> Prompts:
    """The same `count` prompts every time, spread evenly over the sources: for evaluation on held-out tasks.

    Sources take turns, each giving its examples in order; a source that has no more is passed over.

    Raises: Refused, if the task has fewer than `count` prompts.
    """
    total = sum(task.sizes)
    if not 1 <= count <= total:
        raise Refused(f"{count} prompts of {task.name} were asked for, it has {total}: ask for 1 to {total}")
    given = np.zeros(len(task.sizes), int)
    while given.sum() < count:
        open_sources = np.flatnonzero(given < task.sizes)
        left = count - given.sum()
        rounds = min(left // len(open_sources), (np.asarray(task.sizes) - given)[open_sources].min())
        given[open_sources if rounds else open_sources[:left]] += max(rounds, 1)
    index = np.concatenate([np.arange(n) for n in given])
    source = np.repeat(np.arange(len(given)), given)
    order = np.lexsort((source, index))
    return task.at(source[order].astype(np.int32), index[order].astype(np.int32))


def shuffled_index(key: Array, counter: Array, size: Array | int) -> Array:
    """Element c % size of a pseudo-random permutation of range(size); every epoch c // size has its own.

    The permutation is never made: a Feistel network, keyed by fold_in(key, epoch), permutes the numbers of the
    next even count of bits, and is applied again while it leads out of the range (cycle walking; three extra
    times on average at most, for size > 4). It is exact: over an epoch each number appears once.

    Args:
      key: PRNG key.
      counter: [N] integer, 0 <= c < 2**32.
      size: [] or [N] integer, 1 <= size <= 2**31; may be traced.
    Returns: [N] int32.
    """
    return _shuffled_index(key, jnp.asarray(counter, jnp.uint32), jnp.asarray(size, jnp.uint32))


@jax.jit
def _shuffled_index(key: Array, counter: Array, size: Array) -> Array:
    size = jnp.broadcast_to(size, counter.shape)
    epoch, start = counter // size, counter % size
    words = jax.vmap(lambda e: jax.random.bits(jax.random.fold_in(key, e), (2,), jnp.uint32))(epoch)
    half = (33 - lax.clz(jnp.maximum(size - 1, 3))) // 2
    mask = (jnp.uint32(1) << half) - 1

    def exchange(i: Array, halves: tuple[Array, Array]) -> tuple[Array, Array]:
        left, right = halves
        round_key = _mix(words[:, 0] + i.astype(jnp.uint32) * _GOLDEN) ^ words[:, 1]
        return right, left ^ (_mix(right ^ round_key) & mask)

    def walk(state: tuple[Array, Array]) -> tuple[Array, Array]:
        x, outside = state
        left, right = lax.fori_loop(0, _FEISTEL_ROUNDS, exchange, (x >> half, x & mask))
        x = jnp.where(outside, (left << half) | right, x)
        return x, x >= size

    inside, _ = lax.while_loop(lambda state: jnp.any(state[1]), walk, (start, start >= 0))
    return inside.astype(jnp.int32)


def _mix(x: Array) -> Array:
    """MurmurHash3's finalizer: every input bit reaches every output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def choose(task: Task, key: Array, step: Array | int, rows: int, weights: Array) -> tuple[Array, Array]:
    """(source [N], index [N]) of a step, as `draw` takes them; numpy arrays for a task outside of the graph."""
    if np.shape(weights) != (len(task.sources),):
        raise Refused(f"{task.name} has {len(task.sources)} sources ({', '.join(task.sources)}): the sampling weights "
                      f"must be one number for each, got shape {list(np.shape(weights))}")  # fmt: skip
    source, index = _source_and_index(tuple(task.sizes), key, jnp.asarray(step, jnp.uint32), rows, weights)
    return (source, index) if task.in_graph else (np.asarray(source), np.asarray(index))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _source_and_index(sizes: tuple[int, ...], key: Array, step: Array, rows: int, weights: Array):
    # A branch of its own: the run's key also feeds the sampler and the update (mlrl.loops.online.step_key).
    key = jax.random.fold_in(key, 0x70726F6D)
    order_key, keys = jax.random.fold_in(key, 0), jax.random.split(jax.random.fold_in(key, 1), len(sizes))
    counter = step * jnp.uint32(rows) + jnp.arange(rows, dtype=jnp.uint32)
    if len(sizes) == 1:
        return jnp.zeros((rows,), jnp.int32), shuffled_index(keys[0], counter, sizes[0])
    offset_key, permutation_key = jax.random.split(jax.random.fold_in(order_key, step))
    total = jnp.cumsum(jnp.asarray(weights, jnp.float32))
    points = (jnp.arange(rows) + jax.random.uniform(offset_key)) / rows * total[-1]
    last = jnp.max(jnp.where(jnp.asarray(weights) > 0, jnp.arange(len(sizes)), 0))
    source = jnp.minimum(jnp.searchsorted(total, points, side="right"), last).astype(jnp.int32)
    source = jax.random.permutation(permutation_key, source)
    index = jax.vmap(shuffled_index, in_axes=(0, None, 0))(keys, counter, jnp.asarray(sizes, jnp.uint32))
    return source, jnp.take_along_axis(index, source[None], axis=0)[0]
