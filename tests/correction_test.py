"""Measures of self-correction: four pairs by hand, the identities between them, and policies that are known."""

import numpy as np
import pytest

from mlrl import correction
from mlrl.types import Refused

# Two questions of two pairs: right and kept, right and spoiled; wrong and mended, wrong and left.
FIRST, SECOND = np.array([[1, 1], [0, 0]], bool), np.array([[1, 0], [1, 0]], bool)


def value(first, second):
    return {name: found["value"] for name, found in correction.statistics(first, second).items()}


def test_by_hand():
    found = value(FIRST, SECOND)
    wanted = {"accuracy@t1": 0.5, "accuracy@t2": 0.5, "delta": 0.0, "i->c": 0.25, "c->i": 0.25, "CL": 0.5, "CS": 0.5,
              "RSS": 0.5, "solved": 0.75}  # fmt: skip
    assert found == wanted and tuple(found) == correction.NAMES


def test_shares_are_of_each_question():
    np.testing.assert_array_equal(correction.shares(FIRST, SECOND), [[1.0, 0.5, 0.0], [0.0, 0.0, 0.5]])


def test_the_measures_fit_together():
    rng = np.random.default_rng(0)
    first, second = rng.random((50, 10)) < 0.4, rng.random((50, 10)) < 0.6
    found = value(first, second)
    before, after = found["accuracy@t1"], found["accuracy@t2"]
    assert (before, after) == (pytest.approx(first.mean()), pytest.approx(second.mean()))
    assert found["delta"] == pytest.approx(found["i->c"] - found["c->i"])
    assert after == pytest.approx(before * found["CL"] + (1 - before) * found["CS"])
    assert found["CL"] == pytest.approx(1 - found["c->i"] / before)
    assert found["CS"] == pytest.approx(found["i->c"] / (1 - before))


def test_known_policies():
    first = np.random.default_rng(0).random((400, 10)) < 0.3
    fresh = np.random.default_rng(1).random((400, 10)) < 0.3
    copier, flip = value(first, first), value(first, ~first)
    assert (copier["CL"], copier["CS"], copier["delta"]) == (1.0, 0.0, 0.0)
    assert (flip["CL"], flip["CS"]) == (0.0, pytest.approx(1.0))
    assert value(first, fresh)["RSS"] == pytest.approx(0.5, abs=0.03)  # questions are equally hard


def test_what_is_not_defined_is_nan():
    nothing, all_right = np.zeros((3, 2), bool), np.ones((3, 2), bool)
    never, always = correction.statistics(nothing, all_right), correction.statistics(all_right, nothing)
    assert np.isnan([never["CL"]["value"], never["RSS"]["low"], always["CS"]["value"], always["RSS"]["value"]]).all()
    assert (never["CS"]["value"], always["CL"]["value"]) == (1.0, 0.0)


def test_intervals_are_over_questions():
    """A question's pairs agree here, so that more of them make no interval narrower."""
    rng = np.random.default_rng(0)
    first, second = rng.random((200, 1)) < 0.5, rng.random((200, 1)) < 0.5
    one, ten = (correction.statistics(first.repeat(k, 1), second.repeat(k, 1)) for k in (1, 10))
    assert one == ten
    half = 1.96 * np.sqrt(0.25 / 200)
    found = one["accuracy@t1"]
    assert found["prompts"] == 200
    assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.15)


def test_shapes_are_checked():
    with pytest.raises(Refused, match=r"got \[2, 2\] and \[2, 1\]"):
        correction.shares(FIRST, SECOND[:, :1])
