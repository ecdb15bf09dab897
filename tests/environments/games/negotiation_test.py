"""Simple Negotiation: trades and their value, what is legal, what players are told."""

import pathlib
import sys

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import hand_played as hand  # noqa: E402

from mlrl.environments.contracts import check_game, check_moves  # noqa: E402
from mlrl.environments.games import negotiation, words  # noqa: E402
from mlrl.types import Refused  # noqa: E402

GAME = negotiation.negotiation(turns=4)
GAINS = negotiation.negotiation(turns=2, payoff=lambda gains: gains.astype(float))


def test_a_trade_changes_what_both_have_and_gain():
    state, players, told = hand.play(GAME, ["2W>3G", "A", "10G>5W", "D"])
    assert players == [0, 1, 0, 1]
    assert told == ["05W15G10W10G", "15W05G10W10G2W>3G", "08W13GA", "12W07G10G>5W"]
    assert state["have"].tolist() == [[8, 13], [12, 7]]
    # Player 0: -2 * 5 + 3 * 15 = 35; player 1: 2 * 15 - 3 * 5 = 15.
    assert hand.end(GAME, state) == (True, [1.0, -1.0], -1)
    assert hand.end(GAINS, hand.play(GAINS, ["2W>3G", "A"])[0]) == (True, [35.0, 15.0], -1)
    assert hand.end(GAINS, hand.play(GAINS, ["10W>1G", "A"])[0]) == (True, [-35.0, 145.0], -1)


def test_nobody_wins_without_a_trade_or_with_an_even_one():
    for moves in (["D"] * 4, ["D", "1W>1G", "2G>1W", "D"], ["D", "1W>1G", "D", "D"], ["1W>1G", "A", "D", "D"]):
        state, *_ = hand.play(GAME, moves)
        assert hand.end(GAME, state) == (True, [0.0, 0.0], -1)
    assert hand.end(GAME, hand.play(GAME, ["D"] * 3)[0])[0] is False


def test_player_1_may_offer_and_win():
    state, *_ = hand.play(GAME, ["D", "1G>2W", "A", "D"])
    assert state["have"].tolist() == [[8, 11], [12, 9]]  # gains 5 and 25
    assert hand.end(GAME, state) == (True, [-1.0, 1.0], -1)


@pytest.mark.parametrize("moves", [
    ["A"],  # nothing was offered
    ["11W>1G"],  # more than one has
    ["1W>2W"], ["W>2G"], ["01W>2G"], ["1W>0G"], ["1W>21G"], ["1W2G"], ["1W>2G1"], ["1W>2"], ["AD"], [""],
    ["1W>11G", "A"],  # more than the other has
    ["1W>1G", "D", "A"],  # denied
    ["1W>1G", "2W>1G", "3W>1G", "2W>1GA"],  # two moves
    ["1W>1G", "A", "A"],  # done already
])  # fmt: skip
def test_what_breaks_the_rules(moves):
    state, players, _ = hand.play(GAME, moves)
    offender = players[-1]
    assert hand.end(GAME, state) == (True, [-1.0, 1.0] if offender == 0 else [1.0, -1.0], offender)


def test_an_offer_may_ask_for_more_than_the_other_has_and_replaces_the_last():
    assert hand.end(GAME, hand.play(GAME, ["1W>20G", "D"])[0])[0] is False
    state, *_ = hand.play(GAME, ["1W>2G", "3W>1G", "A"])
    assert state["have"].tolist() == [[13, 9], [7, 11]]
    state, *_ = hand.play(GAME, ["10W>10G", "A", "20G>1W", "D"])
    assert state["have"].tolist() == [[0, 20], [20, 0]] and hand.end(GAME, state)[2] == -1


def test_all_moves_are_listed():
    known, give, ask = negotiation.offers(words.VOCABULARY)
    assert len(known.texts) == len(set(known.texts)) == 2 + 2 * 20 * 20 and known.tokens.shape[1] == 7
    at = known.texts.index("12G>3W")
    assert give[at].tolist() == [0, 12] and ask[at].tolist() == [3, 0]


def test_a_random_opponent_keeps_the_rules():
    opponent, read = negotiation.at_random(), negotiation.offers(words.VOCABULARY)[0].texts
    state, *_ = hand.play(GAME, ["1W>2G"])
    often = [text.removesuffix("!") for text in hand.sampled(opponent, state, 600)]
    assert set(often) <= set(read) and all(0.23 < often.count(move) / 600 < 0.43 for move in "AD")
    for move in (set(often) - {"A", "D"}):
        assert hand.end(GAME, hand.play(GAME, ["1W>2G", move])[0])[0] is False
    too_much, *_ = hand.play(GAME, ["1W>20G"])
    assert "A!" not in hand.sampled(opponent, too_much)


