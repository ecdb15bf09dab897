"""Evaluation of judges: how often they tell the better completion, and what they think of their own."""

import functools

import jax
import numpy as np
import pytest

from mlrl.evaluation import evaluator
from mlrl.evaluation_judges import JudgeEvaluation, statistics
from mlrl.models.transformer import Config, Transformer, initialize
from mlrl.rollouts.single_turn import single_turn
from mlrl.tasks import languages, puzzles
from mlrl.types import Refused


def value(found, name):
    return found[name]["value"]


def test_a_judge_that_knows_and_one_that_is_wrong_and_one_that_always_says_the_same():
    quality = np.array([[0.1, 0.9, 0.5], [0.2, 0.2, 0.8]])
    for grades, auc, correlation in ((quality, 1.0, 1.0), (1 - quality, 0.0, -1.0), (0 * quality + 0.5, 0.5, np.nan)):
        found = statistics(grades, quality)
        assert value(found, "auc") == auc
        np.testing.assert_allclose(value(found, "correlation"), correlation, atol=1e-9)
        assert value(found, "grade") == pytest.approx(grades.mean()) and value(found, "unreadable") == 0.0


def test_what_cannot_be_read_is_in_no_pair_and_is_counted():
    grades = np.array([[np.nan, 0.9, 0.5], [np.nan, np.nan, 0.1]])
    found = statistics(grades, np.array([[0.1, 0.2, 0.9], [0.1, 0.2, 0.9]]))
    assert value(found, "auc") == 0.0  # of the one pair that is left
    assert value(found, "unreadable") == pytest.approx(0.5) and value(found, "grade") == pytest.approx((0.7 + 0.1) / 2)


def test_a_model_is_measured():
    task = languages.languages(split="test", candidates=2)
    evaluation = JudgeEvaluation(task, prompts=6)
    evaluation.require_candidates()
    small = Config(width=16, layers=1, heads=2, kv_heads=1, head_width=8, mlp_width=24,
                   vocabulary_size=task.vocabulary.size)  # fmt: skip
    model = Transformer(small)
    evaluate = evaluator((evaluation,), model, functools.partial(single_turn, max_completion_tokens=4))
    found = evaluate(initialize(model, jax.random.key(0)), 0, 1)[task.name]
    assert set(found) == {"auc", "correlation", "grade", "quality", "unreadable", "own_grade", "own_unreadable"}
    assert 0.9 <= value(found, "unreadable") <= 1.0 and 0.3 < value(found, "quality") < 0.95


def test_a_task_without_rated_completions_is_refused():
    with pytest.raises(Refused, match="no stored completions"):
        JudgeEvaluation(puzzles.arithmetic()).require_candidates()
    with pytest.raises(Refused, match="call a function"):
        JudgeEvaluation(puzzles.arithmetic)
