"""Value losses by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import build, jit_and_plain

from mlrl import reductions
from mlrl.losses import values


def example():
    given = dict(scored_values=[[1.0, 0.5, -1.0]], values=[[0.0, 0.4, 0.0]], returns=[[2.0, 1.5, -0.5]])
    given = {k: jnp.asarray(v, jnp.float32) for k, v in given.items()}
    return build(np.ones((1, 3), bool), group=[0], outcome=[0.0], reduction=reductions.token_mean, **given)


@jit_and_plain
def test_value_loss_by_hand(wrap):
    scores, batch = example()
    loss, metrics = wrap(values.value_loss)(scores, batch)
    assert float(loss) == pytest.approx(0.5 * (1 + 1 + 0.25) / 3)
    assert float(metrics["value/mean"]) == pytest.approx(0.5 / 3)
    gradient = wrap(jax.grad(lambda s: values.value_loss(s, batch)[0]))(scores).values
    np.testing.assert_allclose(gradient, np.array([[-1.0, -1.0, -0.5]]) / 3, rtol=1e-6)


@jit_and_plain
def test_clipped_value_loss_by_hand(wrap):
    # clipped to [0.2, 0.5, -0.2]: squares 3.24, 1, 0.09; the first is worse than 1, the last better than 0.25
    scores, batch = example()
    f = functools.partial(values.clipped_value_loss, value_clip=0.2)
    loss, metrics = wrap(f)(scores, batch)
    assert float(loss) == pytest.approx(0.5 * (3.24 + 1 + 0.25) / 3, rel=1e-5)
    assert float(metrics["value/clipped_share"]) == pytest.approx(1 / 3)
    gradient = wrap(jax.grad(lambda s: f(s, batch)[0]))(scores).values
    np.testing.assert_allclose(gradient, np.array([[0.0, -1.0, -0.5]]) / 3, rtol=1e-5)


def test_a_wide_clip_is_no_clip():
    scores, batch = example()
    clipped = values.clipped_value_loss(scores, batch, value_clip=100.0)[0]
    assert float(clipped) == pytest.approx(float(values.value_loss(scores, batch)[0]))
