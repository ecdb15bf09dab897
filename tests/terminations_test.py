"""Terminations of macro actions: by hand, over observations and turns, and what GAE makes of them."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from rewarded_rows import build

from mlrl import advantages, vocabularies
from mlrl.types import Refused

with_ = functools.partial

#               turn 0 ...........  turn 1 ......
MASK = np.array([[0, 1, 1, 1, 0, 1, 1, 1, 1, 0]], bool)
TURN = np.array([[0, 0, 0, 0, 0, 0, 0, 1, 1, 1]])
TOKENS = jnp.array([[7, 3, 5, 5, 5, 4, 4, 5, 3, 5]])


def rows(**given):
    batch = build(MASK, [1.0], group=[0], turn=TURN, **given)
    return batch.replace(rollout=batch.rollout.replace(tokens=TOKENS))


def spans(batch, termination):
    """The columns of each chunk's actions, and a check that numbers never fall and hold no gap."""
    chunk = np.asarray(termination(batch))[0]
    assert chunk.dtype == np.int32 and chunk[0] == 0 and set(np.diff(chunk)) <= {0, 1}
    return [np.flatnonzero(MASK[0] & (chunk == k)).tolist() for k in range(chunk.max() + 1)]


def test_chunks_by_hand_never_cross_an_observation_or_a_turn():
    batch = rows(old_log_probs=[[0, -1, -2, -2, 0, -3, -1, -0.5, -0.6, 0]])
    assert spans(batch, advantages.single_tokens) == [[1], [2], [3], [5], [6], [7], [8]]
    assert spans(batch, advantages.whole_sequence) == [[1, 2, 3], [5, 6], [7, 8]]
    assert spans(batch, with_(advantages.fixed_chunks, tokens=2)) == [[1, 2], [3], [5, 6], [7, 8]]
    assert spans(batch, with_(advantages.fixed_chunks, tokens=1)) == spans(batch, advantages.single_tokens)
    # 5 ends a chunk and a second 5 stays with it; one that opens a run is alone only if something follows it
    assert spans(batch, with_(advantages.after_tokens, ids=(5,))) == [[1, 2, 3], [5, 6], [7], [8]]
    assert spans(batch, advantages.rising_perplexity) == [[1], [2, 3], [5, 6], [7], [8]]
    assert spans(batch, with_(advantages.rising_perplexity, margin=0.5)) == [[1], [2, 3], [5, 6], [7, 8]]
    apart = with_(advantages.last_apart, termination=advantages.whole_sequence)
    assert spans(batch, apart) == [[1, 2, 3], [5, 6], [7], [8]]


def test_perplexity_may_be_the_references():
    batch = rows(reference_log_probs=[[0, -1, -1, -3, 0, -1, -1, -1, -1, 0]])
    reference = advantages.terminations.reference_log_probs
    found = spans(batch, with_(advantages.rising_perplexity, log_probs_of=reference))
    assert found == [[1, 2], [3], [5, 6], [7, 8]]


def test_random_chunks_have_the_lengths_that_are_named_and_change_with_step_and_row():
    wide = build(np.ones((6, 60), bool), np.zeros(6), group=range(6))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 9, (6, 60)))
    at = lambda version: wide.replace(
        rollout=wide.rollout.replace(tokens=tokens, policy_version=jnp.full(6, version, jnp.int32))
    )
    chunk = lambda batch, **kw: np.asarray(advantages.random_chunks(batch, **kw))
    first = chunk(at(0), lengths=(2, 5))
    lengths = [np.bincount(row)[:-1] for row in first]
    assert {int(n) for row in lengths for n in row} == {2, 5}
    np.testing.assert_array_equal(first, chunk(at(0), lengths=(2, 5)))
    assert len({row.tobytes() for row in first}) == 6
    assert (first != chunk(at(1), lengths=(2, 5))).any() and (first != chunk(at(0), lengths=(2, 5), seed=1)).any()
    np.testing.assert_array_equal(chunk(at(3), lengths=(1,)), advantages.single_tokens(at(3)))
    np.testing.assert_array_equal(chunk(at(3), lengths=(3,)), advantages.fixed_chunks(at(3), tokens=3))


def test_macro_gae_with_single_tokens_is_gae_and_with_whole_sequences_a_bandits():
    rng = np.random.default_rng(1)
    mask = np.array([[0, 1, 1, 0, 1, 1], [0, 1, 1, 1, 0, 0]], bool)
    rewards = rng.normal(size=(2, 6)).round(2)
    batch = build(mask, rewards, group=[0, 0], values=rng.normal(size=(2, 6)), valid=np.ones((2, 6), bool))
    kw = dict(discount=0.9, gae_lambda=0.7)
    macro = advantages.macro_gae(batch, termination=advantages.single_tokens, **kw)
    for a, b in zip(macro, advantages.gae(batch, value_lambda=0.7, **kw)):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    found, returns = advantages.macro_gae(batch, termination=advantages.whole_sequence, gae_lambda=0.7)
    score, value = rewards[1, 1:].sum(), np.asarray(batch.values)[1, 1:4].mean()
    np.testing.assert_allclose(found[1], np.where(mask[1], score - value, 0.0), rtol=1e-5)
    np.testing.assert_allclose(returns[1], np.where(mask[1], score, 0.0), rtol=1e-5)


def test_what_ends_a_chunk_is_spelled_and_mistakes_are_refused():
    assert advantages.spelled(vocabularies.characters("0123,="), text=",=") == tuple(
        vocabularies.characters("0123,=").encode(",=")
    )
    batch = rows()
    with pytest.raises(Refused, match="after_tokens.ids is empty"):
        advantages.after_tokens(batch, ids=())
    with pytest.raises(Refused, match="fixed_chunks.tokens must be a whole number of at least 1"):
        advantages.fixed_chunks(batch, tokens=0)
    for wrong in ((), (2, 0)):
        with pytest.raises(Refused, match="random_chunks.lengths must be a whole number of at least 1"):
            advantages.random_chunks(batch, lengths=wrong)
