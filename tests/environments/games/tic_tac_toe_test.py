"""Tic-Tac-Toe: moves, ends, what breaks the rules; all positions; exact results of policies that are known."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import hand_played as hand  # noqa: E402

from mlrl.environments.contracts import check_game, check_moves  # noqa: E402
from mlrl.environments.games import minimax, tic_tac_toe, words  # noqa: E402
from mlrl.types import Refused  # noqa: E402

GAME = tic_tac_toe.tic_tac_toe()
UNFAIR = tic_tac_toe.tic_tac_toe(broken=(-1.5, 0.5))


@pytest.mark.parametrize("moves, ending", [
    ("03142", (True, [1, -1], -1)),  # X has the upper row
    ("304182", (True, [-1, 1], -1)),  # O has it
    ("012435768", (True, [0, 0], -1)),  # XOX / XOO / OXX
    ("048", (False, [0, 0], -1)),
    ("00", (True, [1, -1], 1)),  # O moves where X is
    ("0141", (True, [1, -1], 1)),
    ("9", (True, [-1, 1], 0)),
    (["04"], (True, [-1, 1], 0)),
    ([""], (True, [-1, 1], 0)),
    (["4", "X"], (True, [1, -1], 1)),
])  # fmt: skip
def test_ends(moves, ending):
    state, players, _ = hand.play(GAME, moves)
    assert hand.end(GAME, state) == ending and players == [i % 2 for i in range(len(moves))]


def test_what_players_are_told():
    assert hand.play(GAME, "4083")[2] == ["X012345678", "O0123X5678", "XO123X5678", "OO123X567X"]


def test_payoffs_of_broken_rules_may_be_those_of_spiral():
    assert hand.end(UNFAIR, hand.play(UNFAIR, "00")[0]) == (True, [0.5, -1.5], 1)


def test_a_move_may_fill_its_tokens_and_follow_a_scratchpad():
    full, _, _ = hand.play(GAME, "4", width=1)
    assert hand.end(GAME, full) == (False, [0, 0], -1) and full["cells"][4] == 1
    free = tic_tac_toe.tic_tac_toe(marker=":")
    state, _, heard = hand.play(free, ["12=:4", "0", "::8"])
    assert state["cells"].tolist() == [2, 0, 0, 0, 1, 0, 0, 0, 1] and heard[1] == "O0123X5678"
    assert hand.end(free, hand.play(free, ["4:"])[0]) == (True, [-1, 1], 0)
    assert hand.end(free, hand.play(free, ["4:44"])[0]) == (True, [-1, 1], 0)


def test_the_number_of_positions_is_known():
    game = minimax.solved()
    assert game.reachable.sum() == 5478 and (game.reachable & game.over).sum() == 958
    ended = game.value[game.reachable & game.over]
    assert [(ended == value).sum() for value in (1, -1, 0)] == [626, 316, 16]
    assert game.value[0] == 0 and game.best[0].all(), "every first move draws"
    corner = 3**0
    assert game.best[corner].nonzero()[0].tolist() == [4], "only the middle answers a corner"


def test_minimax_never_loses_from_any_position():
    game, perfect, at_random = minimax.solved(), minimax.perfect_policy(), minimax.random_policy()
    other = np.random.default_rng(0).dirichlet(np.ones(9), minimax.POSITIONS)  # breaks the rules too
    states = np.flatnonzero(game.reachable)
    value = game.value[states]
    for policy in (at_random, other):
        first, second = (minimax.results(*both, states) for both in ((perfect, policy), (policy, perfect)))
        np.testing.assert_allclose([first.sum(1), second.sum(1)], 1, atol=1e-9)
        lost, won = first[:, 2] + first[:, 3], first[:, 0] + first[:, 4]
        np.testing.assert_allclose(lost[value >= 0], 0, atol=1e-9)
        np.testing.assert_allclose(won[value == 1], 1, atol=1e-9)
        lost, won = second[:, 0] + second[:, 4], second[:, 2] + second[:, 3]
        np.testing.assert_allclose(lost[value <= 0], 0, atol=1e-9)
        np.testing.assert_allclose(won[value == -1], 1, atol=1e-9)
    np.testing.assert_allclose(minimax.results(perfect, perfect), [0, 1, 0, 0, 0], atol=1e-9)
    np.testing.assert_allclose([minimax.best_response(perfect, seat) for seat in (0, 1)], 0, atol=1e-9)
    assert minimax.best_response(at_random, 1) > minimax.best_response(at_random, 0) > 0.5


def test_random_players_win_as_is_known():
    # Known shares of won, drawn and lost games: 737/1260, 8/63, 121/420.
    np.testing.assert_allclose(minimax.results(minimax.random_policy(), minimax.random_policy())[:3],
                               [737 / 1260, 8 / 63, 121 / 420], atol=1e-9)  # fmt: skip


def test_who_breaks_the_rules_at_once_loses_all():
    nothing = np.zeros((minimax.POSITIONS, 9))
    np.testing.assert_array_equal(minimax.results(nothing, nothing), [0, 0, 0, 1, 0])
    np.testing.assert_allclose(minimax.results(minimax.perfect_policy(), nothing), [0, 0, 0, 0, 1], atol=1e-9)
    assert minimax.best_response(nothing, 0, (-1.5, 0.5)) == 0.5
    with pytest.raises(Refused, match="sum to at most 1"):
        minimax.results(nothing + 0.2, nothing)


def test_opponents_write_what_the_tables_say():
    state, _, _ = hand.play(GAME, "0")
    assert int(minimax.position(state["cells"])) == 1
    assert set(hand.sampled(minimax.perfect(), state)) == {"4!"}
    assert set(hand.sampled(minimax.perfect(max_move_tokens=1), state)) == {"4"}
    often = hand.sampled(tic_tac_toe.at_random(), state)
    assert set(often) == {f"{cell}!" for cell in range(1, 9)}
    assert max(map(often.count, set(often))) < 110  # of 64 on average; 6 deviations


def test_it_keeps_the_promises_of_games():
    for width in (1, 2, 8):
        check_game(GAME, width)
        for opponent in (tic_tac_toe.at_random, minimax.perfect):
            check_moves(opponent(max_move_tokens=width), GAME, width)
    batch = jax.vmap(GAME.reset)(jax.random.split(jax.random.key(0), 3))
    moves = jnp.stack([hand.written(text, 2)[0] for text in "483"])
    after = jax.vmap(GAME.step)(batch, moves, jnp.full(3, 2))
    np.testing.assert_array_equal(jnp.argmax(after["cells"], axis=1), [4, 8, 3])


def test_prompts_name_the_game():
    task = tic_tac_toe.prompts()
    found = task.at(np.zeros(2, np.int32), np.arange(2, dtype=np.int32)).check()
    assert words.VOCABULARY.decode(found.tokens[0]) == task.example(0, 1)["prompt"] == "T:XO="


@pytest.mark.parametrize("mistake, message", [
    (dict(broken=(0.0, 1.0)), "broken must be"),
    (dict(marker="4"), "that no move has"),
    (dict(marker="ab"), "one character"),
    (dict(vocabulary=words.characters("XO01234567")), "'8'"),
])  # fmt: skip
def test_mistakes_are_refused(mistake, message):
    with pytest.raises(Refused, match=message) as refusal:
        tic_tac_toe.tic_tac_toe(**mistake)
    assert "\n" not in str(refusal.value)
    with pytest.raises(Refused, match="raise it"):
        words.spelled(words.VOCABULARY, words.words(words.VOCABULARY, ["10"]), 1)
