"""Rows laid end to end into fewer, longer ones: what is read is tokens, and hardly any padding."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mlrl import scoring
from mlrl.models.attention import attend
from mlrl.models.transformer import Transformer
from mlrl.types import Array, Params, Prompts, Refused, Rollout, Scores, require_whole


class Layout(NamedTuple):
    """Where the tokens of B rows lie in R rows of C columns.

    row      [B] int32    which of the R rows; R where there was no room
    start    [B] int32    the column of the first token
    rank     [B,L] int32  how many valid tokens come before each
    fits     [] bool      whether there was room for every row
    """

    row: Array
    start: Array
    rank: Array
    fits: Array


def lay_out(valid: Array, rows: int, columns: int) -> Layout:
    """First fit, the longest rows first: each goes into the first of `rows` rows that still has room. valid: [B,L].

    Reference: Johnson 1973 (first-fit decreasing: at most 11/9 of the rows that are needed, and one more).
    """
    rank = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
    lengths = jnp.sum(valid, axis=1, dtype=jnp.int32)

    def place(used: Array, length: Array) -> tuple[Array, tuple[Array, Array]]:
        has_room = used + length <= columns
        row = jnp.where(jnp.any(has_room), jnp.argmax(has_room), rows)
        start = used.at[row].get(mode="fill", fill_value=0)
        return used.at[row].add(length, mode="drop"), (row, start)

    order = jnp.argsort(-lengths, stable=True)
    _, (row, start) = jax.lax.scan(place, jnp.zeros(rows, jnp.int32), lengths[order])
    back = jnp.argsort(order)
    row, start = row[back], start[back]
    return Layout(row.astype(jnp.int32), start, rank, jnp.all(row < rows))


def score(model: Transformer, params: Params, rollout: Rollout, *, rows: int, columns: int, first_column: int = 1,
          **settings: Any) -> Scores:  # fmt: skip
    """`scoring.score` over rows that are laid end to end, each of which looks at itself alone.

    The rows become `rows` rows of `columns` columns: rows * columns is the budget of tokens. Equal to `scoring.score`
    in value and gradient (to rounding). Rows that do not fit are read one by one, by a second program that is compiled
    beside the first. The first token of a row, before which there is nothing, is scored 0.

    Attention is over whole packed rows: `columns` of about the longest row's cost the least. Kernels that know causal
    masks only (mlrl.models.fused) are refused.

    Args:
      rollout: rows [B,L]; with micro-batches, those of one.
      first_column, settings: as of `scoring.score`.
    Reference: Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination".
    """
    require_whole("packing.score", "rows", rows, 1)
    require_whole("packing.score", "columns", columns, 1)
    if model.config.attention is not attend:
        raise Refused("packed rows look at themselves alone, which Config.attention cannot be told unless it is "
                      "@attention.attend: use that, or scoring.score")  # fmt: skip
    layout, first = lay_out(rollout.valid, rows, columns), max(1, first_column)

    def together() -> Scores:
        found = _packed_scores(model, params, rollout, layout, rows, columns, settings)
        there = (layout.row[:, None], layout.start[:, None] + layout.rank)
        return jax.tree.map(lambda x: x.at[there].get(mode="fill", fill_value=0), found)

    def alone() -> Scores:
        return scoring.score(model, params, rollout, first_column=first, **settings)

    scored = rollout.valid & (layout.rank > 0) & (jnp.arange(rollout.valid.shape[1]) >= first)

    def only_scored(x: Array) -> Array:
        return jnp.where(scored.reshape(*scored.shape, *[1] * (x.ndim - 2)), x, jnp.zeros((), x.dtype))

    # Else the backward pass would be handed what both branches keep, that of the one not taken as zeros.
    branches = (jax.checkpoint(together), jax.checkpoint(alone))
    return jax.tree.map(only_scored, jax.lax.cond(layout.fits, *branches))


def packed(*, rows: int, columns: int) -> scoring.Forward:
    """`score` as the online loop's forward pass: every row is read whole, its prompt too."""

    def score_(model: Transformer, params: Params, prompts: Prompts, rollout: Rollout, **settings: Any) -> Scores:
        width = prompts.tokens.shape[1]
        return score(model, params, rollout, rows=rows, columns=columns, first_column=width, **settings)

    every_row = lambda prompts, rollout: jnp.ones(rollout.group.shape, bool)  # noqa: E731
    return scoring.Forward(lambda model, params, prompts: (), score_, every_row)


def _packed_scores(model: Transformer, params: Params, rollout: Rollout, layout: Layout, rows: int, columns: int,
                   settings: dict[str, Any]) -> Scores:  # fmt: skip
    """Scores of the packed rows: each leaf [rows, columns, ...]."""
    # What is not valid, or had no room, goes to a row beyond the last, and is dropped.
    row = jnp.where(rollout.valid, layout.row[:, None], rows)
    there = (row, layout.start[:, None] + layout.rank)
    lay = lambda x: jnp.zeros((rows, columns), x.dtype).at[there].set(x, mode="drop")  # noqa: E731
    number = jnp.arange(1, rollout.valid.shape[0] + 1, dtype=jnp.int32)[:, None]
    segment = lay(jnp.broadcast_to(number, rollout.valid.shape))
    tokens, positions = lay(rollout.tokens), lay(layout.rank)
    causal = jnp.tril(jnp.ones((columns, columns), bool))
    mask = causal & (segment[:, :, None] == segment[:, None, :]) & (segment > 0)[:, None, :]
    states = lambda trunk: model.apply({"params": params}, tokens, positions, mask, method=trunk)[0][:, :-1]  # noqa: E731
    laid = rollout.replace(tokens=tokens, valid=segment > 0)
    return scoring.scores_of_states(model, params, laid, states, first_column=1, **settings)
