"""Rows of demonstrated games: token for token those of self-play, and moves that keep the rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl.environments.games import kuhn_poker, tic_tac_toe
from mlrl.environments.games.demonstrations import rows_of_games
from mlrl.environments.games.words import VOCABULARY
from mlrl.types import Refused

EOS = VOCABULARY.eos_ids[0]
KUHN = dict(game=kuhn_poker.kuhn_poker(), player=kuhn_poker.at_random(), max_moves=3, max_move_tokens=2)
TIC_TAC_TOE = dict(game=tic_tac_toe.tic_tac_toe(), player=tic_tac_toe.at_random(), max_moves=9, max_move_tokens=2)


def moves(task, rows, **settings):
    """[(row, all tokens before the move, the move)] of all rows, and the rollout."""
    batch = jax.jit(functools.partial(rows_of_games, task, rows=rows, weights=jnp.ones(1), **settings))(
        key=jax.random.key(0), step=0)  # fmt: skip
    rollout, found = jax.device_get(batch.rollout.check()), []
    assert batch.rewards.scored.all() and np.isnan(rollout.behavior_log_probs[rollout.action_mask]).all()
    for b in range(rows):
        for turn in range(5):
            mine = np.flatnonzero(rollout.action_mask[b] & (rollout.turn[b] == turn))
            if mine.size:
                before = rollout.tokens[b, : mine[0]][rollout.valid[b, : mine[0]]]
                found.append((b, before.tolist(), rollout.tokens[b, mine].tolist()))
    return found, rollout


def test_rows_of_kuhn_poker_are_its_information_sets():
    found, rollout = moves(kuhn_poker.prompts(), 800, **KUHN)
    sets = kuhn_poker.information_sets()
    place = {tuple(t[v].tolist()): i for i, (t, v) in enumerate(zip(np.asarray(sets.tokens), np.asarray(sets.valid)))}
    counts = np.zeros((12, 4), int)
    for b, before, (move, end) in found:
        row = place[tuple(before)]
        counts[row, kuhn_poker.MOVES.index(VOCABULARY.decode([move]))] += 1
        assert end == EOS and rollout.role[b] == b % 2 == (3 <= row < 9)
    assert counts[:3].sum() == 400  # one first move a game
    bets = counts[:3, kuhn_poker.BET].sum()
    assert counts[6:9].sum() == bets and counts[3:6].sum() == 400 - bets  # and one answer
    assert counts[9:].sum() == counts[3:6, kuhn_poker.BET].sum()
    assert 150 < bets < 250 and (counts[:6, 2:] == 0).all() and (counts[6:, :2] == 0).all()


def test_a_row_of_tic_tac_toe_holds_all_moves_of_a_player():
    found, _ = moves(tic_tac_toe.prompts(), 8, **TIC_TAC_TOE)
    written = {}
    for b, before, (move, end) in found:
        mark, board, cell = VOCABULARY.decode(before[-10:-9]), VOCABULARY.decode(before[-9:]), VOCABULARY.decode([move])
        assert end == EOS and mark == "XO"[b % 2] and board.count("X") - board.count("O") == b % 2
        assert board[int(cell)] == cell
        assert VOCABULARY.decode(before[:-10]) == tic_tac_toe.PROMPT if b not in written else before[:-10] == written[b]
        written[b] = [*before, move, end]
    assert set(written) == set(range(8))


def test_steps_differ_and_mistakes_are_refused():
    draw = functools.partial(rows_of_games, kuhn_poker.prompts(), jax.random.key(0), weights=jnp.ones(1))
    one, same, other = (np.asarray(draw(step, rows=64, **KUHN).rollout.tokens) for step in (0, 0, 1))
    assert (one == same).all() and (one != other).any()
    with pytest.raises(Refused, match="make it even"):
        draw(0, rows=3, **KUHN)
    with pytest.raises(Refused, match=r"rows_of_games.max_moves"):
        draw(0, rows=4, **KUHN | dict(max_moves=0))
    with pytest.raises(Refused):
        draw(0, rows=4, **KUHN | dict(max_move_tokens=3))
