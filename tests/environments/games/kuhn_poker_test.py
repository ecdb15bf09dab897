"""Kuhn poker: rounds by hand, what players are told, chips; equilibria, exact values and best responses."""

import itertools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import hand_played as hand  # noqa: E402

from mlrl.environments.contracts import check_game, check_moves  # noqa: E402
from mlrl.environments.games import kuhn_exact, kuhn_poker, words  # noqa: E402
from mlrl.rollouts import turns  # noqa: E402
from mlrl.types import Refused  # noqa: E402

GAME = kuhn_poker.kuhn_poker()
THREE = kuhn_poker.kuhn_poker(rounds=3)
MATCH = kuhn_poker.kuhn_poker(rounds=3, payoff=kuhn_poker.more_chips, broken=(-1.5, 0.5))
J, Q, K = range(3)
UNIFORM, BOLD = np.full((12, 2), 0.5), np.tile([0.0, 1.0], (12, 1))


def dealt(game, *cards):
    state = hand.begun(game)
    return state | {"cards": jnp.asarray(cards, jnp.int32)}


@pytest.mark.parametrize("cards, moves, won, heard", [
    ((K, J), "xx", 1, ["K", "xJ"]),
    ((J, Q), "xx", -1, ["J", "xQ"]),
    ((J, Q), "bf", 1, ["J", "bQ"]),
    ((J, Q), "bc", -2, ["J", "bQ"]),
    ((Q, J), "bc", 2, ["Q", "bJ"]),
    ((Q, J), "xbf", -1, ["Q", "xJ", "b"]),
    ((Q, J), "xbc", 2, ["Q", "xJ", "b"]),
])  # fmt: skip
def test_a_round(cards, moves, won, heard):
    state, players, told = hand.play(GAME, moves, state=dealt(GAME, cards))
    assert told == heard and players == [0, 1, 0][: len(moves)]
    assert hand.end(GAME, state) == (True, [won, -won], -1)


@pytest.mark.parametrize("moves, offender", [("c", 0), ("f", 0), ("xc", 1), ("bx", 1), ("xbb", 0), ("bb", 1), ("J", 0),
                                             (["xx"], 0)])  # fmt: skip
def test_what_breaks_the_rules_costs_all_that_can_be_lost(moves, offender):
    state, _, _ = hand.play(GAME, moves, state=dealt(GAME, (Q, J)))
    assert hand.end(GAME, state) == (True, [-2.0, 2.0] if offender == 0 else [2.0, -2.0], offender)


def test_chips_of_all_rounds_count_and_not_the_last_winner():
    cards = ((K, Q), (J, K), (Q, K))
    # Player 0 bets and is called: +2. Player 1 opens, both check: -1. Player 0 checks, and folds: -1.
    state, players, told = hand.play(THREE, "bcxxxbf", state=dealt(THREE, *cards))
    assert players == [0, 1, 1, 0, 0, 1, 0]
    assert told == ["K", "bQ", "-2KK", "c+2QxJ", "-1KQ", "x+1JxK", "b"]
    assert hand.end(THREE, state) == (True, [0.0, 0.0], -1) == hand.end(MATCH, state)
    state, *_ = hand.play(THREE, "bcxxxx", state=dealt(THREE, *cards))
    assert int(state["chips"]) == 0
    state, _, told = hand.play(THREE, "bfbfbf", state=dealt(THREE, *cards))
    assert told == ["K", "bQ", "-1K", "f+1bJ", "-1Q", "f+1bK"]
    assert hand.end(THREE, state) == (True, [1.0, -1.0], -1) == hand.end(MATCH, state)
    state, *_ = hand.play(THREE, "bcbcbf", state=dealt(THREE, (K, Q), (K, J), (Q, K)))
    assert hand.end(THREE, state) == (True, [5.0, -5.0], -1) and hand.end(MATCH, state) == (True, [1.0, -1.0], -1)


def test_broken_rules_end_a_match():
    state, *_ = hand.play(THREE, "bcc", state=dealt(THREE, (K, Q), (K, J), (Q, K)))
    assert hand.end(THREE, state) == (True, [6.0, -6.0], 1) and hand.end(MATCH, state) == (True, [0.5, -1.5], 1)


def test_deals_are_two_different_cards_and_all_alike():
    cards = jax.vmap(GAME.reset)(jax.random.split(jax.random.key(0), 600))["cards"][:, 0]
    counts = np.zeros((3, 3), int)
    np.add.at(counts, tuple(np.asarray(cards).T), 1)
    assert (np.diag(counts) == 0).all() and counts[~np.eye(3, dtype=bool)].min() > 60


def by_enumeration(first, second):
    """What player 0 wins, from the rules: every deal, every line of play."""
    total = 0.0
    for one, two in itertools.permutations(range(3), 2):
        p = [first[one, 1], second[3 + two, 1], second[6 + two, 1], first[9 + one, 1]]
        high = 1 if one > two else -1
        lines = {"xx": ((1 - p[0]) * (1 - p[1]), high), "xbf": ((1 - p[0]) * p[1] * (1 - p[3]), -1),
                 "xbc": ((1 - p[0]) * p[1] * p[3], 2 * high), "bf": (p[0] * (1 - p[2]), 1),
                 "bc": (p[0] * p[2], 2 * high)}  # fmt: skip
        assert abs(sum(chance for chance, _ in lines.values()) - 1) < 1e-6
        total += sum(chance * won for chance, won in lines.values()) / 6
    return total


