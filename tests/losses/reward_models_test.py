"""Losses of judges by hand: pairs, lists, steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import build, jit_and_plain

from mlrl import reductions
from mlrl.losses import reward_models

MASK = np.array([[0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 0, 0]], bool)
VALUES = jnp.full((3, 4), 7.0).at[0, 3].set(2.0).at[1, 2].set(0.5).at[2, 1].set(-1.0)  # scores 2, 0.5, -1


def example(outcome, rows=3):
    return build(MASK[:rows], group=[0] * rows, outcome=outcome[:rows], scored_values=VALUES[:rows])


def run(wrap, loss_fn, scores, batch):
    """(loss, metrics, gradient by values) from one pass."""
    (loss, metrics), gradient = wrap(jax.value_and_grad(lambda s: loss_fn(s, batch), has_aux=True))(scores)
    return float(loss), metrics, gradient.values


def test_a_rows_score_is_the_value_before_its_last_action():
    np.testing.assert_allclose(reward_models.row_values(*example([0, 0, 0])), [2.0, 0.5, -1.0])


@jit_and_plain
def test_bradley_terry_by_hand(wrap):
    f = functools.partial(reward_models.bradley_terry, margin=0.5, centre_coef=0.01)
    loss, metrics, gradient = run(wrap, f, *example([1.0, 0.0], rows=2))
    difference = 1.5 - 0.5
    assert loss == pytest.approx(np.log1p(np.exp(-difference)) + 0.01 * 2.5**2, rel=1e-5)
    slope = -1 / (1 + np.exp(difference))
    assert float(gradient[0, 3]) == pytest.approx(slope + 0.01 * 5, rel=1e-5)
    assert float(gradient[1, 2]) == pytest.approx(-slope + 0.01 * 5, rel=1e-5)
    assert float(metrics["preference/accuracy"]) == 1.0
    assert float(metrics["preference/margin"]) == pytest.approx(1.5, rel=1e-5)


@jit_and_plain
def test_plackett_luce_by_hand(wrap):
    loss, metrics, gradient = run(wrap, reward_models.plackett_luce, *example([0.5, 1.0, 0.0]))  # order: row 1, 0, 2
    e = np.exp(np.array([2.0, 0.5, -1.0]))
    first, second = e[1] / e.sum(), e[0] / (e[0] + e[2])
    assert loss == pytest.approx(-(np.log(first) + np.log(second)) / 3, rel=1e-5)
    np.testing.assert_allclose(gradient[1, 2], -(1 - first) / 3, rtol=1e-4)
    np.testing.assert_allclose(gradient[0, 3], (e[0] / e.sum() - (1 - second)) / 3, rtol=1e-4)
    assert float(metrics["preference/accuracy"]) == pytest.approx(2 / 3)


def test_plackett_luce_of_two_rows_is_bradley_terry():
    listwise = run(jax.jit, reward_models.plackett_luce, *example([1.0, 0.0], rows=2))
    pairwise = run(jax.jit, reward_models.bradley_terry, *example([1.0, 0.0], rows=2))
    assert 2 * listwise[0] == pytest.approx(pairwise[0], rel=1e-5)  # shared by two rows, not by one pair


@jit_and_plain
def test_step_labels_by_hand(wrap):
    mask = np.array([[0, 1, 0, 1]], bool)
    given = dict(scored_values=jnp.array([[9.0, 2.0, 9.0, -1.0]]), reward_tokens=jnp.array([[5.0, 1.0, 5.0, 0.25]]))
    scores, batch = build(mask, group=[0], outcome=[0.0], reduction=reductions.token_mean, **given)
    loss, metrics, gradient = run(wrap, reward_models.step_labels, scores, batch)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    second = -0.25 * np.log(sigmoid(-1)) - 0.75 * np.log(1 - sigmoid(-1))
    assert loss == pytest.approx((-np.log(sigmoid(2)) + second) / 2, rel=1e-5)
    np.testing.assert_allclose(gradient, [[0, (sigmoid(2) - 1) / 2, 0, (sigmoid(-1) - 0.25) / 2]], rtol=1e-5)
    assert float(metrics["preference/accuracy"]) == 1.0
