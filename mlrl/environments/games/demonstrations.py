"""Whole games of a player who does not learn, as rows: what supervised learning of a game begins with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mlrl import prompts as prompts_lib
from mlrl.batches import unannotated
from mlrl.environments.contracts import check_game, check_moves
from mlrl.environments.nouns import Game, OpponentFn
from mlrl.rollouts import turns
from mlrl.types import Array, Batch, Refused, Task, require_whole


def rows_of_games(
    task: Task, key: Array, step: Array | int, rows: int, weights: Array, *, game: Game, player: OpponentFn,
    max_moves: int = 8, max_move_tokens: int = 8, max_moves_each: int = 0,
) -> Batch:  # fmt: skip
    """Rows of `rows` / 2 new games in which `player` plays both sides: two views of each, as `self_play` makes them.

    For `offline.Experiment.rows_fn`. All moves of a row are learned from, with their EOS; each row counts as scored 0,
    and nobody's log-probs are known.

    Args:
      task: gives the prompts; in the graph.
      key, step: the games are a function of both; the key is the run's.
      rows: B, even.
      player: such as tic_tac_toe.at_random; A is `max_move_tokens`.
      max_moves, max_moves_each: as those of self_play; a game that goes on is cut.
    Returns: Batch with B rows of L = P + H * (O + A) columns.
    Raises: Refused, if the game or the player does not keep its promises, or `rows` is odd.
    """
    for name, value, lowest in (("max_moves", max_moves, 1), ("max_moves_each", max_moves_each, 0)):
        require_whole("rows_of_games", name, value, lowest)
    if rows % 2:
        raise Refused(f"rows_of_games makes two rows of every game, but rows_per_step is {rows}: make it even")
    check_game(game, max_move_tokens)
    check_moves(player, game, max_move_tokens)
    prompts = prompts_lib.draw(task, key, step, rows // 2, weights)
    keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, turns.ENVIRONMENT), step), rows // 2)
    moves = jax.vmap(lambda key: _played(game, player, key, max_moves))(keys)
    width = (max_moves_each or -(-max_moves // 2)) * (game.observation_tokens + max_move_tokens)
    columns = turns.packed(_views(moves), width, task.vocabulary.pad_id)
    role = jnp.tile(jnp.arange(2), rows // 2)
    return unannotated(turns.as_rows(
        prompts, columns, truncated=jnp.zeros(rows, bool), policy_version=0, facts={}, role=role))  # fmt: skip


def _played(game: Game, player: OpponentFn, key: Array, max_moves: int) -> dict[str, Array]:
    """One game, move by move, [M,...]: who moved, what it was told, what it wrote."""
    begin, *keys = jax.random.split(key, 1 + max_moves)

    def move(state: Any, key: Array) -> tuple[Any, dict[str, Array]]:
        live, (told, told_length) = ~game.done(state), game.observation(state)
        wrote, wrote_length = player(key, state)
        after = game.step(state, wrote, wrote_length)
        seen = {"live": live, "mover": game.player(state), "told": told, "told_length": told_length, "wrote": wrote,
                "wrote_length": wrote_length}  # fmt: skip
        return jax.tree.map(lambda new, old: jnp.where(live, new, old), after, state), seen

    return jax.lax.scan(move, jax.tree.map(jnp.asarray, game.reset(begin)), jnp.stack(keys))[1]


def _views(moves: dict[str, Array]) -> turns.Columns:
    """Columns [2 E, M * (O + A)] of both players' rows of E games, player 0 first, with holes."""
    games, count, observed = moves["told"].shape
    tokens = jnp.concatenate([moves["told"], moves["wrote"]], axis=2)
    place = jnp.arange(tokens.shape[2])
    told, wrote = place < moves["told_length"][..., None], place - observed < moves["wrote_length"][..., None]
    acted = (place >= observed) & wrote & moves["live"][..., None]
    valid = jnp.where(place < observed, told & moves["live"][..., None], acted)
    mine = moves["mover"][:, None] == jnp.arange(2)[None, :, None]  # [E,2,M]
    turn = jnp.cumsum(mine, axis=2) - mine
    view = lambda x: jnp.broadcast_to(x, (games, 2, count, len(place))).reshape(2 * games, -1)  # noqa: E731
    action = view(acted[:, None] & mine[..., None])
    return turns.Columns(
        tokens=view(tokens[:, None]), valid=view(valid[:, None] & mine[..., None]), action_mask=action,
        log_probs=jnp.where(action, jnp.nan, 0.0), turn=view(turn[..., None]).astype(jnp.int32),
        earned=jnp.zeros(action.shape, jnp.float32),
    )  # fmt: skip
