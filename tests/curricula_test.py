"""Curricula: weights that sum to 1, follow their schedule, and are refused when they do not fit."""

import jax
import numpy as np
import pytest

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
