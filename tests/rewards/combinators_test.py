"""The combinators: numbers worked out by hand, jitted and not, and unscored rows that stay unscored."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reward_worlds import prompts_of, rollout_of, run

from mlrl.rewards.combinators import center, chain, clip, gate, potential_shaping, scale, weighted_sum
from mlrl.rewards.completions import per_completion
from mlrl.rewards.lifting import in_graph
from mlrl.types import Refused

TEXTS = ["abc", "", "zz"]  # actions in columns 2-5, 2, and 2-4
NAN = float("nan")


def fixed(name, *values):
    """An in-graph reward of given values [B]."""
    return in_graph(lambda rollout, prompts: jnp.array(values, jnp.float32), name=name)


def update(reward, jit, state=None):
    def step(state, rollout, prompts):
        return reward.update(state, rollout, prompts, None, None)

    step = jax.jit(step) if jit else step
    rewards, state = step(reward.init() if state is None else state, rollout_of(TEXTS), prompts_of(3))
    return rewards.check(), state


def sums(rewards):
    return np.asarray(rewards.tokens.sum(axis=1))


both = pytest.mark.parametrize("jit", [False, True])


@both
def test_weighted_sum(jit):
    reward = weighted_sum([fixed("a", 1, 2, 3), fixed("b", 10, 20, 30)], [0.5, -0.1])
    rewards, _ = update(reward, jit)
    np.testing.assert_allclose(sums(rewards), [-0.5, -1, -1.5], rtol=1e-6)
    np.testing.assert_array_equal(rewards.outcome, [1, 2, 3])
    np.testing.assert_array_equal(rewards.parts["b"], [10, 20, 30])
    assert reward.in_graph and set(reward.names) == {"a", "b", "unscored/a", "unscored/b"} == set(
        rewards.parts
    )
    assert rewards.tokens[0, 5] == -0.5 and rewards.tokens[1, 2] == -1.0


def test_weighted_sum_outcome_and_unscored_rows():
    a, b, c = fixed("a", 1, NAN, 3), fixed("b", 10, 20, 30), fixed("c", NAN, 1, 1)
    rewards, _ = update(weighted_sum([a, b], [1.0, 1.0], outcome=1), False)
    np.testing.assert_array_equal(rewards.scored, [True, False, True])
    np.testing.assert_array_equal(rewards.outcome, [10, 0, 30])
    np.testing.assert_array_equal(sums(rewards), [11, 0, 33])
    np.testing.assert_array_equal(rewards.parts["b"], [10, 20, 30])  # b itself was scored everywhere
    rewards, _ = update(weighted_sum([b, c], [1.0, 0.0]), False)  # weight 0.0: c is only logged
    np.testing.assert_array_equal(rewards.scored, [True] * 3)
    np.testing.assert_array_equal(sums(rewards), [10, 20, 30])
    rewards, _ = update(weighted_sum([b, c], [1.0, 0.0], outcome=1), False)  # but here it is the outcome
    np.testing.assert_array_equal(rewards.scored, [False, True, True])


def test_weighted_sum_mistakes():
    a = fixed("a", 1, 2, 3)
    with pytest.raises(Refused, match="one weight for each reward, got 1 rewards, 2 weights"):
        weighted_sum([a], [1.0, 2.0])
    with pytest.raises(Refused, match="outcome=1 must be the number of a reward, 0 to 0"):
        weighted_sum([a], [1.0], outcome=1)
    with pytest.raises(Refused, match="two rewards report a part called 'a'"):
        weighted_sum([a, clip(a, 0, 1)], [1.0, 1.0])


def test_weights_may_be_traced():
    """A sweep over weights is a vmap."""

    def total(weight):
        reward = weighted_sum([fixed("a", 1, 2, 3), fixed("b", 10, 20, 30)], [1.0, weight])
        return reward.update(reward.init(), rollout_of(TEXTS), prompts_of(3), None, None)[0].tokens.sum(
            axis=1
        )

    result = jax.jit(jax.vmap(total))(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(result, [[1, 2, 3], [11, 22, 33]])


@both
def test_gate(jit):
    reward = gate(fixed("a", 1, 2, NAN), fixed("by", 0.0, 0.5, 0.5), threshold=0.25)
    rewards, _ = update(reward, jit)
    np.testing.assert_array_equal(sums(rewards), [0, 2, 0])
    np.testing.assert_array_equal(rewards.outcome, [1, 2, 0])
    np.testing.assert_array_equal(rewards.scored, [True, True, False])
    rewards, _ = update(gate(fixed("a", 1, 2, 3), fixed("by", NAN, 1, 0)), jit)
    np.testing.assert_array_equal(rewards.scored, [False, True, True])


@both
def test_scale_and_clip(jit):
    rewards, _ = update(scale(fixed("a", 1, -2, NAN), 3.0), jit)
    np.testing.assert_array_equal(sums(rewards), [3, -6, 0])
    np.testing.assert_array_equal(rewards.outcome, [1, -2, 0])
    rewards, _ = update(clip(fixed("a", 5, -5, 0), 1.0, 2.0), jit)
    np.testing.assert_array_equal(sums(rewards), [2, 1, 1])
    np.testing.assert_array_equal((np.asarray(rewards.tokens) != 0).sum(axis=1), [1, 1, 1])
    np.testing.assert_array_equal(rewards.outcome, [5, -5, 0])
    with pytest.raises(Refused, match="low <= high"):
        clip(fixed("a", 1, 2, 3), 1.0, 0.0)


def test_clip_of_a_reward_per_token_takes_the_rest_from_the_last_action():
    dense = in_graph(lambda rollout, prompts: jnp.ones(rollout.tokens.shape), name="dense")
    rewards, _ = update(clip(dense, 0.0, 2.0), False)
    np.testing.assert_array_equal(rewards.tokens[0], [0, 0, 1, 1, 1, -1, 0, 0, 0, 0])
    np.testing.assert_array_equal(rewards.tokens[1], [0, 0, 1, 0, 0, 0, 0, 0, 0, 0])


@both
def test_center(jit):
    reward = center(fixed("a", 1, 5, NAN), decay=0.5)
    rewards, state = update(reward, jit)
    np.testing.assert_array_equal(sums(rewards), [1, 5, 0])  # nothing is known yet
    rewards, state = update(reward, jit, state)
    np.testing.assert_array_equal(sums(rewards), [-2, 2, 0])  # mean (1 + 5) / 2
    np.testing.assert_array_equal(rewards.outcome, [1, 5, 0])
    assert float(state["total"]) == 0.5 * 6 + 6 and float(state["count"]) == 0.5 * 2 + 2
    with pytest.raises(Refused, match="decay"):
        center(fixed("a", 1, 1, 1), decay=0.0)


def test_chain_applies_first_to_last():
    a = fixed("a", 1, 2, 3)
    transforms = [functools.partial(scale, factor=2.0), functools.partial(clip, low=0.0, high=5.0)]
    np.testing.assert_array_equal(sums(update(chain(a, transforms), False)[0]), [2, 4, 5])
    np.testing.assert_array_equal(sums(update(chain(a, transforms[::-1]), False)[0]), [2, 4, 6])
    assert chain(a, []) is a


@both
def test_potential_shaping(jit):
    def column(rollout, prompts):
        return jnp.where(rollout.valid, 1.0 + jnp.arange(rollout.tokens.shape[1]), jnp.nan)

    reward = potential_shaping(fixed("a", 10, 20, 30), column, discount=0.5)
    rewards, _ = update(reward, jit)
    # row 0 acts in columns 2-5, potentials 3 4 5 6: 4/2-3, 5/2-4, 6/2-5, and the end: 10 + 0-6
    np.testing.assert_array_equal(rewards.tokens[0], [0, 0, -1, -1.5, -2, 4, 0, 0, 0, 0])
    np.testing.assert_array_equal(rewards.tokens[1], [0, 0, 17, 0, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(rewards.outcome, [10, 20, 30])


def test_potential_shaping_skips_what_the_policy_did_not_choose_and_telescopes():
    rollout = rollout_of(TEXTS)
    mask = np.array(rollout.action_mask)
    mask[0, 3:5] = False  # a tool's answer between the actions in columns 2 and 5
    rollout = rollout.replace(action_mask=mask)
    potential = np.random.default_rng(0).normal(size=mask.shape).astype(np.float32)
    zero = in_graph(lambda rollout, prompts: jnp.zeros(3), name="zero")
    reward = potential_shaping(zero, lambda rollout, prompts: potential, discount=1.0)
    rewards, _ = reward.update(reward.init(), rollout, prompts_of(3), None, None)
    np.testing.assert_allclose(rewards.tokens[0, 2], potential[0, 5] - potential[0, 2], rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(rewards.tokens[0, 3:5]), [0, 0])
    np.testing.assert_allclose(sums(rewards), -potential[:, 2], rtol=1e-5)  # whatever was done
    potential[1, 2] = np.nan
    rewards, _ = reward.update(reward.init(), rollout, prompts_of(3), None, None)
    np.testing.assert_array_equal(rewards.scored, [True, False, True])
    assert np.isfinite(np.asarray(rewards.tokens)).all()
    wrong = potential_shaping(zero, lambda rollout, prompts: jnp.zeros(3))
    with pytest.raises(Refused, match=r"must return shape \[B,L\]=\[3, 10\], got \[3\]"):
        update(wrong, False)


def letters(completion, example):
    if completion == "zz":
        raise ValueError
    return len(completion)


def test_host_and_graph_together():
    reward = weighted_sum([per_completion(letters, max_unscored_share=0.5), fixed("a", 1, 2, 3)], [1.0, 1.0])
    assert not reward.in_graph
    rewards, state = run(reward, TEXTS)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(rewards))
    np.testing.assert_array_equal(rewards.tokens.sum(axis=1), [4, 2, 0])
    np.testing.assert_array_equal(rewards.scored, [True, True, False])
    assert state == ((), ())


def test_combinators_lift_their_arguments():
    def tokens(rollout, prompts):
        return rollout.action_mask.sum(axis=1)

    np.testing.assert_array_equal(sums(update(scale(tokens, 2.0), True)[0]), [8, 2, 6])
