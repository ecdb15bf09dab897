"""The greedy row of a group: it is the greedy completion, its neighbours are what they were without it."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from mlrl import prompts as prompts_lib
from mlrl import scoring
from mlrl.evaluation import Evaluation, evaluator
from mlrl.models.transformer import Config, Transformer, initialize
from mlrl.rewards import graph
from mlrl.rollouts.greedy import with_greedy_row
from mlrl.rollouts.single_turn import single_turn
from mlrl.sampling import GREEDY, Sampling
from mlrl.tasks import puzzles

TASK = puzzles.arithmetic(digits=1)
CONFIG = Config(width=16, layers=1, heads=2, kv_heads=1, head_width=8, mlp_width=24)
MODEL = Transformer(dataclasses.replace(CONFIG, vocabulary_size=TASK.vocabulary.size))
SHORT = functools.partial(single_turn, max_completion_tokens=3)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: 4 * x, initialize(MODEL, jax.random.key(1)))  # far from uniform


def rows(params, rollout_fn, group_size, sampling):
    batch = prompts_lib.first(TASK, 4)
    sample = functools.partial(rollout_fn, vocabulary=TASK.vocabulary, sampling=sampling, group_size=group_size)
    return jax.jit(functools.partial(sample, MODEL))(params, batch, jax.random.key(0)).check()


def test_the_last_row_of_a_group_is_greedy_and_the_others_are_sampled(params):
    sampling = Sampling(temperature=0.7)
    both = rows(params, functools.partial(with_greedy_row, rollout_fn=SHORT), 3, sampling)
    np.testing.assert_array_equal(both.role, [0, 0, 1] * 4)
    np.testing.assert_array_equal(both.group, np.repeat(np.arange(4), 3))
    greedy, drawn = np.asarray(both.role) == 1, np.asarray(both.role) == 0
    np.testing.assert_array_equal(both.tokens[greedy], rows(params, SHORT, 1, GREEDY).tokens)
    np.testing.assert_array_equal(both.tokens[drawn], rows(params, SHORT, 2, sampling).tokens)
    said = jax.jit(functools.partial(scoring.score, MODEL, temperature=0.7))(params, both).log_probs
    np.testing.assert_allclose(both.behavior_log_probs, np.where(both.action_mask, said, 0.0), atol=1e-5)


def test_a_group_of_one_and_evaluations_know_no_greedy_row(params):
    wrapped = functools.partial(with_greedy_row, rollout_fn=SHORT)
    same = rows(params, wrapped, 1, Sampling()), rows(params, SHORT, 1, Sampling())
    jax.tree.map(np.testing.assert_array_equal, *same)
    measured = Evaluation(TASK, graph.arithmetic, prompts=64, samples=2)
    plain, other = (evaluator((measured,), MODEL, f)(params, 0, 0) for f in (SHORT, wrapped))
    assert plain == other
