"""Credit through time: what an action is worth, from the rewards that follow it.

Time is counted in actions: slots outside the mask (observations, padding) take no discount step and have no value.
A reward that sits on such a slot belongs to the last action before it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mlrl.types import Array


def gae(
    rewards: Array,
    values: Array,
    mask: Array,
    *,
    discount: float = 1.0,
    gae_lambda: float | Array = 0.95,
    bootstrap: float | Array = 0.0,
) -> tuple[Array, Array]:
    """Generalized advantage estimation over the actions of each row.

    delta_k = r_k + discount V_{k+1} - V_k,  A_k = delta_k + discount gae_lambda A_{k+1},  return_k = A_k + V_k,
    where k counts actions, r_k holds all rewards from action k up to the next, and V after the last is `bootstrap`.
    Advantages are not whitened.

    Args:
        rewards: [B,L], finite everywhere; a reward before a row's first action is no action's.
        values: [B,L] estimates before each action; read only inside the mask.
        mask: [B,L] bool, the actions.
        discount: per action.
        gae_lambda: a number, or one per row [B].
        bootstrap: value after the last action, a number or one per row [B]; 0 if the episode ended there.

    Returns:
        (advantages [B,L], returns [B,L]), both 0 outside the mask.

    Reference: Schulman et al. 2015, "High-Dimensional Continuous Control Using GAE".
    """
    b = mask.shape[0]
    values = jnp.where(mask, values, 0.0)

    def step(carry, column):
        advantage, following, pending = carry
        reward, value, acts = column
        reward = reward + pending
        here = reward + discount * following - value + discount * gae_lambda * advantage
        carry = (jnp.where(acts, here, advantage), jnp.where(acts, value, following), jnp.where(acts, 0.0, reward))
        return carry, jnp.where(acts, here, 0.0)

    zeros = jnp.zeros(b, jnp.float32)
    start = (zeros, jnp.broadcast_to(jnp.asarray(bootstrap, jnp.float32), (b,)), zeros)
    columns = (rewards.astype(jnp.float32).T, values.astype(jnp.float32).T, mask.T)
    _, advantages = jax.lax.scan(step, start, columns, reverse=True)
    return advantages.T, jnp.where(mask, advantages.T + values, 0.0)


def reward_to_go(rewards: Array, mask: Array, *, discount: float = 1.0) -> Array:
    """Discounted sum of rewards from each action on: G_k = r_k + discount G_{k+1}.

    Args:
        rewards: [B,L], finite everywhere.
        mask: [B,L] bool, the actions.
        discount: per action.

    Returns:
        [B,L], 0 outside the mask.
    """
    return gae(rewards, jnp.zeros_like(rewards), mask, discount=discount, gae_lambda=1.0)[0]


def length_adaptive_lambda(mask: Array, *, alpha: float = 0.05) -> Array:
    """One lambda per row, nearer to 1 the longer it is: 1 - 1 / (alpha n), at least 0, for n actions.

    Args:
        mask: [B,L] bool.
        alpha: dimensionless.

    Returns:
        [B] float32.

    Reference: Yue et al. 2025, "VAPO".
    """
    n = mask.sum(axis=1).astype(jnp.float32)
    return jnp.maximum(0.0, 1.0 - 1.0 / jnp.maximum(alpha * n, 1e-6))


# Macro actions: several tokens judged as one decision.


def count_before(mask: Array) -> Array:
    """How many actions lie before each slot of its row: [B,L] bool -> [B,L] int32 in [0, L)."""
    return jnp.cumsum(mask, axis=1, dtype=jnp.int32) - mask.astype(jnp.int32)


def chunks_from(begins: Array, mask: Array) -> Array:
    """Numbers the chunk that each slot lies in, given the actions at which one begins.

    Slots that are no actions belong to the chunk of the action before them; those before the first, to the first.

    Args:
        begins: [B,L] bool; read only inside the mask. A row's first action begins a chunk in any case.
        mask: [B,L] bool, the actions.

    Returns:
        [B,L] int32, from 0.
    """
    first = jnp.cumsum(mask, axis=1) == 1
    return jnp.maximum(jnp.cumsum((begins | first) & mask, axis=1, dtype=jnp.int32) - 1, 0)


def chunk_sum(x: Array, mask: Array, chunk: Array) -> Array:
    """Sum of x over the slots of each chunk: [B,L] -> [B,L] indexed by chunk. The mask is not used."""
    del mask
    return jax.vmap(lambda v, i: jax.ops.segment_sum(v, i, num_segments=v.shape[0]))(x, chunk)


def chunk_mean(x: Array, mask: Array, chunk: Array) -> Array:
    """Mean of x over the actions of each chunk (rewards on other slots are added in): [B,L] -> [B,L] by chunk."""
    n = chunk_sum(mask.astype(jnp.float32), mask, chunk)
    return chunk_sum(x, mask, chunk) / jnp.maximum(n, 1.0)


def chunk_first(x: Array, mask: Array, chunk: Array) -> Array:
    """x at the first action of each chunk, that is in the state in which the decision is taken: [B,L] by chunk."""
    return chunk_sum(jnp.where(begins_of(mask, chunk), x, 0.0), mask, chunk)


def chunk_last(x: Array, mask: Array, chunk: Array) -> Array:
    """x at the last action of each chunk: [B,L] -> [B,L] by chunk."""
    ends = begins_of(mask[:, ::-1], chunk[:, ::-1])[:, ::-1]
    return chunk_sum(jnp.where(ends, x, 0.0), mask, chunk)


def begins_of(mask: Array, chunk: Array) -> Array:
    """The first action of each chunk: [B,L] bool. The chunk numbers may rise or fall along the row."""
    at = jnp.where(mask, jnp.arange(mask.shape[1]), -1)
    last = jax.lax.cummax(jnp.pad(at[:, :-1], ((0, 0), (1, 0)), constant_values=-1), axis=1)
    before = jnp.take_along_axis(chunk, jnp.maximum(last, 0), axis=1)
    return mask & ((last < 0) | (before != chunk))


def macro_gae(
    rewards: Array,
    values: Array,
    mask: Array,
    chunk: Array,
    *,
    discount: float = 1.0,
    gae_lambda: float = 0.95,
    bootstrap: float | Array = 0.0,
    reward_of: Callable[..., Array] = chunk_sum,
    value_of: Callable[..., Array] = chunk_mean,
) -> tuple[Array, Array]:
    """GAE over chunks of actions: every token of a chunk gets the chunk's advantage and return.

    R_k = reward_of(r in k), V_k = value_of(V in k), delta_k = R_k + discount V_{k+1} - V_k, A_k = delta_k + discount
    gae_lambda A_{k+1}, return_k = A_k + V_k. With chunk = the turn of each token this is turn-level GAE; with chunks
    of one token it is `gae`; with one chunk a row it is R - V, a bandit's. The state in which chunk k is decided is
    that of its first action; the authors value it by the mean of V over the chunk's actions, whose later ones have
    seen what the chunk did.

    Args:
        rewards: [B,L], finite everywhere.
        values: [B,L]; read only inside the mask.
        mask: [B,L] bool, the actions.
        chunk: [B,L] int32 in [0, L), never falling along a row.
        discount: per chunk.
        gae_lambda: per chunk.
        bootstrap: value after the last chunk, a number or [B].
        reward_of: chunk_sum, or chunk_mean as in the authors' code (it dilutes a per-token KL by the chunk length).
        value_of: chunk_mean ("equal" in the authors' code), chunk_last ("unit") or chunk_first.

    Returns:
        (advantages [B,L], returns [B,L]), both 0 outside the mask. A reward before a row's first action is no action's.

    Reference: Chai et al. 2024, "MA-RLHF". Left out: values weighted by 1 / position in the chunk ("position").
    """
    rewards = jnp.where(jnp.cumsum(mask, axis=1) > 0, rewards, 0.0)
    present = chunk_sum(mask.astype(jnp.float32), mask, chunk) > 0
    advantages, returns = gae(
        reward_of(rewards, mask, chunk),
        value_of(jnp.where(mask, values, 0.0), mask, chunk),
        present,
        discount=discount,
        gae_lambda=gae_lambda,
        bootstrap=bootstrap,
    )
    at = lambda x: jnp.where(mask, jnp.take_along_axis(x, chunk, axis=1), 0.0)
    return at(advantages), at(returns)
