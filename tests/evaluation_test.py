"""Evaluation: numbers by hand, and the same prompts every time."""

import functools
import pathlib
import sys

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "loops"))

import worlds  # noqa: E402

from mlrl import evaluation  # noqa: E402
from mlrl.models.transformer import Transformer, initialize  # noqa: E402
from mlrl.rewards import combinators, graph  # noqa: E402
from mlrl.tasks import mixtures, puzzles  # noqa: E402
from mlrl.types import Refused  # noqa: E402


def test_sampled_results_by_hand():
    """Two prompts, four samples: 1 of 4 right (answers a b b c), and 4 of 4 right."""
    correct = np.asarray([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    answers = np.asarray([["a", "b", "b", "c"], ["x", "x", "x", "y"]], object)
    found = evaluation._sampled_results(correct, answers)
    assert found["mean@4"]["value"] == 0.625 and found["pass@1"]["value"] == 0.625
    np.testing.assert_allclose(found["pass@2"]["value"], (0.5 + 1.0) / 2)  # 1 - C(3,2)/C(4,2) = 0.5
    assert found["pass@4"]["value"] == 1.0
    assert found["maj@4"]["value"] == 0.5


def test_unscored_rows_leave_the_mean():
    assert evaluation.interval(np.asarray([1.0, np.nan, 0.0]))["prompts"] == 2
    assert evaluation.interval(np.asarray([1.0, np.nan, 0.0]))["value"] == 0.5


def test_every_source_of_a_mixture_is_reported_and_results_repeat():
    task = mixtures.mixture([puzzles.arithmetic(digits=1, split="test"), puzzles.arithmetic(digits=2, split="test")])
    measured = evaluation.Evaluation(task, graph.arithmetic, prompts=8, samples=2, every_steps=5)
    model = Transformer(worlds.sums().model.__class__(vocabulary_size=task.vocabulary.size, width=16, layers=1, heads=2,
                                                      kv_heads=1, head_width=8, mlp_width=24))  # fmt: skip
    run = evaluation.evaluator((measured,), model, worlds.ROLLOUT)
    params = initialize(model, jax.random.key(0))
    first = run(params, 0, 7)
    assert set(first) == {task.name, *(f"{task.name}/{source}" for source in task.sources)}
    assert first[task.name]["greedy"]["prompts"] == 8
    assert first == run(params, 5, 7) and run(params, 3, 7) == {} and run.due(7, 7)


def test_an_evaluation_of_text_uses_the_host_reward():
    experiment = worlds.sums()
    measured = evaluation.Evaluation(experiment.task, worlds.first_digit, prompts=4)
    model = Transformer(functools.partial(type(experiment.model), vocabulary_size=experiment.task.vocabulary.size)())
    params = initialize(model, jax.random.key(0))
    found = evaluation.evaluator((measured,), model, worlds.ROLLOUT)(params, 0, 0)
    assert 0.0 <= found[experiment.task.name]["greedy"]["value"] <= 1.0


def test_parts_of_the_reward_are_measured_by_source():
    task = mixtures.mixture([puzzles.arithmetic(digits=1, split="test"), puzzles.arithmetic(digits=2, split="test")])
    reward = combinators.weighted_sum([graph.arithmetic, graph.length_tokens], [1.0, 0.0])
    measured = evaluation.Evaluation(task, reward, prompts=4, parts=("length_tokens",))
    model = Transformer(worlds.TINY.__class__(**vars(worlds.TINY) | {"vocabulary_size": task.vocabulary.size}))
    found = evaluation.evaluator((measured,), model, worlds.ROLLOUT)(initialize(model, jax.random.key(0)), 0, 0)
    each = [found[f"{task.name}/{source}"]["length_tokens"] for source in task.sources]
    assert all(1 <= one["value"] <= 3 and one["prompts"] == 2 for one in each)
    assert found[task.name]["length_tokens"]["value"] == np.mean([one["value"] for one in each])
    with pytest.raises(Refused, match="names 'tokens', but the parts of its reward are arithmetic, length_tokens"):
        evaluation.Evaluation(task, reward, parts=("tokens",))
