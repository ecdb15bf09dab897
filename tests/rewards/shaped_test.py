"""Shaping by hand: statistics of all rows so far, and preferences over answers of the reference."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reward_worlds import Letters, prompts_of, rollout_of

from mlrl.rewards import graph, shaped
from mlrl.rewards.combinators import weighted_sum
from mlrl.rewards.lifting import in_graph
from mlrl.types import Models, Refused

A = Letters().encode("a")[0]
PROXY = in_graph(lambda rollout, prompts: graph.token_count(rollout, prompts, token=A), name="proxy")
logistic = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731


def scores(reward, texts, state=None, answers=()):
    """The sums of rows in groups of two; `answers` are what the reference says."""
    pairs = np.arange(len(texts), dtype=np.int32) // 2
    models = Models(None, None, None, lambda prompts, key: rollout_of(answers))
    update = jax.jit(lambda *given: reward.update(*given, None, models))
    state = reward.init() if state is None else state
    rewards, state = update(state, rollout_of(texts).replace(group=pairs), prompts_of(len(texts)))
    assert set(rewards.check().parts) == set(reward.names)
    return np.asarray(rewards.tokens.sum(axis=1)), rewards, state


def test_statistics_are_those_of_all_rows_so_far():
    first, second = np.asarray([3.0, 5.0, 100.0]), np.asarray([4.0, 1.0, 7.0])
    scored = np.asarray([True, True, False])
    found = shaped.with_rows(shaped.statistics(), first, scored)
    found = shaped.with_rows(found, second, np.ones(3, bool))
    rows = [3, 5, 4, 1, 7]
    np.testing.assert_allclose([found["count"], found["mean"], found["low"], found["high"]], [5, 4, 1, 7])
    np.testing.assert_allclose(found["squares"] / 5, np.var(rows), rtol=1e-6)
    none = shaped.with_rows(found, second, np.zeros(3, bool))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(a == b), none, found))


def test_controls_by_hand():
    texts = ["", "a", "aa", "aaaaa"]  # mean 2, deviation sqrt(14 / 4)
    spread = math.sqrt(14 / 4)
    found, rewards, state = scores(shaped.standardize(PROXY, eps=0.0), texts)
    np.testing.assert_allclose(found, np.asarray([-2, -1, 0, 3]) / spread, rtol=1e-6)
    np.testing.assert_array_equal(rewards.outcome, [0, 1, 2, 5])
    np.testing.assert_array_equal(rewards.parts["standardize/raw"], [0, 1, 2, 5])
    found, _, _ = scores(shaped.standardize(PROXY, eps=0.0), ["aaaa"] * 4, state)  # mean 3 over both steps
    np.testing.assert_allclose(found, [1 / math.sqrt(22 / 8)] * 4, rtol=1e-6)
    found, _, _ = scores(shaped.clip_to_deviation(PROXY), texts)
    np.testing.assert_allclose(found, [2 - spread, 1, 2, 2 + spread], rtol=1e-6)
    found, _, _ = scores(shaped.minmax(PROXY, eps=0.0), texts)
    np.testing.assert_allclose(found, [0, 0.2, 0.4, 1], rtol=1e-6)
    found, _, _ = scores(shaped.sigmoid(PROXY, shift=1.0), texts)
    np.testing.assert_allclose(found, [logistic(x) for x in (-1, 0, 1, 4)], rtol=1e-6)


def test_par_is_the_mean_preference_over_the_references_answers_of_the_group():
    texts, answers = ["aa", "", "aaaa", "a"], ["a", "aaa", "", ""]
    found, rewards, state = scores(shaped.par(PROXY, steepness=2.0), texts, answers=answers)
    expected = [(logistic(2) + logistic(-2)) / 2, (logistic(-2) + logistic(-6)) / 2, logistic(8), logistic(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(rewards.parts["par/reference"], [2, 2, 0, 0])
    np.testing.assert_array_equal(rewards.parts["par/raw"], [2, 0, 4, 1])
    assert int(state["calls"]) == 1
    found, _, _ = scores(shaped.centred_linear(PROXY), texts, answers=answers)
    np.testing.assert_allclose(found, [0, -0.5, 1, 0.25], rtol=1e-6)


def test_par_samples_anew_in_every_step():
    keys = []
    reward = shaped.par(PROXY)
    models = Models(None, None, None, lambda prompts, key: keys.append(key) or rollout_of(["a", "b"]))
    state = reward.init()
    for _ in range(2):
        _, state = reward.update(state, rollout_of(["a", "b"]), prompts_of(2), None, models)
    assert not (jax.random.key_data(keys[0]) == jax.random.key_data(keys[1])).all()


def test_a_proxy_s_outcome_stays_the_truth():
    truth = in_graph(lambda rollout, prompts: jnp.asarray([1.0, 0.0]), name="truth")
    proxy = weighted_sum([truth, PROXY], [1.0, 0.5])
    found, rewards, _ = scores(shaped.sigmoid(proxy), ["", "aaaa"])
    np.testing.assert_allclose(found, [logistic(1), logistic(2)], rtol=1e-6)
    np.testing.assert_array_equal(rewards.outcome, [1, 0])


def test_rows_without_a_scored_reference_are_unscored():
    nan = in_graph(lambda rollout, prompts: jnp.where(rollout.tokens[:, 2] == A, jnp.nan, 1.0), name="nan")
    found, rewards, _ = scores(shaped.par(nan), ["b", "b", "b", "a"], answers=["a", "a", "a", "b"])
    assert rewards.scored.tolist() == [False, False, True, False]
    np.testing.assert_allclose(found, [0, 0, 0.5, 0])


def test_mistakes():
    with pytest.raises(Refused, match="its reward is on the host"):
        shaped.par(lambda completion, example: 1.0)
    with pytest.raises(Refused, match="steepness must be above 0"):
        shaped.par(PROXY, steepness=0.0)
