"""Matches and exact measures: by hand, and of a model without a preference."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from mlrl.environments.games import kuhn_exact, kuhn_poker, negotiation, reading, words
from mlrl.evaluation import Measured
from mlrl.evaluation_games import KuhnTable, Match, Openings, match_statistics
from mlrl.models.transformer import Config, Transformer, initialize
from mlrl.rollouts.self_play import self_play
from mlrl.rollouts.single_turn import single_turn
from mlrl.types import Refused
from mlrl.vocabularies import characters

VOCABULARY = characters("xbcfJQK+-12:")
MODEL = Transformer(Config(vocabulary_size=VOCABULARY.size, width=16, layers=1, heads=2, kv_heads=1, head_width=8,
                           mlp_width=24))  # fmt: skip
EVEN = jax.tree.map(jnp.zeros_like, initialize(MODEL, jax.random.key(0)))
TASK = kuhn_poker.prompts(VOCABULARY, text=":", name="kuhn")


def value(evaluation, model=MODEL, params=EVEN):
    found = evaluation.measure(Measured(model, single_turn, model))(params, ())
    return {name: result["value"] for name, result in found[evaluation.task.name].items()}


def test_statistics_of_a_match_by_hand():
    """Player 0 wins 2, loses by a broken rule, and never moves; player 1 draws."""
    found = match_statistics(np.asarray([2.0, 0.0, -2.0, np.nan]), np.asarray([0, 1, 0, 0]), np.asarray([0, 0, 1, 0]))
    means = {name: result["value"] for name, result in found.items()}
    third = pytest.approx(1 / 3)
    assert means == {"won": third, "drawn": third, "lost": third, "invalid": third, "payoff": pytest.approx(0),
                     "won_0": 0.5, "payoff_0": 0.0, "won_1": 0.0, "payoff_1": 0.0}  # fmt: skip
    assert found["won"]["prompts"] == 3 and found["won"]["low"] < 1 / 3 < found["won"]["high"]


def test_a_table_of_a_model_without_a_preference():
    chance = 1 / VOCABULARY.size
    found = value(KuhnTable(TASK, max_move_tokens=1))
    table = np.full((12, 2), chance)
    expected = kuhn_exact.exploitability(table)
    assert found["illegal"] == pytest.approx(1 - 2 * chance, abs=1e-5)
    np.testing.assert_allclose([found[name] for name in expected._fields], expected, atol=1e-5)
    # As player 0 it breaks a rule at once (-2) unless it writes one of two moves. Showdowns are even.
    # After a check comes a check (0) or a bet; then it breaks a rule, folds (-1) or calls (0). After a bet a fold (+1)
    # or a call (0).
    broke = 1 - 2 * chance
    first = -2 * broke + chance * 0.5 * (-2 * broke - chance) + chance * 0.5
    # As player 1: after a check a check (0), or a bet, folded (+1) or called (0); after a bet a fold (-1) or a call.
    second = -2 * broke + 0.5 * chance * 0.5 - 0.5 * chance
    assert found["payoff_random"] == pytest.approx((first + second) / 2, abs=1e-5)
    assert found["payoff_equilibrium"] < 0


def test_openings_of_a_model_without_a_preference():
    """Of start (2, 2), 1W>2G puts who offers it ahead, 2W>1G behind, and so for gold: 8 openings of 6 tokens."""
    model = Transformer(dataclasses.replace(MODEL.config, vocabulary_size=words.VOCABULARY.size))
    even = jax.tree.map(jnp.zeros_like, initialize(model, jax.random.key(0)))
    chance = 1 / words.VOCABULARY.size
    found = value(Openings(negotiation.prompts(), start=(2, 2), temperature=0.5), model, even)
    legal = chance**2 + 2 * 2 * 4 * chance**6  # D, and 1 or 2 of one good for up to 4 of the other
    assert found["opens_illegal"] == pytest.approx(1 - legal, abs=1e-6)
    for name in ("opens_ahead", "opens_behind"):
        assert found[name] == pytest.approx(2 * chance**6, rel=1e-3)
    for name in ("accepts_ahead", "accepts_behind"):
        assert found[name] == pytest.approx(chance**2, rel=1e-3)
    full = value(Openings(negotiation.prompts(), start=(2, 2), max_move_tokens=5), model, even)
    assert full["opens_ahead"] == pytest.approx(2 * chance**5, rel=1e-3)  # no room for an end


def test_openings_tell_what_is_good_from_what_is_not():
    """An untrained model, whose probabilities of all moves at all first moves are summed here."""
    model = Transformer(dataclasses.replace(MODEL.config, vocabulary_size=words.VOCABULARY.size))
    stirred = lambda x: x + 0.3 * jnp.sin(1.7 * jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)  # noqa: E731
    params = jax.tree.map(stirred, initialize(model, jax.random.key(0)))  # so that all that was read matters
    known, give, ask = negotiation.offers(words.VOCABULARY, (2, 2))
    prompts, openings = negotiation.first_moves(start=(2, 2))
    everything = reading.policy_at_information_sets(
        model, params, prompts, known, jnp.ones((len(prompts.tokens), len(known.texts)), bool),
        vocabulary=words.VOCABULARY, max_move_tokens=8).moves  # fmt: skip
    found = value(Openings(negotiation.prompts(), start=(2, 2)), model, params)
    gain = {i: ask[i].sum() - give[i].sum() for i in openings}
    for name, sign in (("ahead", 1), ("behind", -1)):
        opens = sum(float(everything[0, i]) for i in openings if sign * gain[i] > 0)
        accepts = [float(everything[1 + row, 0]) for row, i in enumerate(openings) if sign * gain[i] < 0]
        assert found[f"opens_{name}"] == pytest.approx(opens, rel=1e-3)
        assert found[f"accepts_{name}"] == pytest.approx(sum(accepts) / len(accepts), rel=1e-3)
    assert found["accepts_ahead"] != pytest.approx(found["accepts_behind"], rel=1e-2)


def test_a_match_of_a_model_without_a_preference():
    opponent = kuhn_poker.at_random(VOCABULARY, max_move_tokens=1)
    play = functools.partial(self_play, game=kuhn_poker.kuhn_poker(VOCABULARY), max_moves=3, max_move_tokens=1)
    match = Match(TASK, functools.partial(play, opponent=opponent), prompts=512)
    assert match.rollout(single_turn) is match.rollout_fn and match.due(0, 10) and not match.due(5, 10)
    found = value(match)
    broke = 1 - 2 / VOCABULARY.size
    assert broke < found["invalid"] + 0.05 < broke + 0.15 and found["invalid"] <= found["lost"]
    assert found["won"] + found["drawn"] + found["lost"] == pytest.approx(1)
    assert found["payoff"] == pytest.approx((found["payoff_0"] + found["payoff_1"]) / 2, abs=1e-5)


def test_mistakes_are_refused():
    with pytest.raises(Refused, match="call a function"):
        Match(kuhn_poker.prompts, self_play)
    with pytest.raises(Refused, match=r"KuhnTable.every_steps"):
        KuhnTable(TASK, every_steps=-1)
    with pytest.raises(Refused, match="must be self_play"):
        value(Match(TASK, functools.partial(single_turn, max_completion_tokens=1), prompts=2))
