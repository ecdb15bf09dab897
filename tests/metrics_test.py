"""Statistics of evaluation: pass@k against counting, votes, intervals against known tables, calibration."""

import itertools

import numpy as np
import pytest

from mlrl import metrics
from mlrl.types import Refused


def test_pass_at_four_of_four_with_one_right_is_one():
    assert float(metrics.pass_at_k(4, 1, 4)) == 1.0


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_counts_every_draw(k):
    n, right = 6, [0, 1, 2, 5, 6]
    counted = [
        np.mean([any(i < c for i in draw) for draw in itertools.combinations(range(n), k)]) for c in right
    ]
    np.testing.assert_allclose(metrics.pass_at_k(n, np.array(right), k), counted, rtol=1e-12)


def test_pass_at_k_takes_a_count_per_prompt_and_refuses_too_few():
    np.testing.assert_allclose(metrics.pass_at_k(np.array([2, 4]), np.array([1, 1]), 2), [1.0, 0.5])
    with pytest.raises(Refused, match="pass@5 needs at least 5 samples per prompt, found 4"):
        metrics.pass_at_k(4, np.array([1, 2]), 5)
    with pytest.raises(Refused, match="between 0 and the number of samples"):
        metrics.pass_at_k(4, np.array([5]), 2)


def test_votes():
    assert metrics.majority_correct(["7", "8", "7"], [True, False, True]) == 1.0
    assert metrics.majority_correct(["7", "8", "8"], [True, False, False]) == 0.0
    assert metrics.majority_correct(["7", "8"], [True, False]) == 0.5  # a tie is a coin flip
    assert metrics.majority_correct([None, None, "7"], [False, False, True]) == 1.0  # no answer never votes
    assert metrics.majority_correct([None, None], [False, False]) == 0.0
    answers, right = ["7", "8", "7", "8", "8", "7"], [True, False, True, False, False, True]
    assert metrics.majority_at_k(answers, right, k=3) == 0.5
    assert metrics.majority_at_k(answers, right, k=1) == 0.5
    with pytest.raises(Refused, match="maj@7 needs at least 7"):
        metrics.majority_at_k(answers, right, k=7)


def test_wilson_against_the_closed_form():
    # z = 1.959964: for 8 of 10 the published interval is (0.490, 0.943); for 0 of 10 (0, 0.278)
    mean, low, high = metrics.wilson_interval(8, 10)
    assert (mean, round(low, 3), round(high, 3)) == (0.8, 0.490, 0.943)
    assert np.allclose(metrics.wilson_interval(0, 10), (0.0, 0.0, 0.2775), atol=1e-4)
    with pytest.raises(Refused):
        metrics.wilson_interval(0, 0)


def test_students_t_over_five_seeds():
    # t(4, 0.975) = 2.776445; the mean is 0.3, the sample std sqrt(0.025)
    mean, low, high = metrics.t_interval([0.1, 0.2, 0.3, 0.4, 0.5])
    half = 2.776445 * np.sqrt(0.025) / np.sqrt(5)
    np.testing.assert_allclose([mean, low, high], [0.3, 0.3 - half, 0.3 + half], rtol=1e-5)
    assert metrics.t_interval([0.3]) == (0.3, -np.inf, np.inf)
    with pytest.raises(Refused):
        metrics.t_interval([])


def test_bootstrap_is_repeatable_and_covers():
    samples = np.random.default_rng(0).normal(size=200)
    interval = metrics.bootstrap_interval(samples, resamples=500)
    assert interval == metrics.bootstrap_interval(samples, resamples=500)
    assert interval.mean == pytest.approx(samples.mean())
    half = 1.96 * samples.std() / np.sqrt(200)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.15)
    assert metrics.bootstrap_interval(np.ones((5, 3)), resamples=10) == (1.0, 1.0, 1.0)


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    wilson = [metrics.wilson_interval(x, 20) for x in rng.binomial(20, 0.3, 400)]
    assert 0.92 < np.mean([i.low <= 0.3 <= i.high for i in wilson]) < 0.99
    student = [metrics.t_interval(rng.normal(size=5)) for _ in range(400)]
    assert 0.92 < np.mean([i.low <= 0.0 <= i.high for i in student]) < 0.98


def test_explained_variance():
    target, mask = np.array([1.0, 2.0, 3.0, np.nan]), np.array([True, True, True, False])
    assert metrics.explained_variance(target, target, mask) == 1.0
    assert metrics.explained_variance(target + 5, target, mask) == 1.0  # a constant error is not variance
    assert metrics.explained_variance(np.zeros(4), target, mask) == 0.0
    assert metrics.explained_variance(-target, target, mask) == pytest.approx(-3.0)
    assert np.isnan(metrics.explained_variance(target, np.ones(4), mask))


def test_calibration():
    assert metrics.brier([0.8, 0.4], [1, 0]) == pytest.approx((0.04 + 0.16) / 2)
    # two bins of equal mass: means 0.15 and 0.75, frequencies 0.5 and 1.0
    error = metrics.expected_calibration_error([0.7, 0.1, 0.8, 0.2], [True, False, True, True], bins=2)
    assert error == pytest.approx(0.5 * 0.35 + 0.5 * 0.25)
    assert metrics.auroc([0.9, 0.4, 0.4, 0.1], [True, True, False, False]) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert np.isnan(metrics.auroc([0.1], [True]))
