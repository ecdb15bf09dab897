"""Compared completions that are computed instead of stored: the right answer beside one that was spoiled."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mlrl.tasks import symbols as s
from mlrl.types import Array, Candidates, Refused, Task


def against_corrupted(task: Task, *, separator: str = "", seed: int = 0, name: str = "") -> Task:
    """The same prompts with two candidates each: the demonstration (outcome 1), and it with one digit changed (0).

    Which digit is changed, and to which other, depends only on (source, index, seed). The steps of a completion end
    before each separator and before the EOS: those tokens carry the labels, 1 up to the step that was spoiled and 0
    from there on. What follows the spoiled step is left as it was, not computed on from the error.

    Args:
      task: in the graph; answers with a digit, of which every other number is wrong, as of puzzles.arithmetic.
      separator: the symbol between steps, such as "," in running totals (scratchpad=True); "": one step.
      seed: of the changes.
      name: in the logs; by default the task's with "_pairs".
    Returns: the task with candidates, C = 2; a demonstration without a digit has no second one.
    Raises: Refused, if the task is on the host or a digit is not one token.
    """
    if not task.in_graph:
        raise Refused(f"pairs.against_corrupted needs a task in the graph, such as puzzles.arithmetic, got {task.name}")
    vocabulary = task.vocabulary
    ids = jnp.asarray(s.token_ids(vocabulary, "0123456789" + separator))
    digit_ids = ids[:10]
    ends_step = jnp.asarray([vocabulary.eos_ids[0], *(ids[s.ALPHABET.index(c)] for c in separator)])

    def candidates(source: Array, index: Array) -> Candidates:
        tokens, valid = task.targets(source, index)
        keys = jax.vmap(_key, (None, 0, 0))(seed, source, index)
        other, changed = one_digit_changed(keys, tokens, valid, digit_ids)
        spoiled = changed.any(axis=1, keepdims=True)
        ends = valid & (tokens[..., None] == ends_step).any(axis=-1)
        still_right = (jnp.cumsum(changed, axis=1) == 0).astype(jnp.float32)
        labels = [jnp.where(ends, 1.0, jnp.nan), jnp.where(ends & spoiled, still_right, jnp.nan)]
        outcome = [jnp.ones(len(tokens)), jnp.where(spoiled[:, 0], 0.0, jnp.nan)]
        return Candidates(
            tokens=jnp.stack([tokens, other], axis=1),
            valid=jnp.stack([valid, valid & spoiled], axis=1),
            outcome=jnp.stack(outcome, axis=1).astype(jnp.float32),
            labels=jnp.stack(labels, axis=1).astype(jnp.float32),
        )

    return dataclasses.replace(task, name=name or f"{task.name}_pairs", candidates=jax.jit(candidates))


def one_digit_changed(keys: Array, tokens: Array, valid: Array, digit_ids: Array) -> tuple[Array, Array]:
    """Rows with one of their digits, drawn at random, turned into another: (tokens [B,T], changed [B,T] bool).

    Args:
      keys: [B] PRNG keys.
      tokens: [B,T]; a row without a digit stays as it is.
      valid: [B,T] bool, where they may be changed.
      digit_ids: [10] the token ids of 0 to 9.
    """
    is_one = (tokens[..., None] == digit_ids) & valid[..., None]
    place, shift = jax.vmap(_choice)(keys, is_one.any(axis=-1))
    changed = (jnp.arange(tokens.shape[1]) == place[:, None]) & is_one.any(axis=-1)
    other = digit_ids[(jnp.argmax(is_one, axis=-1) + shift[:, None]) % 10]
    return jnp.where(changed, other, tokens), changed


def _key(seed: int, source: Array, index: Array) -> Array:
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, source), index)


def _choice(key: Array, digits: Array) -> tuple[Array, Array]:
    """(column of a digit, how far it is moved, 1 to 9), from a mask of digits [T]."""
    place_key, shift_key = jax.random.split(key)
    place = jnp.argmax(jnp.where(digits, jax.random.uniform(place_key, digits.shape), -1.0))
    return place, jax.random.randint(shift_key, (), 1, 10)
