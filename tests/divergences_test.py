"""KL estimators: the table of correctness.md, gradients, unbiasedness, and clamps without a leak."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl import divergences as d

LOG_RATIO = jnp.array([-1.0, 14.0, 29.0])  # log-prob -1 against references 0, -15, -30
VALUES = {
    d.k1: [-1, 14, 29],
    d.k2: [0.5, 98, 420.5],
    d.k3: [0.71828, 13, 28],
    d.absolute: [1, 14, 29],
    d.k3_with_k2_grad: [0.71828, 13, 28],
}
SLOPES = {  # d/dx: 1, x, 1 - exp(-x), sign x, x
    d.k1: [1, 1, 1],
    d.k2: [-1, 14, 29],
    d.k3: [1 - np.e, 1, 1],
    d.absolute: [-1, 1, 1],
    d.k3_with_k2_grad: [-1, 14, 29],
}


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "plain"])
@pytest.mark.parametrize("estimator", VALUES, ids=lambda f: f.__name__)
def test_values_and_gradients_by_hand(estimator, wrap):
    np.testing.assert_allclose(wrap(estimator)(LOG_RATIO), VALUES[estimator], rtol=1e-5)
    np.testing.assert_allclose(wrap(jax.vmap(jax.grad(estimator)))(LOG_RATIO), SLOPES[estimator], rtol=1e-5, atol=1e-5)


def exact(estimator):
    """Expectation under a softmax policy and gradient by its logits, every outcome weighed by its probability."""
    logits, reference = jnp.array([0.3, -0.5, 0.9]), jax.nn.log_softmax(jnp.array([0.0, 0.4, -0.2]))
    p = jax.nn.softmax(logits)
    value = lambda z: jnp.sum(p * estimator(jax.nn.log_softmax(z) - reference))
    kl = lambda z: jnp.sum(jax.nn.softmax(z) * (jax.nn.log_softmax(z) - reference))
    return value(logits), jax.grad(value)(logits), kl(logits), jax.grad(kl)(logits)


@pytest.mark.parametrize("estimator", [d.k1, d.k3, d.k3_with_k2_grad], ids=lambda f: f.__name__)
def test_k1_and_k3_are_unbiased_in_value(estimator):
    value, _, kl, _ = exact(estimator)
    assert float(value) == pytest.approx(float(kl), rel=1e-5)


def test_only_k2s_gradient_is_that_of_the_kl():
    for estimator in (d.k2, d.k3_with_k2_grad):
        _, gradient, _, kl_gradient = exact(estimator)
        np.testing.assert_allclose(gradient, kl_gradient, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(exact(d.k1)[1], np.zeros(3), atol=1e-6)
    assert float(jnp.abs(exact(d.k3)[1] - exact(d.k3)[3]).max()) > 0.01


@pytest.mark.parametrize("estimator", VALUES, ids=lambda f: f.__name__)
def test_beyond_the_limit_nothing_has_a_gradient(estimator):
    inside, outside = jnp.array([-3.0, 3.0]), jnp.array([-50.0, 300.0])
    f = lambda x: d.limited(x, estimator=estimator, limit=20.0).sum()
    np.testing.assert_allclose(jax.grad(f)(inside), jax.vmap(jax.grad(estimator))(inside), rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(f)(outside), np.zeros(2))
    np.testing.assert_allclose(d.limited(outside, estimator=estimator), estimator(jnp.array([-20.0, 20.0])))
