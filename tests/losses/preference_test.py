"""Preference losses by hand, their pairs, and identities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import build, jit_and_plain

from mlrl import advantages
from mlrl.losses import contrasts, preference

LOG_PROBS = jnp.array([[-1.0, -2.0], [-0.5, -1.5]])  # chosen, rejected: sums -3 and -2, means -1.5 and -1
REFERENCE = jnp.array([[-2.0, -2.5], [-1.0, -0.5]])  # Delta: 1.5 and -0.5


def pair(log_probs=LOG_PROBS, reference=REFERENCE, **given):
    return build(np.ones((2, 2), bool), group=[0, 0], outcome=[1.0, 0.0], log_probs=log_probs,
                 reference_log_probs=reference, **given)  # fmt: skip


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def run(wrap, loss_fn, scores, batch):
    """(loss, metrics, gradient by log-probs) from one pass."""
    (loss, metrics), gradient = wrap(jax.value_and_grad(lambda s: loss_fn(s, batch), has_aux=True))(scores)
    return float(loss), metrics, gradient.log_probs


@jit_and_plain
def test_dpo_by_hand(wrap):
    loss, metrics, gradient = run(wrap, preference.dpo, *pair())
    assert loss == pytest.approx(-np.log(sigmoid(0.1 * 2.0)), rel=1e-5)
    slope = 0.1 * sigmoid(-0.2)
    np.testing.assert_allclose(gradient, [[-slope] * 2, [slope] * 2], rtol=1e-5)
    assert float(metrics["preference/accuracy"]) == 1.0
    assert float(metrics["preference/margin"]) == pytest.approx(0.2, rel=1e-5)
    assert float(metrics["preference/chosen_log_prob"]) == pytest.approx(-1.5)
    assert float(metrics["preference/rejected_log_prob"]) == pytest.approx(-1.0)


def test_dpo_at_equal_log_probs_is_log_two_and_order_is_by_outcome():
    assert run(jax.jit, preference.dpo, *pair(reference=LOG_PROBS))[0] == pytest.approx(np.log(2))
    scores, batch = pair()
    swapped = batch.replace(rewards=batch.rewards.replace(outcome=jnp.array([0.0, 1.0])))
    assert run(jax.jit, preference.dpo, scores, swapped)[0] == pytest.approx(-np.log(sigmoid(-0.2)), rel=1e-5)


def test_smoothed_dpo_and_its_likelihood_term():
    smooth = functools.partial(preference.dpo, contrast=functools.partial(contrasts.logistic, label_smoothing=0.1))
    expected = -0.9 * np.log(sigmoid(0.2)) - 0.1 * np.log(sigmoid(-0.2))
    assert run(jax.jit, smooth, *pair())[0] == pytest.approx(expected, rel=1e-5)
    with_nll = functools.partial(preference.dpo, nll_coef=1.0)
    loss, _, gradient = run(jax.jit, with_nll, *pair())
    assert loss == pytest.approx(-np.log(sigmoid(0.2)) + 1.5, rel=1e-5)
    assert float(gradient[0, 0]) == pytest.approx(-0.1 * sigmoid(-0.2) - 0.5, rel=1e-5)


@jit_and_plain
def test_ipo_by_hand(wrap):
    loss, _, gradient = run(wrap, preference.ipo, *pair())
    error = 0.75 + 0.25 - 5.0  # means of the log-ratios, 1 / (2 * 0.1)
    assert loss == pytest.approx(error**2, rel=1e-5)
    np.testing.assert_allclose(gradient, [[error] * 2, [-error] * 2], rtol=1e-5)


@jit_and_plain
def test_simpo_by_hand(wrap):
    loss, _, gradient = run(wrap, preference.simpo, *pair())
    margin = 2.0 * (-1.5 + 1.0 - 0.25)
    assert loss == pytest.approx(-np.log(sigmoid(margin)), rel=1e-5)
    slope = sigmoid(-margin)  # beta / length is 1
    np.testing.assert_allclose(gradient, [[-slope] * 2, [slope] * 2], rtol=1e-5)


@jit_and_plain
def test_cpo_by_hand(wrap):
    loss, _, gradient = run(wrap, preference.cpo, *pair())
    assert loss == pytest.approx(-np.log(sigmoid(-0.1)) + 1.5, rel=1e-5)
    slope = 0.1 * sigmoid(0.1)
    np.testing.assert_allclose(gradient, [[-slope - 0.5] * 2, [slope] * 2], rtol=1e-5)


@jit_and_plain
def test_orpo_by_hand(wrap):
    loss, _, gradient = run(wrap, preference.orpo, *pair())
    odds = lambda s: s - np.log(1 - np.exp(s))
    margin = odds(-1.5) - odds(-1.0)
    assert loss == pytest.approx(1.5 - 0.1 * np.log(sigmoid(margin)), rel=1e-5)
    slope = lambda s: 1 / (1 - np.exp(s))  # d odds / d s
    chosen = -0.5 - 0.1 * sigmoid(-margin) * slope(-1.5) / 2
    rejected = 0.1 * sigmoid(-margin) * slope(-1.0) / 2
    np.testing.assert_allclose(gradient, [[chosen] * 2, [rejected] * 2], rtol=1e-5)


def test_orpo_is_finite_for_certain_and_for_hopeless_tokens():
    certain = pair(log_probs=jnp.array([[0.0, 0.0], [-200.0, -200.0]]))
    loss, _, gradient = run(jax.jit, preference.orpo, *certain)
    assert np.isfinite(loss) and np.isfinite(gradient).all()


@jit_and_plain
def test_kto_by_hand(wrap):
    scores, batch = pair(old_log_probs=LOG_PROBS)
    sign, point = advantages.kto(batch)
    np.testing.assert_allclose(point, np.full((2, 2), 0.5))  # max(0, mean of 1.5 and -0.5)
    np.testing.assert_array_equal(sign, [[1, 1], [-1, -1]])
    kto = functools.partial(preference.kto, desirable_weight=2.0)
    loss, _, gradient = run(wrap, kto, scores, batch.replace(advantages=sign, returns=point))
    good, bad = sigmoid(0.1 * (1.5 - 0.5)), sigmoid(0.1 * (0.5 + 0.5))
    assert loss == pytest.approx((2 * (1 - good) + (1 - bad)) / 2, rel=1e-5)
    slopes = [-0.1 * 2 * good * (1 - good) / 2, 0.1 * bad * (1 - bad) / 2]
    np.testing.assert_allclose(gradient, [[slopes[0]] * 2, [slopes[1]] * 2], rtol=1e-4)


def test_ktos_reference_point_can_come_from_mismatched_rows_and_is_never_negative():
    _, batch = pair(old_log_probs=LOG_PROBS, role=jnp.array([0, 1]))
    np.testing.assert_allclose(advantages.kto(batch, reference_role=1)[1], np.zeros((2, 2)))  # max(0, -0.5)
    np.testing.assert_allclose(advantages.kto(batch, reference_role=0)[1], np.full((2, 2), 1.5))


def test_kto_far_from_the_reference_saturates():
    far = jnp.array([[-1.0, -2.0], [-400.0, -400.0]])
    scores, batch = pair(log_probs=far + 0.0, reference=far - jnp.array([[500.0], [-300.0]]))
    batch = batch.replace(advantages=jnp.array([[1.0, 1], [-1, -1]]), returns=jnp.zeros((2, 2)))
    loss, _, gradient = run(jax.jit, preference.kto, scores, batch)
    assert loss == pytest.approx(0.0, abs=1e-6)
    np.testing.assert_allclose(gradient, np.zeros((2, 2)), atol=1e-6)


@jit_and_plain
def test_selms_optimism_by_hand(wrap):
    log_probs = jnp.concatenate([LOG_PROBS, jnp.array([[-1.0, -1.0]])])
    reference = jnp.concatenate([REFERENCE, jnp.array([[-2.0, -1.5]])])  # Delta of the greedy row: 1.5
    scores, batch = build(np.ones((3, 2), bool), group=[0, 0, 0], outcome=[1.0, 0.0, 0.5], log_probs=log_probs,
                          reference_log_probs=reference, role=jnp.array([0, 0, 1]))  # fmt: skip
    loss, _, gradient = run(wrap, functools.partial(preference.optimism, optimism_coef=0.5, beta=0.1), scores, batch)
    assert loss == pytest.approx(0.5 * 0.1 * 1.5, rel=1e-5)
    np.testing.assert_allclose(gradient, [[0, 0], [0, 0], [0.05, 0.05]], rtol=1e-5)
    assert run(wrap, preference.dpo, scores, batch)[0] == pytest.approx(-np.log(sigmoid(0.2)), rel=1e-5)


def test_pairs_are_found_by_group_and_share_its_weight():
    mask = np.ones((6, 2), bool)
    outcome, group = [1.0, 0.0, 0.5, 0.0, 1.0, 1.0], [3, 0, 3, 3, 0, 3]
    _, batch = build(mask, group=group, outcome=outcome)
    weights = preference.pair_weights(batch)
    expected = np.zeros((6, 6))
    for i, j in [(0, 2), (0, 3), (5, 2), (5, 3), (2, 3)]:
        expected[i, j] = 4 / 6 / 5  # a group of four rows and five pairs
    expected[4, 1] = 2 / 6
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    ends = preference.pair_weights(batch, pair_fn=preference.best_and_worst)
    assert np.argwhere(np.asarray(ends)).tolist() == [[0, 3], [4, 1], [5, 3]]
    assert float(ends.sum()) == pytest.approx(1.0)


def test_unscored_rows_and_equal_outcomes_make_no_pairs():
    _, batch = build(np.ones((4, 2), bool), group=[0, 0, 2, 2], outcome=[1.0, np.nan, 1.0, 1.0])
    batch = batch.replace(rewards=batch.rewards.replace(scored=jnp.array([True, False, True, True])))
    np.testing.assert_array_equal(preference.pair_weights(batch), np.zeros((4, 4)))
