"""What rollouts of several turns share: reading what is new, columns of a turn, and packing rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mlrl.models.attention import Cache
from mlrl.models.transformer import Transformer
from mlrl.types import Array, Params, Prompts, Refused, Rollout

ENVIRONMENT = 0x656E7669  # a branch of the rollout's key; rows have the numbers below


def read(model: Transformer, params: Params, caches: tuple[Cache, ...], last: Array, tokens: Array, count: Array, *,
         seen: Array, lengths: Array, column: Array) -> tuple[Array, tuple[Cache, ...], Array]:  # fmt: skip
    """Rows read what is new to them in one chunk of 1 + O columns: their own last token, then an observation.

    The last token of a row is read here because `generation.decode` may not have read it, or not in the column where
    other rows have theirs; where it stood before must not be in `seen`.

    Args:
      caches: of M columns.
      last: [B] the last token before, of a prompt or of the row's own.
      tokens: [B,O], of which the first `count` [B] are real.
      seen: [B,M] bool, the columns of all tokens before `last`.
      lengths: [B] how many tokens each row has, `last` included.
      column: where the chunk is written.
    Returns: the hidden state after the last real token [B,D], the caches, and seen with what was read.
    """
    width = 1 + tokens.shape[1]
    chunk = jnp.concatenate([last[:, None], tokens], axis=1)
    real = jnp.arange(width)[None] <= count[:, None]
    placed = lax.dynamic_update_slice(jnp.zeros_like(seen), real, (0, column))
    up_to = jnp.arange(seen.shape[1])[None, None] <= (column + jnp.arange(width))[None, :, None]
    mask = (seen | placed)[:, None] & up_to
    positions = (lengths - 1)[:, None] + jnp.minimum(jnp.arange(width)[None], count[:, None])
    hidden, caches = model.apply({"params": params}, chunk, positions, mask, caches, column)
    after = jnp.take_along_axis(hidden, count[:, None, None], axis=1)[:, 0]
    return after, caches, seen | placed


class Columns(NamedTuple):
    """Columns of rows, turn after turn, with holes where a turn did not fill its share: each [B,W].

    tokens, valid, action_mask, log_probs, turn, earned: as the fields of a Rollout.
    """

    tokens: Array
    valid: Array
    action_mask: Array
    log_probs: Array
    turn: Array
    earned: Array


def no_columns(rows: int, width: int, pad_id: int) -> Columns:
    """Columns in which nothing stands yet."""
    zeros, no = jnp.zeros((rows, width), jnp.float32), jnp.zeros((rows, width), bool)
    tokens = jnp.full((rows, width), pad_id, jnp.int32)
    return Columns(tokens, no, no, zeros, jnp.zeros_like(tokens), zeros)


def put(columns: Columns, at: Array, tokens: Array, lengths: Array, *, turn: Array, log_probs: Array | None = None,
        earned: Array | float = 0.0, acted: Array | bool = True) -> Columns:  # fmt: skip
    """Columns with `tokens` [B,T] from column `at` on, of which the first `lengths` [B] are real.

    Args:
      turn: [B] or a number.
      log_probs: [B,T] of actions, or None for an observation.
      earned: [B], placed at the last real token.
      acted: [B] bool, rows whose tokens are actions where there are log-probs.
    """
    rows, width = tokens.shape
    valid = jnp.arange(width)[None] < lengths[:, None]
    last = jnp.arange(width)[None] == lengths[:, None] - 1
    action = valid & jnp.broadcast_to(acted, (rows,))[:, None] & (log_probs is not None)
    log_probs = jnp.zeros(tokens.shape, jnp.float32) if log_probs is None else log_probs
    new = Columns(
        tokens=tokens, valid=valid, action_mask=action,
        log_probs=jnp.where(action, log_probs, 0.0),
        turn=jnp.broadcast_to(jnp.broadcast_to(turn, (rows,))[:, None], tokens.shape).astype(jnp.int32),
        earned=jnp.where(last, jnp.broadcast_to(earned, (rows,))[:, None], 0.0).astype(jnp.float32),
    )  # fmt: skip
    return Columns(*(lax.dynamic_update_slice(old, x, (0, at)) for old, x in zip(columns, new)))


def packed(columns: Columns, width: int, pad_id: int) -> Columns:
    """The real columns of each row moved to its front, in their order, and the first `width` of them.

    Padding behind them has the row's last turn, so that turns never fall along a row.
    """
    order = jnp.argsort(~columns.valid, axis=1, stable=True)[:, :width]
    moved = Columns(*(jnp.take_along_axis(x, order, axis=1) for x in columns))
    return moved._replace(
        tokens=jnp.where(moved.valid, moved.tokens, pad_id), earned=jnp.where(moved.valid, moved.earned, 0.0),
        log_probs=jnp.where(moved.action_mask, moved.log_probs, 0.0),
        turn=lax.cummax(jnp.where(moved.valid, moved.turn, 0), axis=1),
    )  # fmt: skip


def chosen(which: Array, new: Any, old: Any) -> Any:
    """Pytrees of [B,...]: new where `which` [B] is true, old elsewhere, in the old dtypes."""
    pick = lambda a, b: jnp.where(which.reshape(-1, *[1] * (b.ndim - 1)), a, b).astype(b.dtype)  # noqa: E731
    return jax.tree.map(pick, new, old)


def check_positions(model: Transformer, columns: int, knobs: str) -> None:
    """Raises Refused if the columns that a rollout reads are more than a table of learned positions has."""
    table = model.config.learned_positions
    if table and columns > table:
        raise Refused(f"the rollout reads {columns} columns, but Config.learned_positions is {table}: lower {knobs}, "
                      "or shorten prompts")  # fmt: skip


def as_rows(prompts: Prompts, columns: Columns, *, truncated: Array, policy_version: Array | int,
            facts: dict[str, Array], role: Array | int = 0) -> Rollout:  # fmt: skip
    """Prompts [N,P] and packed columns [B,W] behind them, B a multiple of N, as a Rollout of P + W columns."""
    (n, width), rows = prompts.tokens.shape, columns.tokens.shape[0]
    each = lambda x: jnp.repeat(x, rows // n, axis=0)  # noqa: E731
    behind = lambda x: jnp.pad(x, ((0, 0), (width, 0)))  # noqa: E731
    number = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.int32), (rows,))  # noqa: E731
    return Rollout(
        tokens=jnp.concatenate([each(prompts.tokens), columns.tokens], axis=1),
        valid=jnp.concatenate([each(prompts.valid), columns.valid], axis=1),
        action_mask=behind(columns.action_mask), behavior_log_probs=behind(columns.log_probs),
        turn=behind(columns.turn), role=number(role), group=each(jnp.arange(n, dtype=jnp.int32)), truncated=truncated,
        policy_version=number(policy_version), earned=behind(columns.earned), facts=facts,
    )  # fmt: skip
