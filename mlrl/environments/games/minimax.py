"""Tic-Tac-Toe solved: every position's value, opponents that never err, exact results of policies."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mlrl.environments.games import tic_tac_toe
from mlrl.environments.games import words as w
from mlrl.environments.nouns import OpponentFn
from mlrl.types import Array, Refused, Vocabulary

POSITIONS = 3**9
POWERS = 3 ** np.arange(9)  # position = cells @ POWERS
RESULTS = ("first won", "draw", "second won", "first broke the rules", "second broke the rules")


class Solution(NamedTuple):
    """What is known of all 3^9 boards S, by position; reachable are 5,478.

    cells      [S,9] int32  0 empty, 1 X, 2 O
    reachable  [S] bool     from the empty board, by legal moves of a game that is not over
    over       [S] bool     somebody has a line, or the board is full
    value      [S] int32    what player 0 wins if neither errs: 1, 0 or -1; 0 where not reachable
    best       [S,9] bool   the mover's legal moves that keep it; none where over or not reachable
    """

    cells: np.ndarray
    reachable: np.ndarray
    over: np.ndarray
    value: np.ndarray
    best: np.ndarray


@functools.cache
def solved() -> Solution:
    """The game, from its last positions to its first. Read the arrays, do not write to them."""
    cells = (np.arange(POSITIONS)[:, None] // POWERS % 3).astype(np.int32)
    lines = np.stack([(cells[:, tic_tac_toe.LINES] == mark).all(2).any(1) for mark in (1, 2)])
    result, over = lines[0].astype(np.int32) - lines[1], lines.any(0) | (cells > 0).all(1)
    reachable = np.zeros(POSITIONS, bool)
    reachable[0] = True
    value, best = np.zeros(POSITIONS, np.int32), np.zeros((POSITIONS, 9), bool)
    levels = []
    for count in range(10):
        here = np.flatnonzero(reachable & ((cells > 0).sum(1) == count))
        levels.append(here)
        on = here[~over[here]]
        reachable[_after(on)[cells[on] == 0]] = True
    for count, here in reversed(list(enumerate(levels))):
        value[here] = result[here]
        on, sign = here[~over[here]], 1 - 2 * (count % 2)
        won = np.where(cells[on] == 0, sign * value[_after(on)], -2)  # by the mover
        best[on] = won == won.max(axis=1, keepdims=True)
        value[on] = sign * won.max(axis=1)
    return Solution(cells, reachable, over, value, best)


def position(cells: Array) -> Array:
    """The number of a board, int32."""
    return jnp.sum(cells * POWERS.astype(np.int32), axis=-1)


def perfect(vocabulary: Vocabulary = w.VOCABULARY, *, max_move_tokens: int = 2) -> OpponentFn:
    """An opponent that never errs: each move that keeps the position's value is as likely as the others.

    It does not hurry: a won game it may win later.
    """
    tokens, lengths = w.spelled(vocabulary, w.words(vocabulary, tic_tac_toe.MOVES), max_move_tokens)
    best = solved().best

    def move(key: Array, state: Any) -> tuple[Array, Array]:
        chosen = w.uniform(key, jnp.asarray(best)[position(state["cells"])])
        return jnp.asarray(tokens)[chosen], jnp.asarray(lengths)[chosen]

    return move


def random_policy() -> np.ndarray:
    """[S,9] float64, each legal move of a reachable position as likely as the others."""
    game = solved()
    free = (game.cells == 0) & (game.reachable & ~game.over)[:, None]
    return free / np.maximum(free.sum(1, keepdims=True), 1)


def perfect_policy() -> np.ndarray:
    """[S,9] float64: that of `perfect`."""
    best = solved().best
    return best / np.maximum(best.sum(1, keepdims=True), 1)


def results(first: np.ndarray, second: np.ndarray, start: int | np.ndarray = 0) -> np.ndarray:
    """How games of two policies end: the probabilities of RESULTS, [*,5], exact.

    For policies that know the board and nothing else. One that also remembers how it came about is not a table: its
    results are counted in games against `perfect` or `at_random`.

    Args:
      first, second: [S,9] probabilities of the nine moves of players 0 and 1; a row is read where the player moves.
        What is missing to 1, or lies on an occupied cell, breaks the rules.
      start: the position from which they play, or several.
    Raises: Refused, if a row has a negative probability, or sums to more than 1.
    """
    game, end = solved(), np.zeros((POSITIONS, 5))
    tables = [_checked(first, 0), _checked(second, 1)]
    end[game.over, 1 - game.value[game.over]] = 1.0
    for count, on in _backwards():
        seat = count % 2
        chances = np.where(game.cells[on] == 0, tables[seat][on], 0.0)
        end[on] = np.einsum("sm,smr->sr", chances, end[_after(on)])
        end[on, 3 + seat] += 1.0 - chances.sum(1)
    return end[start]


def best_response(policy: np.ndarray, seat: int, broken: tuple[float, float] = w.ZERO_SUM) -> float:
    """What the best player wins against `policy` [S,9], who is player `seat`: 0, the game's value, if it never errs.

    Args:
      broken: see tic_tac_toe.tic_tac_toe; the best player earns broken[1] where the policy breaks the rules.
    """
    game, table = solved(), _checked(policy, seat)
    sign = 1 if seat == 1 else -1
    won = np.where(game.over, sign * game.value, 0).astype(float)
    for count, on in _backwards():
        free, after = game.cells[on] == 0, won[_after(on)]
        chances = np.where(free, table[on], 0.0)
        theirs = (chances * after).sum(1) + broken[1] * (1.0 - chances.sum(1))
        won[on] = theirs if count % 2 == seat else np.where(free, after, -np.inf).max(1)
    return float(won[0])


def _after(positions: np.ndarray) -> np.ndarray:
    """The positions after the nine moves, [*,9]; without meaning where the cell is taken."""
    mark = 1 + (positions[:, None] // POWERS % 3 > 0).sum(1) % 2
    return (positions[:, None] + mark[:, None] * POWERS) % POSITIONS


def _backwards() -> list[tuple[int, np.ndarray]]:
    """(cells that are taken, reachable positions that are not over), the last first."""
    game = solved()
    taken = (game.cells > 0).sum(1)
    return [(n, np.flatnonzero(game.reachable & ~game.over & (taken == n))) for n in reversed(range(9))]


def _checked(policy: np.ndarray, seat: int) -> np.ndarray:
    policy = np.asarray(policy, np.float64)
    if policy.shape != (POSITIONS, 9):
        raise Refused(f"a policy of Tic-Tac-Toe must be [{POSITIONS},9] probabilities, got {list(policy.shape)}")
    game = solved()
    mine = policy[game.reachable & ~game.over & ((game.cells > 0).sum(1) % 2 == seat)]
    if not (np.isfinite(mine).all() and (mine >= 0).all() and (mine.sum(1) <= 1 + 1e-5).all()):
        raise Refused(f"player {seat}'s probabilities must be finite, not negative and sum to at most 1 by position")
    return policy
