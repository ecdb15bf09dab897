"""Curricula: weights that sum to 1, follow their schedule, and are refused when they do not fit."""

import jax
import numpy as np
import pytest
from rewarded_rows import build

from mlrl import curricula, vocabularies
from mlrl.tasks.mixtures import mixture
from mlrl.tasks.tables import table
from mlrl.types import Refused

VOCABULARY = vocabularies.characters("ab")
PARTS = [table([{"prompt": "a", "answer": "b"}], VOCABULARY, name=name) for name in ("easy", "middle", "hard")]
TASK = mixture(PARTS, [1, 1, 2], name="three")


def test_fixed_takes_the_tasks_own_rates():
    curriculum = curricula.fixed()
    state = curriculum.init(TASK)
    np.testing.assert_allclose(curriculum.weights(state), [0.25, 0.25, 0.5])
    np.testing.assert_allclose(curriculum.weights(curriculum.update(state, None, None)), [0.25, 0.25, 0.5])


def test_fixed_rates_are_normalized():
    curriculum = curricula.fixed((3, 0, 1))
    np.testing.assert_allclose(curriculum.weights(curriculum.init(TASK)), [0.75, 0, 0.25])


@pytest.mark.parametrize(
    "rates, words",
    [((1, 2), "one number for each"), ((1, -1, 1), "not negative"), ((0, 0, 0), "not all zero"),
     ((1, float("nan"), 1), "finite")],
)  # fmt: skip
def test_bad_rates_are_refused(rates, words):
    with pytest.raises(Refused, match=words):
        curricula.fixed(rates).init(TASK)


@pytest.mark.parametrize("jit", [False, True])
def test_easy_to_hard_moves_from_the_first_source_to_the_last(jit):
    curriculum = curricula.easy_to_hard(steps=4, rehearsal=0.0)
    weights, update = curriculum.weights, lambda state: curriculum.update(state, None, None)
    if jit:
        weights, update = jax.jit(weights), jax.jit(update)
    state, seen = curriculum.init(TASK), []
    for _ in range(6):
        seen.append(np.asarray(weights(state)))
        state = update(state)
    expected = [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1], [0, 0, 1]]
    np.testing.assert_allclose(seen, expected, atol=1e-6)


def test_rehearsal_keeps_what_was_reached():
    curriculum = curricula.easy_to_hard(steps=2, rehearsal=0.3)
    state = curriculum.init(TASK)
    np.testing.assert_allclose(curriculum.weights(state), [1, 0, 0], atol=1e-6)
    state = curriculum.update(curriculum.update(state, None, None), None, None)
    np.testing.assert_allclose(curriculum.weights(state), [0.1, 0.1, 0.8], atol=1e-6)


def test_a_single_source_has_all_the_weight():
    curriculum = curricula.easy_to_hard(steps=5)
    np.testing.assert_allclose(curriculum.weights(curriculum.init(PARTS[0])), [1.0])


@pytest.mark.parametrize("knobs, words", [({"steps": 0}, "at least 1"), ({"steps": 1, "rehearsal": 1.5}, "rehearsal")])
def test_bad_knobs_are_refused(knobs, words):
    with pytest.raises(Refused, match=words):
        curricula.easy_to_hard(**knobs)


def rows_of(advantages, sources, scored=None):
    """Rows of two tokens, a prompt's and an action, and the prompts they answer."""
    mask = np.tile([False, True], (len(sources), 1))
    batch = build(mask, np.zeros(len(sources)), group=np.arange(len(sources)), scored=scored)
    prompts = PARTS[0].at(np.zeros(len(sources), np.int32), np.zeros(len(sources), np.int32))
    return prompts.replace(source=np.asarray(sources, np.int32)), batch.replace(
        advantages=np.stack([np.full(len(sources), 9.0), advantages], axis=1).astype(np.float32)
    )


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def test_dump_by_hand():
    curriculum = curricula.dump(temperature=0.5)
    state = curriculum.init(TASK)
    np.testing.assert_allclose(curriculum.weights(state), [1 / 3] * 3, rtol=1e-6)
    scored = [True, True, True, False]
    state = jax.jit(curriculum.update)(state, *rows_of([1.0, -2.0, 0.5, 7.0], [0, 0, 2, 1], scored))
    assert state["rows"].tolist() == [2, 0, 1]
    bonus = np.sqrt(2 * np.log(3 + 1) / (np.asarray([2, 0, 1]) + 1))
    np.testing.assert_allclose(curriculum.weights(state), softmax((np.asarray([1.5, 0, 0.5]) + bonus) / 0.5), rtol=1e-5)
    greedy = curricula.dump(temperature=0.5, exploration=0.0)
    np.testing.assert_allclose(greedy.weights(state), softmax(np.asarray([1.5, 0, 0.5]) / 0.5), rtol=1e-5)


def test_dump_remembers_the_last_rows_of_each_source():
    curriculum = curricula.dump(window=3)
    state, update = curriculum.init(TASK), jax.jit(curriculum.update)
    state = update(state, *rows_of([1.0, 2, 3, 4], [1, 0, 1, 1]))
    state = update(state, *rows_of([5.0, 6, 7, 8], [1, 1, 2, 1]))
    state = update(state, *rows_of([1.0, 1, 1, 1], [2, 2, 2, 2]))
    assert [sorted(row) for row in state["recent"].tolist()] == [[0, 0, 2], [5, 6, 8], [1, 1, 1]]
    assert state["rows"].tolist() == [1, 6, 5]
    state = update(state, *rows_of([3.0, 0, 0, 0], [2, 0, 0, 0]))  # the oldest of its source goes
    assert sorted(state["recent"][2].tolist()) == [1, 1, 3]


def test_weights_are_logged_by_the_names_of_sources():
    assert curricula.as_metrics(np.asarray([0.5, 0.25, 0.25]), TASK) == {
        "curriculum/easy": 0.5, "curriculum/middle": 0.25, "curriculum/hard": 0.25}  # fmt: skip
    assert curricula.as_metrics(np.asarray([1.0]), PARTS[0]) == {}


@pytest.mark.parametrize("knobs, words", [({"window": 0}, "dump.window"), ({"temperature": 0.0}, "temperature > 0"),
                                          ({"exploration": -1.0}, "exploration >= 0")])  # fmt: skip
def test_bad_knobs_of_dump_are_refused(knobs, words):
    with pytest.raises(Refused, match=words):
        curricula.dump(**knobs)
