"""Dynamic sampling: prompts whose rows teach nothing are exchanged for new ones, within a step.

A step holds N groups. After a draw, the groups of which `refill_fn` keeps no row make room for those of the next draw
of N prompts; draws end when every place is taken or after `max_attempts`. Places that are still not taken keep their
last rows, so that shapes are fixed: name the same function as `select_fn` to leave them out of the loss. Rows that
were sampled and are not in the step are discarded, and counted.

Reference: Yu et al. 2025, "DAPO", which samples until the batch is full, without a bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mlrl.batches import unannotated
from mlrl.types import Array, Metrics, Prompts, Rewards, Rollout, SelectFn

AttemptFn = Callable[..., tuple[Prompts, Rollout, Rewards, Any]]  # (number, reward state) -> rows, reward state
Rows = tuple[Prompts, Rollout, Rewards]


class Counts(NamedTuple):
    """What was sampled so far: draws, rows that were exchanged, and the tokens sampled."""

    attempts: Array
    discarded_rows: Array
    tokens: Array


def in_graph(parts: Any, attempt: AttemptFn, reward_state: Any) -> tuple[Rows, Any, Metrics]:
    """The rows of a step, the reward's next state and counts, all in the graph; attempt(number, reward_state)."""
    *rows, reward_state = attempt(0, reward_state)
    experiment = parts.experiment
    if experiment.max_attempts == 1:
        return tuple(rows), reward_state, {}

    def unfilled(carry: tuple) -> Array:
        rows, _, counts = carry
        return (counts.attempts < experiment.max_attempts) & ~jnp.all(taken(rows, experiment.refill_fn))

    def draw(carry: tuple) -> tuple:
        rows, reward_state, counts = carry
        *new, reward_state = attempt(counts.attempts, reward_state)
        rows, counts = _exchanged(rows, tuple(new), counts, experiment.refill_fn)
        return rows, reward_state, counts

    rows, reward_state, counts = jax.lax.while_loop(unfilled, draw, (tuple(rows), reward_state, _first(rows)))
    return rows, reward_state, _metrics(rows, counts, experiment.refill_fn)


def on_host(parts: Any, attempt: AttemptFn, reward_state: Any) -> tuple[Rows, Any, Metrics]:
    """The same with a task or a reward on the host: attempts are made from Python."""
    *rows, reward_state = attempt(0, reward_state)
    experiment = parts.experiment
    if experiment.max_attempts == 1:
        return tuple(rows), reward_state, {}
    rows, counts = tuple(jax.tree.map(jnp.asarray, rows)), _first(rows)
    for number in range(1, experiment.max_attempts):
        if bool(jnp.all(taken(rows, experiment.refill_fn))):
            break
        *new, reward_state = attempt(number, reward_state)
        rows, counts = _exchange(rows, tuple(new), counts, experiment.refill_fn)
    return rows, reward_state, _metrics(rows, counts, experiment.refill_fn)


def taken(rows: Rows, refill_fn: SelectFn) -> Array:
    """Which of the N places hold a group with at least one row that `refill_fn` keeps: [N] bool."""
    prompts, rollout, rewards = rows
    kept = refill_fn(unannotated(rollout, rewards))
    return kept.reshape(prompts.tokens.shape[0], -1).any(axis=1)


def _exchanged(old: Rows, new: Rows, counts: Counts, refill_fn: SelectFn) -> tuple[Rows, Counts]:
    """N places out of 2 N groups: old ones that are taken, then new ones that would be, then the rest of the old."""
    places = old[0].tokens.shape[0]
    good = jnp.concatenate([taken(old, refill_fn), taken(new, refill_fn)])
    chosen = jnp.sort(jnp.argsort(~good, stable=True)[:places])

    def pick(a: Array, b: Array) -> Array:
        grouped = [x.reshape(places, -1, *x.shape[1:]) for x in (jnp.asarray(a), jnp.asarray(b))]
        return jnp.concatenate(grouped)[chosen].reshape(a.shape)

    prompts, rollout, rewards = jax.tree.map(pick, old, new)
    group_size = rollout.group.shape[0] // places
    group = jnp.repeat(jnp.arange(places, dtype=rollout.group.dtype), group_size)
    counts = Counts(counts.attempts + 1, counts.discarded_rows + new[1].group.shape[0], counts.tokens + _tokens(new[1]))
    return (prompts, rollout.replace(group=group), rewards), counts


_exchange = jax.jit(_exchanged, static_argnums=3)


def _tokens(rollout: Rollout) -> Array:
    return jnp.sum(rollout.action_mask, dtype=jnp.int32)


def _first(rows: Any) -> Counts:
    return Counts(jnp.int32(1), jnp.int32(0), _tokens(rows[1]))


def _metrics(rows: Rows, counts: Counts, refill_fn: SelectFn) -> Metrics:
    """Draws made, rows and tokens that were sampled for nothing, and the share of places that are taken."""
    return {
        "refill/attempts": counts.attempts.astype(jnp.float32),
        "refill/discarded_rows": counts.discarded_rows.astype(jnp.float32),
        "refill/discarded_tokens": (counts.tokens - _tokens(rows[1])).astype(jnp.float32),
        "refill/filled_share": jnp.mean(taken(rows, refill_fn).astype(jnp.float32)),
    }
