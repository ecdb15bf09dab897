"""Judgements of stored completions, by hand."""

import numpy as np
import pytest
from jax import numpy as jnp

from mlrl import evaluation_stored, reductions
from mlrl.types import Batch, Rewards, Rollout, Scores

LOG3 = float(np.log(3.0))  # log-odds of 3/4


def test_statistics_by_hand():
    """Two prompts: right at p = 3/4 and wrong at 3/4, then a tie; one judgement is missing."""
    odds, truth = [[LOG3, LOG3], [0.0, 9.0]], [[1.0, 0.0], [1.0, np.nan]]
    found = evaluation_stored.statistics(np.asarray(odds), np.asarray(truth))
    value = {name: r["value"] for name, r in found.items()}
    assert value["accuracy"] == pytest.approx((0.5 + 0.5) / 2)
    assert value["log_loss"] == pytest.approx(((np.log(4 / 3) + np.log(4)) / 2 + np.log(2)) / 2)
    assert value["brier"] == pytest.approx(((1 / 16 + 9 / 16) / 2 + 1 / 4) / 2)
    # three bins of one judgement each: sure 0.75 and right, sure 0.75 and wrong, sure 0.5 and (a tie) half right
    assert value["calibration_error"] == pytest.approx((0.25 + 0.75 + 0.0) / 3)
    assert all(r["prompts"] == 2 and r["low"] <= r["value"] <= r["high"] for r in found.values())


def test_the_order_of_a_pair_does_not_matter():
    rng = np.random.default_rng(0)
    odds, truth = rng.normal(size=(20, 1)), (rng.random((20, 1)) < 0.5).astype(float)
    flip = rng.random((20, 1)) < 0.5
    turned = evaluation_stored.statistics(np.where(flip, -odds, odds), np.where(flip, 1 - truth, truth))
    assert turned == evaluation_stored.statistics(odds, truth)


def test_a_calibrated_judge_has_a_small_error_and_an_overconfident_one_a_large():
    rng = np.random.default_rng(0)
    odds = rng.normal(size=(4000, 1))
    truth = (rng.random((4000, 1)) < 1 / (1 + np.exp(-odds))).astype(float)
    error = lambda scale: evaluation_stored.statistics(scale * odds, truth)["calibration_error"]["value"]
    assert error(1.0) < 0.03 < 0.15 < error(5.0)


def test_nothing_to_judge():
    found = evaluation_stored.statistics(np.zeros((2, 1)), np.full((2, 1), np.nan))
    assert all(r["prompts"] == 0 and np.isnan(r["value"]) for r in found.values())


def rows(outcome, scored):
    b, length = len(outcome), 2
    mask, ints = jnp.ones((b, length), bool), jnp.zeros(b, jnp.int32)
    zeros = jnp.zeros((b, length))
    rollout = Rollout(jnp.zeros((b, length), jnp.int32), mask, mask, zeros, jnp.zeros((b, length), jnp.int32), ints,
                      ints, jnp.zeros(b, bool), ints)  # fmt: skip
    rewards = Rewards(zeros, jnp.asarray(outcome), jnp.asarray(scored), {})
    return Batch(rollout, rewards, zeros, zeros - 1.0, zeros, zeros, zeros, mask, reductions.token_mean(mask), zeros)


def test_pairs_by_hand():
    """Two prompts of three candidates; of the second only the last two have outcomes, and these are equal."""
    batch = rows([1.0, 0.0, 0.5, 0.0, 1.0, 1.0], [True, True, True, False, True, True])
    scores = Scores(*(jnp.arange(12.0).reshape(6, 2),) * 3)
    odds, truth = evaluation_stored.pairs(scores, batch, batch.advantages, 3)
    np.testing.assert_allclose(odds, 0.1 * np.asarray([[-4, -8, -4]] * 2), rtol=1e-5)  # pairs 01, 02, 12; beta 0.1
    np.testing.assert_array_equal(truth, [[1, 1, 0], [np.nan] * 3])


def test_steps_by_hand():
    labels = jnp.asarray([[np.nan, 1.0], [0.0, 1.0]])
    scores = Scores(*(jnp.asarray([[1.0, 2.0], [3.0, 4.0]]),) * 3)
    odds, truth = evaluation_stored.steps(scores, rows([1.0, 0.0], [True, True]), labels, 2)
    np.testing.assert_array_equal(odds, [[1, 2, 3, 4]])
    np.testing.assert_array_equal(truth, [[np.nan, 1, 0, 1]])
