"""A model's move probabilities: equal to what a rollout records, and exploitability of a model that is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mlrl.environments.games import kuhn_exact, kuhn_poker, reading, words
from mlrl.models.transformer import Config, Transformer, initialize
from mlrl.rollouts.self_play import self_play
from mlrl.sampling import Sampling
from mlrl.vocabularies import characters

VOCABULARY = characters("xbcfJQK+-12:")  # few, so that a model without training keeps the rules now and then
SETTINGS = dict(vocabulary=VOCABULARY, text=":")
MODEL = Transformer(Config(vocabulary_size=VOCABULARY.size, width=16, layers=1, heads=2, kv_heads=1, head_width=8,
                           mlp_width=24))  # fmt: skip


@functools.cache
def params():
    return jax.tree.map(lambda x: 2 * x, initialize(MODEL, jax.random.key(0)))


def moves_of(rows, b):
    """[(all that the player read and wrote before, without ends; what it wrote; its log-prob)] of a row."""
    heard, found = "", []
    for turn in range(2):
        mine = rows.valid[b, 1:] & (rows.turn[b, 1:] == turn)
        acted = rows.action_mask[b, 1:] & mine
        heard += VOCABULARY.decode(rows.tokens[b, 1:][mine & ~acted])
        found.append((heard, rows.tokens[b, 1:][acted].tolist(), rows.behavior_log_probs[b, 1:][acted].sum()))
        heard += VOCABULARY.decode(found[-1][1])
    return [move for move in found if move[1]]


def test_a_rollout_records_the_same_probabilities():
    one = list(VOCABULARY.alphabet)
    known = words.words(VOCABULARY, one + [a + b for a in one for b in one])
    place = {text: i for i, text in enumerate(known.texts)}
    sets = kuhn_poker.information_sets(VOCABULARY, text=":")
    chances = np.asarray(reading.policy_at_information_sets(
        MODEL, params(), sets, known, jnp.ones((12, len(place)), bool), vocabulary=VOCABULARY, max_move_tokens=2,
        temperature=0.8).moves)  # fmt: skip
    prompts = kuhn_poker.prompts(VOCABULARY, text=":").at(np.zeros(1, np.int32), np.zeros(1, np.int32))
    rows = jax.device_get(jax.jit(functools.partial(
        self_play, MODEL, vocabulary=VOCABULARY, sampling=Sampling(temperature=0.8), group_size=2**14,
        game=kuhn_poker.kuhn_poker(VOCABULARY), max_moves=3, max_move_tokens=2,
        opponent=kuhn_poker.at_random(VOCABULARY),
    ))(params(), prompts, jax.random.key(1)))  # fmt: skip
    seen, ended = set(), set()
    for b in np.flatnonzero(rows.action_mask.any(1)):
        for heard, tokens, log_prob in moves_of(rows, b):
            (card,) = set(heard) & set(kuhn_poker.CARDS)
            row = 3 * kuhn_poker.BETTING.index(heard.replace(card, "")) + kuhn_poker.CARDS.index(card)
            text = VOCABULARY.decode(tokens)
            if tokens == VOCABULARY.encode(text) + list(VOCABULARY.eos_ids) * (len(text) < 2) and text:
                np.testing.assert_allclose(chances[row, place[text]], np.exp(log_prob), rtol=1e-3)
                seen.add(row)
                ended.add(len(text))
    assert len(seen) == 12 and ended == {1, 2}
    table = reading.kuhn_table(MODEL, params(), temperature=0.8, **SETTINGS)
    names = [("x", "b")] * 6 + [("f", "c")] * 6
    np.testing.assert_allclose(table, [[chances[i, place[m]] for m in pair] for i, pair in enumerate(names)], rtol=1e-5)


def test_what_is_illegal_is_the_rest():
    known = words.words(VOCABULARY, [a for a in VOCABULARY.alphabet])
    prompts = kuhn_poker.information_sets(VOCABULARY, text=":", max_move_tokens=1)
    legal = jnp.ones((12, len(known.texts)), bool)
    found = reading.policy_at_information_sets(MODEL, params(), prompts, known, legal, vocabulary=VOCABULARY,
                                               max_move_tokens=1)  # fmt: skip
    special = 1 - found.moves.sum(1)  # padding, BOS and EOS are no moves
    np.testing.assert_allclose(found.illegal, special, atol=1e-6)
    assert (found.illegal > 0).all() and (found.moves > 0).all()
    fewer = reading.policy_at_information_sets(MODEL, params(), prompts, known, legal.at[:, 0].set(False),
                                               vocabulary=VOCABULARY, max_move_tokens=1)  # fmt: skip
    np.testing.assert_allclose(fewer.illegal - found.illegal, found.moves[:, 0], atol=1e-6)
    assert (fewer.moves[:, 0] == 0).all()


class TwoEnds:
    """The same characters; a move may end in either of two tokens."""

    size, pad_id, eos_ids = VOCABULARY.size, VOCABULARY.pad_id, (2, 1)
    encode, decode = staticmethod(VOCABULARY.encode), staticmethod(VOCABULARY.decode)


def test_any_end_ends_a_move():
    only = lambda eos: type("Only", (TwoEnds,), {"eos_ids": eos})  # noqa: E731
    prompts = kuhn_poker.information_sets(VOCABULARY, text=":")
    known = words.words(VOCABULARY, ["x", "bc"])

    def moves(vocabulary):
        return reading.policy_at_information_sets(MODEL, params(), prompts, known, jnp.ones((12, 2), bool),
                                                  vocabulary=vocabulary, max_move_tokens=2).moves  # fmt: skip

    both, first, second = moves(TwoEnds), moves(only((2,))), moves(only((1,)))
    np.testing.assert_allclose(both[:, 0], first[:, 0] + second[:, 0], rtol=1e-5)
    np.testing.assert_allclose(both[:, 1], first[:, 1], rtol=1e-5)  # fills its tokens: no end, and counted once


def test_a_model_without_a_preference():
    even = jax.tree.map(jnp.zeros_like, params())
    found = reading.kuhn_exploitability(MODEL, even, max_move_tokens=1, **SETTINGS)
    chance = 1 / VOCABULARY.size
    np.testing.assert_allclose(found["illegal"], 1 - 2 * chance, atol=1e-6)
    expected = kuhn_exact.exploitability(np.full((12, 2), chance))
    np.testing.assert_allclose([found[name] for name in expected._fields], expected, atol=1e-5)
