"""Several games as one: each is played as it is alone, after it was named."""

import pathlib
import sys

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import hand_played as hand  # noqa: E402

from mlrl.environments.contracts import check_game, check_moves  # noqa: E402
from mlrl.environments.games import kuhn_poker, several, tic_tac_toe  # noqa: E402
from mlrl.tasks import mixtures  # noqa: E402
from mlrl.types import Refused  # noqa: E402

PARTS, NAMES = (tic_tac_toe.tic_tac_toe(), kuhn_poker.kuhn_poker()), (tic_tac_toe.PROMPT, kuhn_poker.PROMPT)
GAME = several.one_of(PARTS, NAMES)
OPPONENT = several.each_its_own([tic_tac_toe.at_random(), kuhn_poker.at_random()])


def test_the_drawn_game_is_played():
    state = hand.begun(GAME) | {"which": np.int32(0)}
    end, players, told = hand.play(GAME, "403", state=state)
    assert told == ["T:XO=X012345678", "T:XO=O0123X5678", "XO123X5678"] and players == [0, 1, 0]
    assert set(hand.sampled(OPPONENT, end)) == {f"{cell}!" for cell in "125678"}
    end, *_ = hand.play(GAME, "8", state=hand.play(GAME, "1", state=end)[0])
    assert hand.end(GAME, end) == (False, [0, 0], -1)
    poker = hand.begun(GAME) | {"which": np.int32(1)}
    cards = "".join(kuhn_poker.CARDS[c] for c in poker["games"][1]["cards"][0])
    end, _, told = hand.play(GAME, "xbf", state=poker)
    assert told == [f"P:JQK={cards[0]}", f"P:JQK=x{cards[1]}", "b"] and hand.end(GAME, end) == (True, [-1, 1], -1)
    assert hand.end(GAME, hand.play(GAME, "x", state=state)[0]) == (True, [-1, 1], 0)  # no move of this game


def test_games_are_drawn_by_their_rates():
    drawn = lambda rates: np.mean(jax.vmap(several.one_of(PARTS, NAMES, rates=rates).reset)(  # noqa: E731
        jax.random.split(jax.random.key(0), 400))["which"])  # fmt: skip
    assert 0.68 < drawn((1, 3)) < 0.82 and drawn((2, 0)) == 0


def test_it_keeps_the_promises_of_games():
    check_game(GAME, 2)
    check_moves(OPPONENT, GAME, 2)


def test_prompts_of_games_mix():
    task = mixtures.mixture([tic_tac_toe.prompts(), kuhn_poker.prompts()])
    found = task.at(np.asarray([0, 1], np.int32), np.zeros(2, np.int32)).check()
    assert [task.vocabulary.decode(t[v]) for t, v in zip(found.tokens, found.valid)] == list(NAMES)


@pytest.mark.parametrize("mistake, message", [
    (dict(names=("T",)), "for each of 2 games"), (dict(rates=(1, 2, 3)), "for each of 2 games"),
    (dict(rates=(-1, 2)), "not negative"),
])  # fmt: skip
def test_mistakes_are_refused(mistake, message):
    with pytest.raises(Refused, match=message):
        several.one_of(**dict(games=PARTS, names=NAMES) | mistake)
