"""Moves of a player who does not learn, as demonstrations: what supervised learning of a game begins with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlrl.environments.contracts import check_game, check_moves
from mlrl.environments.nouns import Game, OpponentFn
from mlrl.tasks import tables
from mlrl.types import Array, Task, require_whole


def demonstrations(
    task: Task, game: Game, player: OpponentFn, *, games: int = 1024, max_moves: int = 9, max_move_tokens: int = 2,
    seed: int = 0, name: str = "demonstrations",
) -> Task:  # fmt: skip
    """Every move of `games` games in which `player` plays both sides, each with all that the mover had before it.

    The prompt of a row is the task's first prompt, then what the mover was told and wrote so far, and what it was told
    now; the target is the move. So a row is, token for token, the beginning of one of self_play's.

    Args:
      task: gives the prompt that all games begin with.
      player: A is `max_move_tokens`; such as tic_tac_toe.at_random. Its EOS is learned too.
      max_moves: of both together; a game that goes on is cut.
    Returns: a Task outside of the graph; rows of one game stand side by side.
    Raises: Refused, if the game or the player does not keep its promises.
    """
    for what, value in (("games", games), ("max_moves", max_moves)):
        require_whole("demonstrations", what, value, 1)
    check_game(game, max_move_tokens)
    check_moves(player, game, max_move_tokens)
    first = task.at(np.zeros(1, np.int32), np.zeros(1, np.int32))
    start = np.asarray(first.tokens)[np.asarray(first.valid)].tolist()
    play = jax.jit(jax.vmap(lambda key: _played(game, player, key, max_moves)))
    moves = jax.device_get(play(jax.random.split(jax.random.key(seed), games)))
    prompts, targets = [], []
    for e in range(games):
        heard = {0: start, 1: start}
        for m in np.flatnonzero(moves["live"][e]):
            mover = int(moves["mover"][e, m])
            told, wrote = (moves[part][e, m, : moves[f"{part}_length"][e, m]].tolist() for part in ("told", "wrote"))
            prompts.append(heard[mover] + told)
            targets.append(wrote)
            heard[mover] = prompts[-1] + wrote
    text = task.vocabulary.decode
    kept = [{"prompt": text(p), "answer": text(t), "task": name} for p, t in zip(prompts, targets)]
    return tables.from_ids(kept, prompts, targets, task.vocabulary, name=name, read=len(kept), limits=(0, 0))


def _played(game: Game, player: OpponentFn, key: Array, max_moves: int) -> dict[str, Array]:
    """One game, move by move, [M,...]: who moved, what it was told, what it wrote."""
    begin, *keys = jax.random.split(key, 1 + max_moves)

    def move(state: Any, key: Array) -> tuple[Any, dict[str, Array]]:
        live, (told, told_length) = ~game.done(state), game.observation(state)
        wrote, wrote_length = player(key, state)
        seen = {"live": live, "mover": game.player(state), "told": told, "told_length": told_length, "wrote": wrote,
                "wrote_length": wrote_length}  # fmt: skip
        after = game.step(state, wrote, wrote_length)
        return jax.tree.map(lambda new, old: jnp.where(live, new, old), after, state), seen

    state = jax.tree.map(jnp.asarray, game.reset(begin))
    return jax.lax.scan(move, state, jnp.stack(keys))[1]
