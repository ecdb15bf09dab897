"""Tic-Tac-Toe over symbols: the game, its prompts, and an opponent that plays at random."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from mlrl.environments.games import words as w
from mlrl.environments.nouns import Game, OpponentFn
from mlrl.tasks.episodes import one_prompt
from mlrl.types import Array, Task, Vocabulary

LINES = np.asarray([[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 3, 6], [1, 4, 7], [2, 5, 8], [0, 4, 8], [2, 4, 6]])
MOVES = tuple("012345678")
PROMPT = "T:XO="  # Tic-Tac-Toe; X, who is player 0, moves before O


def tic_tac_toe(
    vocabulary: Vocabulary = w.VOCABULARY, *, marker: str = "", broken: tuple[float, float] = w.ZERO_SUM
) -> Game:
    """Tic-Tac-Toe. Player 0 is X and moves first; three in a line win 1 to -1, and a full board is a draw, 0 to 0.

    The mover is told its mark and then the board, row by row, empty cells by their digits: O0123X5678 is told to O
    after X took the middle. A move is the digit of an empty cell, and an EOS where there is room.

    Args:
      vocabulary: spells "XO012345678" as one token each.
      marker: see words.reader; what is written before it is free, and nobody is told.
      broken: what (the offender, the other player) win where a move is illegal or not readable. The default keeps the
        game zero-sum, so that breaking the rules is a loss and what is exact about zero-sum games holds. SPIRAL's code
        pays (-1.5, 0.5), which makes both players' mean returns depend on how often rules are broken.
    Returns: a Game of at most 9 moves. The state is {"cells" [9] int32: 0 empty, 1 X, 2 O; "broke" int32}.
    Raises: Refused, if the vocabulary, the marker or `broken` do not fit.
    Reference: Liu et al. 2025, SPIRAL (there player 0 is O).
    """
    broken = w.check_broken("tic_tac_toe", broken)
    read = w.reader(vocabulary, w.words(vocabulary, MOVES), marker)
    marks, digits = (w.symbol_ids(vocabulary, text) for text in ("XO", "".join(MOVES)))

    def reset(key: Array) -> dict[str, Array]:
        del key
        return {"cells": jnp.zeros(9, jnp.int32), "broke": jnp.int32(-1)}

    def observation(state: Any) -> tuple[Array, Array]:
        cells, mark = state["cells"], jnp.asarray(marks)
        board = jnp.where(cells > 0, mark[cells - 1], jnp.asarray(digits))
        return jnp.concatenate([mark[mover(cells)][None], board]), jnp.int32(10)

    def step(state: Any, tokens: Array, length: Array) -> Any:
        cells, me, move = state["cells"], mover(state["cells"]), read(tokens, length)
        fine = (move >= 0) & legal(state)[move]
        placed = cells.at[move].set(1 + me)
        return {"cells": jnp.where(fine, placed, cells), "broke": jnp.where(fine, -1, me).astype(jnp.int32)}

    def outcome(state: Any) -> Array:
        lead = has_line(state["cells"], 1).astype(jnp.float32) - has_line(state["cells"], 2)
        return w.when_broken(state["broke"], broken, 1.0, jnp.stack([lead, -lead]))

    return Game(reset, lambda state: mover(state["cells"]), observation, step, done, outcome,
                lambda state: state["broke"], observation_tokens=10)  # fmt: skip


def mover(cells: Array) -> Array:
    """Whose move it is: 0 or 1, int32."""
    return (jnp.sum(cells > 0) % 2).astype(jnp.int32)


def has_line(cells: Array, mark: int) -> Array:
    """Whether three cells in a line have `mark`."""
    return jnp.any(jnp.all(cells[LINES] == mark, axis=1))


def done(state: Any) -> Array:
    """Whether somebody has a line, the board is full, or somebody broke the rules."""
    cells = state["cells"]
    return has_line(cells, 1) | has_line(cells, 2) | jnp.all(cells > 0) | (state["broke"] >= 0)


def legal(state: Any) -> Array:
    """Which moves are, [9] bool."""
    return state["cells"] == 0


def at_random(vocabulary: Vocabulary = w.VOCABULARY, *, max_move_tokens: int = 2) -> OpponentFn:
    """An opponent that takes each empty cell as likely as the others; A is `max_move_tokens` of the rollout."""
    tokens, lengths = w.spelled(vocabulary, w.words(vocabulary, MOVES), max_move_tokens)

    def move(key: Array, state: Any) -> tuple[Array, Array]:
        chosen = w.uniform(key, legal(state))
        return jnp.asarray(tokens)[chosen], jnp.asarray(lengths)[chosen]

    return move


def prompts(vocabulary: Vocabulary = w.VOCABULARY, *, text: str = PROMPT, name: str = "tic_tac_toe") -> Task:
    """A Task of one prompt that names the game and who moves first; `text` may be another in the vocabulary's words."""
    return one_prompt(prompt=text, vocabulary=vocabulary, name=name)