def pure():
    """The 64 ways to play one side without chance, as tables that do it on both sides."""
    for choices in itertools.product((0, 1), repeat=6):
        rows = np.asarray(choices)
        table = np.zeros((12, 2))
        table[np.arange(12), np.concatenate([rows[:3], rows[:3], rows[3:], rows[3:]])] = 1.0
        yield table


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1 / 3])
def test_equilibria_win_a_known_value_and_nobody_beats_them(alpha):
    table = kuhn_exact.equilibrium(alpha)
    found = kuhn_exact.exploitability(table)
    np.testing.assert_allclose(found, [-1 / 18, 1 / 18, -1 / 18, 0], atol=1e-6)
    np.testing.assert_allclose(by_enumeration(table, table), kuhn_exact.VALUE, atol=1e-6)


@pytest.mark.parametrize("table", [UNIFORM, BOLD, 1 - BOLD, np.random.default_rng(0).dirichlet([1, 1], 12)])
def test_best_responses_are_those_of_all_pure_ones(table):
    found = jax.jit(kuhn_exact.exploitability)(table)
    np.testing.assert_allclose(found.value, by_enumeration(table, table), atol=1e-6)
    np.testing.assert_allclose(found.against_first, max(-by_enumeration(table, other) for other in pure()), atol=1e-6)
    np.testing.assert_allclose(found.against_second, max(by_enumeration(other, table) for other in pure()), atol=1e-6)
    np.testing.assert_allclose(found.exploitability, (found.against_first + found.against_second) / 2, atol=1e-6)


def test_exploitability_by_hand():
    # Against one who always bets and calls, the best player folds J and loses 1, calls with Q and wins 2 from J or
    # loses 2 to K, and calls with K and wins 2: 1/3 in the mean. As player 0 it checks first, or bets K.
    bold = kuhn_exact.exploitability(BOLD)
    np.testing.assert_allclose(bold, [0, 1 / 3, 1 / 3, 1 / 3], atol=1e-6)
    # Who always checks and folds loses 1 to every bet; the other bets always.
    np.testing.assert_allclose(kuhn_exact.exploitability(1 - BOLD)[1:], [1, 1, 1], atol=1e-6)


def test_breaking_the_rules_is_paid():
    np.testing.assert_allclose(kuhn_exact.exploitability(np.zeros((12, 2))), [-2, 2, 2, 2], atol=1e-6)
    half = kuhn_exact.values(UNIFORM / 2, UNIFORM, (-1.5, 0.5))
    assert half[0] < kuhn_exact.values(UNIFORM, UNIFORM)[0] and float(half.sum()) < 0
    at_once = kuhn_exact.values(np.concatenate([np.zeros((3, 2)), UNIFORM[3:]]), UNIFORM, (-1.5, 0.5))
    np.testing.assert_allclose(at_once, [-3, 1], atol=1e-6)


def test_opponents_play_their_table():
    state, *_ = hand.play(GAME, "x", state=dealt(GAME, (Q, J)))
    often = hand.sampled(kuhn_exact.equilibrium_player(), state, 900)
    assert set(often) == {"x!", "b!"} and 220 < often.count("b!") < 380  # 1/3: 300, deviation 14
    king = hand.play(GAME, "xb", state=dealt(GAME, (K, J)))[0]
    assert set(hand.sampled(kuhn_exact.equilibrium_player(max_move_tokens=1), king)) == {"c"}
    assert set(hand.sampled(kuhn_poker.at_random(), king)) == {"c!", "f!"}


def test_games_of_tables_win_what_is_computed():
    moves = [jax.vmap(kuhn_poker.plays(table)) for table in (UNIFORM, kuhn_exact.equilibrium(0.1))]
    keys = jax.random.split(jax.random.key(5), 20000)

    @jax.jit
    def outcome(keys):
        state = jax.vmap(GAME.reset)(keys)
        for ply in range(3):
            by_ply = jax.vmap(jax.random.fold_in, (0, None))(keys, ply + 1)
            after = jax.vmap(GAME.step)(state, *moves[ply % 2](by_ply, state))
            state = turns.chosen(~jax.vmap(GAME.done)(state), after, state)
        return jax.vmap(GAME.outcome)(state)

    won = np.asarray(outcome(keys))
    expected = kuhn_exact.values(UNIFORM, kuhn_exact.equilibrium(0.1))
    np.testing.assert_allclose(won.mean(0), expected, atol=5 * 1.4 / 20000**0.5)


def test_it_keeps_the_promises_of_games():
    for game in (GAME, MATCH):
        for width in (1, 2, 8):
            check_game(game, width)
            check_moves(kuhn_poker.at_random(max_move_tokens=width), game, width)


def test_information_sets_are_rows_of_a_rollout():
    found = kuhn_poker.information_sets().check()
    texts = [words.VOCABULARY.decode(t[v]) for t, v in zip(np.asarray(found.tokens), np.asarray(found.valid))]
    assert texts == ["P:JQK=" + said for said in "J Q K xJ xQ xK bJ bQ bK Jxb Qxb Kxb".split()]
    assert np.asarray(found.valid).sum(1).tolist() == [7] * 3 + [8] * 6 + [10] * 3  # an EOS after the own check
    assert found.tokens[9, -2] == hand.EOS
    assert kuhn_poker.information_sets(max_move_tokens=1).tokens.shape == (12, 9)


@pytest.mark.parametrize("wrong, message", [
    (lambda: kuhn_poker.kuhn_poker(rounds=0), "rounds must be a whole number of at least 1"),
    (lambda: kuhn_exact.equilibrium(0.4), "alpha must lie in"),
    (lambda: kuhn_poker.plays(np.zeros((12, 2))), "each row summing to 1"),
    (lambda: kuhn_exact.exploitability(np.zeros((6, 2))), r"must be \[12,2\]"),
])  # fmt: skip
def test_mistakes_are_refused(wrong, message):
    with pytest.raises(Refused, match=message) as refusal:
        wrong()
    assert "\n" not in str(refusal.value)
