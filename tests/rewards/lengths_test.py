"""Rewards of lengths: scores, levels and targets by hand; the targets ride in the state and follow the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reward_worlds import prompts_of, rollout_of

from mlrl.rewards import lengths
from mlrl.rewards.lifting import in_graph
from mlrl.types import Refused

TEXTS = ["a", "abcd", "ab", "abcdef"]  # 2, 5, 3 and 7 tokens with their EOS


def right_are(*values):
    return in_graph(lambda rollout, prompts: jnp.asarray(values, jnp.float32), name="right")


def rows_of(texts, group=None):
    rollout = rollout_of(texts)
    return rollout.replace(group=np.zeros(len(texts), np.int32) if group is None else np.asarray(group, np.int32))


def scores(reward, texts=TEXTS, state=None, group=None):
    state = reward.init() if state is None else state
    update = jax.jit(lambda state, rollout, prompts: reward.update(state, rollout, prompts, None, None))
    rewards, state = update(state, rows_of(texts, group), prompts_of(len(texts)))
    assert set(rewards.check().parts) == set(reward.names)
    return np.asarray(rewards.tokens.sum(axis=1)), rewards, state


def test_truncation_and_laser_by_hand():
    right = right_are(1, 1, 0, 1)
    found, rewards, _ = scores(lengths.truncation(right, target_tokens=5))
    np.testing.assert_allclose(found, [1, 1, -0.5, -0.5])
    np.testing.assert_array_equal(rewards.outcome, [1, 1, 0, 1])
    found, rewards, _ = scores(lengths.laser(right, target_tokens=3))
    np.testing.assert_allclose(found, [1.5, 1, -0.5, 1])
    np.testing.assert_array_equal(rewards.parts["laser/within"], [1, 0, 1, 0])
    assert rewards.tokens[1, 6] == 1.0  # the EOS of a completion of four letters behind a prompt of two


def test_unscored_rows_stay_unscored_and_earn_nothing():
    found, rewards, _ = scores(lengths.laser(right_are(1, np.nan, 0, 1), target_tokens=9))
    np.testing.assert_allclose(found, [1.5, 0, -0.5, 1.5])
    np.testing.assert_array_equal(rewards.scored, [True, False, True, True])


def test_levels_are_thirds_of_a_groups_accuracy():
    right = np.asarray([1, 1, 0, 1, 0, 0, 0, 0, 0], bool)
    found = lengths.levels(jnp.asarray(right), jnp.repeat(jnp.arange(3), 3), jnp.ones(9, bool))
    np.testing.assert_array_equal(found, [2] * 3 + [1] * 3 + [0] * 3)


def test_expected_right_answers_of_a_group():
    assert [lengths.expected_right(g).tolist() for g in (8, 2)] == [[1, 2, 5], [1, 1, 1]]


def test_targets_by_hand():
    """Of 10 rows each: a fifth is enough where 5 are expected right, a half where 2 are, all where 1 is."""
    ladder, expected = jnp.asarray([4.0, 8.0, 12.0]), lengths.expected_right(8)
    below = jnp.asarray([[0, 5, 9.0], [2, 5, 9.0], [1, 2, 9.0]])
    rows, before = jnp.asarray([10.0, 10, 10]), jnp.asarray([1.0, 2, 3])
    found = lengths.targets_of(below, rows, jnp.float32(17), ladder, expected, before)
    np.testing.assert_array_equal(found, [17, 8, 8])
    found = lengths.targets_of(below, jnp.asarray([0.0, 10, 0]), jnp.float32(17), ladder, expected, before)
    np.testing.assert_array_equal(found, [1, 8, 3])


def test_laser_d_sets_targets_at_once_and_then_after_so_many_steps():
    """All right, so the level is high; of 4 rows 2 are expected right, and half of them have 2 and 3 tokens."""
    reward = lengths.laser_d(right_are(1, 1, 1, 1), lower_tokens=2, step_tokens=1, max_tokens=9, every_steps=2)
    found, rewards, state = scores(reward)
    np.testing.assert_allclose(found, [1.5, 1, 1.5, 1])
    np.testing.assert_array_equal(state["own"]["targets"], [9, 9, 3])
    np.testing.assert_array_equal(rewards.parts["laser_d/target_high"], [3] * 4)
    assert float(state["own"]["rows"].sum()) == 0.0  # a new window
    longer = ["abcd"] * 4
    _, _, state = scores(reward, longer, state)
    np.testing.assert_array_equal(state["own"]["targets"], [9, 9, 3])
    found, _, state = scores(reward, longer, state)
    np.testing.assert_array_equal(state["own"]["targets"], [9, 9, 5])
    np.testing.assert_allclose(found, [1.5] * 4)


def test_laser_de_spares_long_wrong_answers_that_do_not_repeat_themselves():
    reward = lengths.laser_de(right_are(0, 0, 0, 1), lower_tokens=2, step_tokens=1, max_tokens=4, ngram=2, times=2,
                              bonus=0.25)  # fmt: skip
    state = reward.init()
    state["own"] |= {"targets": jnp.full((3,), 4.0), "calls": jnp.int32(1)}
    found, _, _ = scores(reward, ["abcdef", "ababab", "ab", "ab"], state)
    np.testing.assert_allclose(found, [-0.25, -0.5, -0.5, 1.25])
    assert reward.names[-1] == "laser_de/target_high"
    plain = lengths.laser_d(right_are(0, 0, 0, 1), lower_tokens=2, step_tokens=1, max_tokens=4, bonus=0.25)
    np.testing.assert_allclose(scores(plain, ["abcdef", "ababab", "ab", "ab"], state)[0], [-0.5, -0.5, -0.5, 1.25])


def test_repeats_looks_at_actions_alone():
    rollout = rows_of(["ababa", "abcab", "aaaa", "xabyz"])  # every prompt is "ab"
    assert lengths.repeats(rollout, ngram=2, times=2).tolist() == [True, True, True, False]
    assert lengths.repeats(rollout, ngram=2, times=3).tolist() == [False, False, True, False]
    assert lengths.repeats(rollout, ngram=11, times=2).tolist() == [False] * 4  # longer than a row


def test_self_rewarded_efficiency_by_hand():
    found, _, _ = scores(lengths.self_rewarded_efficiency(right_are(1, 1, 0, 1), beta=0.5, eps=0.0))
    np.testing.assert_allclose(found, [1.5, 1.2, 0, 1.0], rtol=1e-6)  # lengths 2, 5 and 7: places 0, 3/5 and 1
    alone, _, _ = scores(lengths.self_rewarded_efficiency(right_are(1, 1, 0, 0)), group=[0, 1, 1, 2])
    np.testing.assert_allclose(alone, [1.2, 1.2, 0, 0], rtol=1e-6)


def test_a_host_reward_gives_numpy_arrays():
    reward = lengths.laser(lambda completion, example: float(len(completion) > 1), target_tokens=3)
    from reward_worlds import run

    rewards, _ = run(reward, TEXTS)
    assert isinstance(rewards.tokens, np.ndarray) and not reward.in_graph
    np.testing.assert_allclose(rewards.tokens.sum(axis=1), [-0.5, 1, 1.5, 1])


@pytest.mark.parametrize("make, words", [
    (lambda: lengths.laser(right_are(1), target_tokens=0), "laser.target_tokens"),
    (lambda: lengths.laser_d(right_are(1), lower_tokens=4, step_tokens=1, max_tokens=3), "laser_d.max_tokens"),
    (lambda: lengths.self_rewarded_efficiency(right_are(1), beta=-1), "beta must not be negative"),
])  # fmt: skip
def test_mistakes(make, words):
    with pytest.raises(Refused, match=words):
        make()