def test_a_trade_puts_one_ahead_and_the_other_behind():
    known, give, ask = negotiation.offers(words.VOCABULARY)
    for values in (negotiation.VALUES, ((1, 2), (30, 4))):
        own = np.stack([(ask - give) @ values[0], (give - ask) @ values[1]])  # what player 0's offers change for both
        ahead = negotiation.lead(give, ask, values)
        assert (ahead == own[0] - own[1]).all()
    assert ahead[known.texts.index("2W>3G")] == -2 * 31 + 3 * 6
    pieces = negotiation.lead(give, ask)
    assert (pieces == 20 * (ask.sum(1) - give.sum(1))).all()


def test_a_careful_opponent_accepts_and_offers_what_puts_it_ahead():
    opponent = negotiation.careful()
    for moves, answers in ((["2W>3G"], None), (["3W>2G"], {"A!"}), (["9W>8G", "D"], None), (["1G>1W"], None)):
        state, *_ = hand.play(GAME, moves)
        said = set(hand.sampled(opponent, state, 64))
        if answers:
            assert said == answers
            continue
        for move in said:
            gives, gets = map(int, move.translate(str.maketrans("", "", "WG!")).split(">"))
            assert gives < gets <= 10
    nothing, *_ = hand.play(negotiation.negotiation(start=(1, 1)), ["D"])  # one piece for one is all there is
    assert set(hand.sampled(negotiation.careful(start=(1, 1)), nothing)) == {"D!"}


@pytest.mark.parametrize("values", [negotiation.VALUES, ((1, 2), (30, 4))])
def test_a_careful_opponent_is_never_behind(values):
    game = negotiation.negotiation(values=values, start=(3, 3), turns=6, payoff=lambda gains: gains.astype(float))
    careful, other = negotiation.careful(values=values, start=(3, 3)), negotiation.at_random(start=(3, 3))

    def played(key, seat):
        def move(state, key):
            mine, its = careful(key, state), other(key, state)
            wrote = jax.tree.map(lambda a, b: jax.numpy.where(game.player(state) == seat, a, b), mine, its)
            return game.step(state, *wrote), None

        state, _ = jax.lax.scan(move, game.reset(key), jax.random.split(key, 6))
        return game.outcome(state), game.invalid(state), game.done(state)

    for seat in (0, 1):
        gains, broke, over = jax.jit(jax.vmap(played, (0, None)))(jax.random.split(jax.random.key(0), 300), seat)
        assert (broke == -1).all() and over.all()
        ahead = gains[:, seat] - gains[:, 1 - seat]
        assert (ahead >= 0).all() and (ahead > 0).mean() > 0.3


def test_first_moves_are_what_players_are_told():
    game, start = negotiation.negotiation(start=(1, 2)), (1, 2)
    known, give, ask = negotiation.offers(words.VOCABULARY, start)
    prompts, openings = negotiation.first_moves(text="N:", start=start)
    texts = [known.texts[i] for i in openings]
    assert texts == ["1W>1G", "1W>2G", "1G>1W", "2G>1W"]  # all that both can pay
    read = [words.VOCABULARY.decode(row[own]) for row, own in zip(prompts.tokens, prompts.valid)]
    assert read == ["N:" + hand.play(game, moves + ["D"])[2][-1] for moves in ([], *([text] for text in texts))]
    assert prompts.check() is prompts


def test_it_keeps_the_promises_of_games():
    check_game(GAME, 8)
    check_game(GAME, 3)  # long offers cannot be written then
    check_moves(negotiation.at_random(max_move_tokens=9), GAME, 9)
    other = negotiation.negotiation(start=(3, 40), values=((1, 2), (0, 99)), marker=":")
    assert hand.play(other, ["4:A:2W>40G", "12:D"], width=12)[2] == ["01W02G03W40G", "00W99G03W40G2W>40G"]


@pytest.mark.parametrize("mistake, message", [
    (dict(turns=0), "turns must be a whole number"),
    (dict(start=(10, 50)), "below 50"),
    (dict(start=(0, 5)), r"start\[0\] must be"),
    (dict(values=((5, 15), (15, 100))), "from 0 to 99"),
    (dict(values=(5, 15)), "two pairs"),
    (dict(marker=">"), "that no move has"),
])  # fmt: skip
def test_mistakes_are_refused(mistake, message):
    with pytest.raises(Refused, match=message) as refusal:
        negotiation.negotiation(**mistake)
    assert "\n" not in str(refusal.value)
