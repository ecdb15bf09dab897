"""Terminations: where one macro action ends and the next begins, as functions batch -> chunk numbers [B,L].

Chunks hold actions only: whatever the function, a chunk ends where the turn changes and where the row has a slot that
is no action (an observation, a token that was given). Slots that are no actions carry the number of the chunk before
them, which `returns.macro_gae` needs to give it their rewards. Each function reads a row alone, by counting its
actions, so padding, the order of rows and the size of a minibatch change nothing: a loss may call it again.

Reference: Chai et al. 2024, "MA-RLHF". Their code reads the boundaries of row 0 for the whole batch; here every row has
its own. Left out: their parser of program text; `after_tokens` is given the tokens that close a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from mlrl import returns as along
from mlrl.types import Array, Batch, Refused, Vocabulary, require_whole

Termination = Callable[[Batch], Array]  # batch -> [B,L] int32 in [0, L), never falling along a row


def single_tokens(batch: Batch) -> Array:
    """Every action is a chunk: `macro_gae` is then `gae`."""
    return _chunks(batch, jnp.ones_like(batch.mask))


def whole_sequence(batch: Batch) -> Array:
    """A row's uninterrupted run of actions is one chunk; with a single turn the row is a bandit's one decision."""
    return _chunks(batch, jnp.zeros_like(batch.mask))


def turns(batch: Batch) -> Array:
    """Macro actions that are turns, whatever lies between the actions of a turn."""
    return batch.rollout.turn


def fixed_chunks(batch: Batch, *, tokens: int = 5) -> Array:
    """Chunks of so many actions, counted from the start of each run of actions; the last of a run may be shorter.

    Raises: Refused, unless tokens is a whole number of at least 1.
    """
    require_whole("fixed_chunks", "tokens", tokens, 1)
    index = along.count_before(batch.mask)
    first = jax.lax.cummax(jnp.where(_interrupted(batch), index, 0), axis=1)
    return _chunks(batch, (index - first) % tokens == 0)


def random_chunks(batch: Batch, *, lengths: Sequence[int] = (1, 2, 3, 5, 10), seed: int = 0) -> Array:
    """Chunks whose lengths are drawn from `lengths`, each as likely as the others and independent of those before.

    The draw is a function of seed, policy_version and the row's own actions: it differs between steps, and between
    different completions, and is the same whenever the row is seen again. The authors shuffle a list that holds each
    length equally often, and what is left of the row when it is used up is one chunk.

    Raises: Refused, unless there are lengths, all whole numbers of at least 1.
    """
    for length in lengths or (0,):
        require_whole("random_chunks", "lengths", length, 1)
    columns = batch.mask.shape[1]
    index = along.count_before(batch.mask)
    mixed = (batch.rollout.tokens.astype(jnp.uint32) + 1) * _scrambled(index.astype(jnp.uint32) + 1)
    name = jnp.where(batch.mask, mixed, 0).sum(axis=1, dtype=jnp.uint32)

    def ends(version: Array, name: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), version), name)
        drawn = jax.vmap(lambda i: jax.random.randint(jax.random.fold_in(key, i), (), 0, len(lengths)))
        sums = jnp.cumsum(jnp.asarray(lengths)[drawn(jnp.arange(columns))])
        return jnp.zeros(columns, bool).at[sums].set(True, mode="drop")

    begins = jax.vmap(ends)(batch.rollout.policy_version, name)
    return _chunks(batch, jnp.take_along_axis(begins, index, axis=1))


def after_tokens(batch: Batch, *, ids: Sequence[int]) -> Array:
    """A chunk ends with a token of `ids`, such as a space or an operator; several of these in a row end it together.

    Args:
        batch: reads rollout.tokens.
        ids: of the tokens, such as `spelled`(vocabulary, text=" ,;") gives.

    Raises: Refused, without any.
    """
    if not len(ids):
        raise Refused("after_tokens.ids is empty: name the tokens that end a chunk, or choose whole_sequence")
    closes = jnp.isin(batch.rollout.tokens, jnp.asarray(ids))
    return _chunks(batch, _before(closes) & ~closes)


def spelled(vocabulary: Vocabulary, *, text: str) -> tuple[int, ...]:
    """Ids of the tokens that spell `text`: for `after_tokens`, where each boundary is a token."""
    return tuple(vocabulary.encode(text))


def old_log_probs(batch: Batch) -> Array:
    """How likely the policy found each action before the update."""
    return batch.old_log_probs


def reference_log_probs(batch: Batch) -> Array:
    """How likely the reference found each action, as in the authors' code; costs a forward pass of the reference."""
    return batch.reference_log_probs


def rising_perplexity(
    batch: Batch, *, log_probs_of: Callable[[Batch], Array] = old_log_probs, margin: float = 0.0
) -> Array:
    """A chunk begins at an action less likely than the one before it: log p_t < log p_{t-1} - margin.

    Args:
        batch: reads what log_probs_of reads.
        log_probs_of: old_log_probs or reference_log_probs.
        margin: in nats; 0 cuts at every rise of the token's perplexity exp(-log p_t), as the authors do.
    """
    log_probs = jnp.where(batch.mask, log_probs_of(batch), 0.0)
    return _chunks(batch, log_probs < _before(log_probs) - margin)


def last_apart(batch: Batch, *, termination: Termination = fixed_chunks) -> Array:
    """The last action of a row is a chunk of its own, and the others are as `termination` says.

    The authors do this, since they average rewards in a chunk (`returns.chunk_mean`), which would dilute an outcome.
    """
    columns = jnp.arange(batch.mask.shape[1])
    last = jnp.max(jnp.where(batch.mask, columns, -1), axis=1, keepdims=True)
    chunk = termination(batch)
    return _chunks(batch, (chunk != _before(chunk)) | (columns == last))


def _chunks(batch: Batch, begins: Array) -> Array:
    return along.chunks_from(begins | _interrupted(batch), batch.mask)


def _interrupted(batch: Batch) -> Array:
    """Where a run of actions begins: the slot before is no action, or belongs to another turn."""
    turn = batch.rollout.turn
    return ~_before(batch.mask) | (turn != _before(turn))


def _before(x: Array) -> Array:
    """Each column's left neighbour; zero (False) in the first."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))


def _scrambled(x: Array) -> Array:
    """An odd-multiplier hash of uint32, so that an action's place counts."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x45D9F3B)
    return (x ^ (x >> 16)) | 1
