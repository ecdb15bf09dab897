"""Generation in a fixed number of slots: as rows end, waiting rows take their places, inside one jittable function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mlrl import generation, meshes
from mlrl.models.attention import Cache, columnwise
from mlrl.models.transformer import Transformer, empty_caches
from mlrl.sampling import Sampling
from mlrl.scoring import Prefix, prefill
from mlrl.types import Array, Params, Prompts, Refused, Rollout, require_whole


def refilled(
    model: Transformer,
    params: Params,
    prompts: Prompts,
    key: Array,
    *,
    max_completion_tokens: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    group_size: int = 1,
    sampling: Sampling = Sampling(),
    policy_version: Array | int = 0,
    slots: int = 64,
    check_every_steps: int = 8,
) -> Rollout:
    """Samples what `generation.generate` samples, with at most `slots` rows in decoding: continuous batching.

    Every prompt is prefilled once, into a store. After every `check_every_steps` (k) steps the rows that have ended
    leave their slots, and the next rows, in order, enter: their prompt's keys and values are copied from the store. B
    rows of lengths l_b take about sum_b (l_b + k / 2) / slots steps, and then those of the row that ends last; by
    `generate`, `slots` rows at a time, they take the sum of each batch's longest.

    Memory is the columns of N prompts and the caches of `slots` rows. With no more rows than slots nothing waits: this
    is then `generate`.

    Args:
      prompts, ..., policy_version: as for `generate`; the randomness of row b at step t is fold_in(fold_in(key, b), t).
      slots: S, how many rows are decoded at a time; a mesh splits them as rows.
      check_every_steps: k, decode steps between two looks at which rows have ended.
    Returns: Rollout, as `generate`'s: the same tokens, log-probs to rounding, in the order of the prompts.
    Raises: Refused, if the slots do not hold a group, or do not divide over the devices.
    Reference: Yu et al. 2022, Orca (iteration-level scheduling).
    """
    require_whole("refilled", "max_completion_tokens", max_completion_tokens, 1)
    require_whole("refilled", "check_every_steps", check_every_steps, 1)
    _check_slots(slots, group_size)
    rows, steps = prompts.tokens.shape[0] * group_size, max_completion_tokens
    if rows <= slots:
        return generation.generate(
            model, params, prompts, key, max_completion_tokens=steps, eos_ids=eos_ids, pad_id=pad_id,
            group_size=group_size, sampling=sampling, policy_version=policy_version,
        )  # fmt: skip
    store = prefill(model, params, prompts)
    # Windows count back along the columns, so these must then be in the order of time; see `_turned`.
    turned_steps = check_every_steps if any(model.config.windows) else 0
    choose = generation.chooser(model, params, key, sampling, eos_ids)
    decode = _decoder(model, params, prompts, choose, steps, ring=steps + turned_steps)

    def turn(carry):
        """Rows enter; k steps; what they made is written to the results."""
        held, waiting, results = carry
        held, waiting = _enter(held, waiting, rows, group_size, store)
        first = held.t
        held, made = lax.scan(decode, held, length=check_every_steps)
        return _turned(held, turned_steps, ring=steps + turned_steps), waiting, _written(results, held, first, made)

    unfinished = lambda carry: jnp.any(carry[0].live) | (carry[1] < rows)  # noqa: E731
    held = _turned(_empty(model, slots, steps + turned_steps, store), turned_steps, ring=steps + turned_steps)
    start = (held, jnp.int32(0), _nothing(rows, steps, pad_id))
    *_, results = lax.while_loop(unfinished, turn, start)
    return generation.as_rollout(prompts, *results[:3], ended=results.ended, policy_version=policy_version)


class Slots(NamedTuple):
    """What the slots hold between steps.

    row     [S]    the row that is decoded, or was the last to be; B and more: none
    prompt  [S]    its prompt
    t       [S]    how many tokens of it there are
    live    [S]    whether it goes on
    hidden  [S,D]  the state in which its next token is chosen
    caches         keys and values: its prompt's columns, then the ring of completions'
    column  []     of the ring, where the next token of every slot is written
    """

    row: Array
    prompt: Array
    t: Array
    live: Array
    hidden: Array
    caches: tuple[Cache, ...]
    column: Array


class Made(NamedTuple):
    """What slots made in k steps, each [k,S]; `live` is whether the row was going on, `ended` whether it then ended."""

    token: Array
    log_prob: Array
    live: Array
    ended: Array


class Results(NamedTuple):
    """Completions in the order of rows: tokens, log_probs [B,T]; lengths, ended (by an EOS) [B]."""

    tokens: Array
    log_probs: Array
    lengths: Array
    ended: Array


def _check_slots(slots: int, group_size: int) -> None:
    require_whole("refilled", "slots", slots, 1)
    if slots < group_size:
        raise Refused(f"refilled.slots is {slots}, but a group has {group_size} rows: set it to {group_size} or more")
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else meshes.row_shards(mesh)
    if slots % shards:
        raise Refused(f"refilled.slots is {slots}, which does not divide over the {shards} devices that rows are split "
                      f"over: set it to a multiple of {shards}")  # fmt: skip


def _empty(model: Transformer, slots: int, ring: int, store: Prefix) -> Slots:
    """Slots that all are free."""
    none, width = jnp.zeros((slots,), jnp.int32), store.caches[0][0].shape[3]
    hidden = jnp.zeros((slots, *store.last.shape[1:]), store.last.dtype)
    return Slots(row=none, prompt=none, t=none, live=none > 0, hidden=hidden,
                 caches=empty_caches(model.config, slots, width + ring), column=jnp.int32(0))  # fmt: skip


def _nothing(rows: int, steps: int, pad_id: int) -> Results:
    return Results(
        tokens=jnp.full((rows, steps), pad_id, jnp.int32), log_probs=jnp.zeros((rows, steps), jnp.float32),
        lengths=jnp.zeros((rows,), jnp.int32), ended=jnp.zeros((rows,), bool),
    )  # fmt: skip


def _enter(held: Slots, waiting: Array, rows: int, group_size: int, store: Prefix) -> tuple[Slots, Array]:
    """Gives free slots the next rows, of which `waiting` is the first; and which is the first that waits now."""
    free = ~held.live
    row = jnp.where(free, waiting + jnp.cumsum(free, dtype=jnp.int32) - 1, held.row)
    prompt = jnp.minimum(row, rows - 1) // group_size
    entering = jnp.where(free, jnp.arange(free.size), free.size)  # past the last slot: nothing is written
    caches = jax.tree.map(
        lambda cache, x: cache.at[entering, :, : x.shape[2], : x.shape[3]].set(x[prompt], mode="drop"),
        held.caches, store.caches,
    )  # fmt: skip
    hidden = jnp.where(free[:, None], store.last[prompt], held.hidden)
    entered = held._replace(row=row, prompt=prompt, t=jnp.where(free, 0, held.t), live=row < rows, hidden=hidden,
                            caches=caches)  # fmt: skip
    return entered, waiting + jnp.sum(free, dtype=jnp.int32)


def _decoder(model: Transformer, params: Params, prompts: Prompts, choose: Callable, steps: int, *,
             ring: int) -> Callable[[Slots, Any], tuple[Slots, Made]]:  # fmt: skip
    """One step of every slot, as `lax.scan` takes it.

    The rows of slots are at different steps t, but write to the same column of a ring. A row looks at the last t + 1
    columns, its own tokens; what is older was written by rows before it, and a row never lives for a whole ring.
    """
    width, lengths = prompts.tokens.shape[1], jnp.sum(prompts.valid, axis=1, dtype=jnp.int32)

    def decode(held: Slots, _: Any) -> tuple[Slots, Made]:
        token, log_prob, ended = choose(held.hidden, held.row, held.t)
        age = (held.column - jnp.arange(ring)) % ring
        seen = jnp.concatenate([prompts.valid[held.prompt], age[None] <= held.t[:, None]], axis=1)
        # Of a row that is over, positions stay within those of `generate`: a table of learned ones may end there, and
        # what is read behind it is NaN, which no mask keeps from the slot's next row.
        positions = lengths[held.prompt] + jnp.minimum(held.t, steps - 1)
        args = (token[:, None], positions[:, None], seen[:, None], held.caches, width + held.column)
        hidden, caches = model.apply({"params": params}, *args)
        t = held.t + held.live
        after = held._replace(t=t, live=held.live & ~ended & (t < steps), hidden=hidden[:, 0], caches=caches,
                              column=(held.column + 1) % ring)  # fmt: skip
        return after, Made(token, log_prob, live=held.live, ended=held.live & ended)

    return decode


def _turned(held: Slots, columns: int, *, ring: int) -> Slots:
    """The ring turned back by `columns`: the next as many writes then go to its end, behind all that is there."""
    if not columns:
        return held

    def turned(x: Array, axis: int) -> Array:
        prompt, own = jnp.split(x, [x.shape[axis] - ring], axis=axis)
        return jnp.concatenate([prompt, jnp.roll(own, -columns, axis=axis)], axis=axis)

    caches = tuple(columnwise(turned, cache) for cache in held.caches)
    return held._replace(caches=caches, column=(held.column - columns) % ring)


def _written(results: Results, held: Slots, first: Array, made: Made) -> Results:
    """Results with what was made in slots whose rows had `first` tokens before; slots without a row write nothing."""
    steps = results.tokens.shape[1]
    column = first[None] + jnp.arange(made.token.shape[0])[:, None]
    at = (jnp.broadcast_to(held.row, column.shape), jnp.where(made.live, column, steps))
    return Results(
        tokens=results.tokens.at[at].set(made.token, mode="drop"),
        log_probs=results.log_probs.at[at].set(made.log_prob, mode="drop"),
        lengths=results.lengths.at[held.row].set(held.t, mode="drop"),
        ended=results.ended.at[held.row].set(jnp.any(made.ended, axis=0), mode="drop"),
    )
