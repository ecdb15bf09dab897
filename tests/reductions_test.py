"""Named averages: hand-computed weights, empty rows, empty masks, and exact splits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl import reductions
from mlrl.types import Refused

MASK = np.array([[0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
CASES = {
    "token_mean": (reductions.token_mean, [[0, 0.25, 0.25, 0.25], [0, 0.25, 0, 0], [0, 0, 0, 0]]),
    "sequence_mean_token_mean": (
        reductions.sequence_mean_token_mean,
        [[0, 1 / 6, 1 / 6, 1 / 6], [0, 0.5, 0, 0], [0, 0, 0, 0]],
    ),
    "sequence_mean_token_sum": (
        reductions.sequence_mean_token_sum,
        [[0, 0.5, 0.5, 0.5], [0, 0.5, 0, 0], [0, 0, 0, 0]],
    ),
    "constant_length": (
        lambda m: reductions.constant_length(m, length=5),
        [[0, 0.1, 0.1, 0.1], [0, 0.1, 0, 0], [0, 0, 0, 0]],
    ),
}


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "plain"])
@pytest.mark.parametrize("name", CASES)
def test_weights_by_hand(name, wrap):
    reduction, expected = CASES[name]
    np.testing.assert_allclose(wrap(reduction)(MASK), np.array(expected), rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_an_empty_mask_gives_finite_zeros(name):
    weights = CASES[name][0](jnp.zeros((2, 3), bool))
    np.testing.assert_array_equal(weights, np.zeros((2, 3)))


@pytest.mark.parametrize("name", CASES)
def test_padding_and_row_order_do_not_matter(name):
    reduction = CASES[name][0]
    padded = reduction(np.pad(MASK, ((0, 2), (1, 3))))
    np.testing.assert_allclose(padded[:3, 1:5], reduction(MASK), rtol=1e-6)
    assert float(jnp.sum(padded)) == pytest.approx(float(jnp.sum(reduction(MASK))))
    np.testing.assert_allclose(reduction(MASK[::-1])[::-1], reduction(MASK), rtol=1e-6)


def test_a_constant_length_must_be_positive():
    with pytest.raises(Refused, match="length must be positive, got 0"):
        reductions.constant_length(MASK, length=0)


def test_row_sums_and_means_ignore_what_is_masked():
    x = jnp.where(MASK, jnp.arange(12.0).reshape(3, 4), jnp.nan)
    np.testing.assert_allclose(reductions.row_sum(x, MASK), [6.0, 5.0, 0.0])
    np.testing.assert_allclose(reductions.row_mean(x, MASK), [2.0, 5.0, 0.0])
    gradient = jax.grad(lambda v: reductions.row_mean(v, MASK).sum())(x)
    np.testing.assert_allclose(gradient, reductions.sequence_mean_token_mean(MASK) * 2, rtol=1e-6)
