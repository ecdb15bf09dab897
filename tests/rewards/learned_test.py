"""The learned reward: which value of which model a row earns, and when it is refused."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import reward_worlds  # noqa: E402

from mlrl.rewards import combinators, learned, lift  # noqa: E402
from mlrl.types import Models, Refused  # noqa: E402

ROWS = ["abc", "", "abcd"]
ROLLOUT, PROMPTS = reward_worlds.rollout_of(ROWS), reward_worlds.prompts_of(len(ROWS))


def judging(values):
    """A reward model whose values are these [B,L]."""
    return lambda rollout: jnp.asarray(values)


def columns(scale):
    """Row b is worth scale * (100 b + column), so that a reward says where it was read."""
    rows, length = ROLLOUT.tokens.shape
    return scale * (100.0 * np.arange(rows)[:, None] + np.arange(length)[None])


def models(*values):
    return Models(*[None] * 4, reward_models=[judging(one) for one in values])


def test_a_row_earns_the_value_at_its_last_action():
    found = learned.score(models(columns(1.0)), ROLLOUT, PROMPTS)
    ends = [2 + len(text) for text in ROWS]  # the EOS stands behind a prompt of two tokens and the text
    np.testing.assert_allclose(found, [100 * row + end for row, end in enumerate(ends)])


def test_a_row_that_did_not_end_earns_what_is_set_and_one_without_actions_nothing():
    cut = ROLLOUT.replace(truncated=np.array([True, False, False]), action_mask=ROLLOUT.action_mask.copy())
    cut.action_mask[2] = False
    found = learned.score(models(columns(1.0)), cut, PROMPTS, unended=-7.0)
    np.testing.assert_allclose(found, [-7.0, 102.0, np.nan])
    rewards, _ = lift(learned.score).update((), cut, PROMPTS, None, models(columns(1.0)))
    np.testing.assert_array_equal(rewards.scored, [True, True, False])


def test_a_classifier_is_read_behind_the_last_action_also_where_the_row_is_full():
    """Column t + 1 of a causal model's values is what it thinks after token t: here the sum of tokens so far."""

    def judge(rollout):
        seen = jnp.where(rollout.valid, rollout.tokens, 0)
        return jnp.cumsum(seen, axis=1) - seen

    full = ROLLOUT.tokens[:, : 2 + len(ROWS[2]) + 1]
    cut = jax.tree.map(lambda x: x[:, : full.shape[1]] if np.shape(x)[1:] == ROLLOUT.tokens.shape[1:] else x, ROLLOUT)
    expected = np.where(cut.valid, full, 0).sum(axis=1)
    np.testing.assert_allclose(learned.behind_last_action(judge, cut), expected)
    np.testing.assert_allclose(learned.before_last_action(judge, cut), expected - reward_worlds.EOS)


def test_two_models_are_an_ensemble():
    second = lambda models, rollout, prompts: learned.score(models, rollout, prompts, which=1)  # noqa: E731
    both = combinators.weighted_sum([learned.score, second], [0.5, 0.5])
    rewards, _ = both.update(both.init(), ROLLOUT, PROMPTS, None, models(columns(1.0), columns(3.0)))
    np.testing.assert_allclose(rewards.tokens.sum(axis=1), 2 * learned.score(models(columns(1.0)), ROLLOUT, PROMPTS))


def test_a_model_that_is_not_there_is_refused():
    with pytest.raises(Refused, match="asks reward model 1, and the experiment has 1: set Experiment.reward_models"):
        learned.score(models(columns(1.0)), ROLLOUT, PROMPTS, which=1)
