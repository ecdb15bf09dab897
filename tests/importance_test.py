"""Importance weights: by hand at each level, bounds, rejection, effective sample size, no gradient, no overflow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl import divergences, importance

MASK = jnp.array([[0, 1, 1, 1], [0, 1, 0, 0]], bool)
LR = jnp.where(MASK, jnp.log(jnp.array([[1.0, 0.5, 2.0, 4.0], [1.0, 3.0, 1.0, 1.0]])), jnp.nan)


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "plain"])
@pytest.mark.parametrize(
    "level,expected",
    [
        (importance.per_token, [[0, 0.5, 2, 4], [0, 3, 0, 0]]),
        (importance.sequence_sum, [[0, 4, 4, 4], [0, 3, 0, 0]]),  # 0.5 * 2 * 4
        (importance.sequence_mean, [[0, 4 ** (1 / 3), 4 ** (1 / 3), 4 ** (1 / 3)], [0, 3, 0, 0]]),
    ],
    ids=["token", "product", "geometric"],
)
def test_levels_by_hand(level, expected, wrap):
    found = wrap(lambda x: importance.weights(x, MASK, level=level, high=100.0))(LR)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_bounds_truncate_or_zero():
    kw = dict(low=1.0, high=2.5)
    np.testing.assert_allclose(importance.weights(LR, MASK, **kw), [[0, 1, 2, 2.5], [0, 2.5, 0, 0]], rtol=1e-6)
    zeroed = importance.weights(LR, MASK, bound=importance.zero_outside, **kw)
    np.testing.assert_allclose(zeroed, [[0, 0, 2, 0], [0, 0, 0, 0]], rtol=1e-6)


def test_weights_are_constants_and_never_overflow():
    gradient = jax.grad(lambda x: importance.weights(x, MASK).sum())(LR)
    np.testing.assert_array_equal(gradient, np.zeros((2, 4)))
    huge = importance.weights(jnp.full((2, 4), 1e4), MASK, level=importance.sequence_sum, high=5.0)
    np.testing.assert_allclose(huge[MASK], np.full(4, 5.0))


def test_log_ratio_lets_nothing_through_the_mask():
    bad = jnp.where(MASK, -1.0, jnp.nan)
    value, gradient = jax.value_and_grad(lambda x: importance.log_ratio(x, -jnp.inf * ~MASK, MASK).sum())(bad)
    assert float(value) == -4.0
    np.testing.assert_array_equal(gradient, MASK.astype(np.float32))


def test_rejection_by_the_rows_mean_estimate():
    # k1 means: log(4) / 3 = 0.462, log 3 = 1.099; k3 at log 3: 1/3 - 1 + 1.0986 = 0.432
    keep = lambda estimator, limit: importance.within(LR, MASK, estimator=estimator, limit=limit).tolist()
    assert keep(divergences.k1, 0.5) == [True, False]
    assert keep(divergences.k1, 0.4) == [False, False]
    assert keep(divergences.k3, 0.44) == [True, True]


def test_effective_sample_size():
    mask = jnp.array([1, 1, 1, 0], bool)
    assert float(importance.effective_sample_size(jnp.array([2.0, 2, 2, 9]), mask)) == pytest.approx(1.0)
    assert float(importance.effective_sample_size(jnp.array([1.0, 0, 0, 9]), mask)) == pytest.approx(1 / 3)
    assert float(importance.effective_sample_size(jnp.array([1.0, 2, 3, 9]), mask)) == pytest.approx(36 / 42)
    assert float(importance.effective_sample_size(jnp.ones(4), jnp.zeros(4, bool))) == 0.0
