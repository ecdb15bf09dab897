"""Demonstrations: what a mover had before it, token for token, and moves that keep the rules."""

import numpy as np
import pytest

from mlrl.environments.games import kuhn_poker, tic_tac_toe
from mlrl.environments.games.demonstrations import demonstrations
from mlrl.environments.games.words import VOCABULARY
from mlrl.types import Refused

EOS = VOCABULARY.eos_ids[0]


def rows(task):
    index = np.arange(task.sizes[0])
    prompts, (targets, valid) = task.at(0 * index, index), task.targets(0 * index, index)
    pairs = zip(prompts.tokens, prompts.valid, targets, valid)
    return [(tuple(p[v].tolist()), t[w].tolist()) for p, v, t, w in pairs]


def test_rows_of_kuhn_poker_are_its_information_sets():
    task = demonstrations(kuhn_poker.prompts(), kuhn_poker.kuhn_poker(), kuhn_poker.at_random(), games=400, max_moves=3)
    sets = kuhn_poker.information_sets()
    place = {tuple(t[v].tolist()): i for i, (t, v) in enumerate(zip(*map(np.asarray, sets[:2])))}
    counts = np.zeros((12, 4), int)
    for prompt, target in rows(task):
        move, end = target
        counts[place[prompt], kuhn_poker.MOVES.index(VOCABULARY.decode([move]))] += 1
        assert end == EOS
    assert counts[:3].sum() == 400  # one first move a game
    bets = counts[:3, kuhn_poker.BET].sum()
    assert counts[6:9].sum() == bets and counts[3:6].sum() == 400 - bets  # and one answer
    assert counts[9:].sum() == counts[3:6, kuhn_poker.BET].sum()
    assert 150 < bets < 250 and (counts[:6, 2:] == 0).all() and (counts[6:, :2] == 0).all()


def test_a_row_goes_on_where_the_players_last_one_ended():
    task = demonstrations(tic_tac_toe.prompts(), tic_tac_toe.tic_tac_toe(), tic_tac_toe.at_random(), games=2)
    before = {}
    for prompt, target in rows(task):
        board, cell = VOCABULARY.decode(list(prompt[-9:])), int(VOCABULARY.decode(target[:1]))
        mark = VOCABULARY.decode([prompt[-10]])
        assert board[cell] == "." and board.count("X") - board.count("O") == "XO".index(mark)
        if board.count(mark):
            assert prompt[:-10] == before[mark]
        else:
            assert VOCABULARY.decode(list(prompt[:-10])) == tic_tac_toe.PROMPT
        before[mark] = (*prompt, *target)


def test_mistakes_are_refused():
    with pytest.raises(Refused, match=r"demonstrations.games"):
        demonstrations(kuhn_poker.prompts(), kuhn_poker.kuhn_poker(), kuhn_poker.at_random(), games=0)
    with pytest.raises(Refused):
        demonstrations(kuhn_poker.prompts(), kuhn_poker.kuhn_poker(), kuhn_poker.at_random(), max_move_tokens=3)
