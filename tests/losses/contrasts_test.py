"""The pairwise equations of the DPO family by hand: values, slopes, and what they are at the ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl.losses import contrasts

CHOSEN, REJECTED = 0.7, -0.4


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_sigmoid(x):
    return np.log(sigmoid(x))


M = CHOSEN - REJECTED
BY_HAND = {
    "logistic": (contrasts.logistic, -log_sigmoid(M)),
    "smoothed": (
        functools.partial(contrasts.logistic, label_smoothing=0.2),
        -0.8 * log_sigmoid(M) - 0.2 * log_sigmoid(-M),
    ),
    "robust": (
        functools.partial(contrasts.robust, label_smoothing=0.2),
        (-0.8 * log_sigmoid(M) + 0.2 * log_sigmoid(-M)) / 0.6,
    ),
    "hinge": (contrasts.hinge, 0.0),  # the margin 1.1 is enough
    "exo": (
        functools.partial(contrasts.exo, label_smoothing=0.1),
        sigmoid(M) * np.log(sigmoid(M) / 0.9) + sigmoid(-M) * np.log(sigmoid(-M) / 0.1),
    ),
    "nca": (contrasts.nca, -log_sigmoid(0.7) - 0.5 * log_sigmoid(-0.7) - 0.5 * log_sigmoid(0.4)),
    "bco": (contrasts.bco, -log_sigmoid(0.7) - log_sigmoid(0.4)),
    "sppo": (contrasts.sppo, 0.2**2 + 0.1**2),
    "apo_zero": (contrasts.apo_zero, (1 - sigmoid(0.7)) + sigmoid(-0.4)),
    "apo_down": (contrasts.apo_down, sigmoid(0.7) + 1 - sigmoid(M)),
    "discopop": (
        functools.partial(contrasts.discopop, temperature=1.0),
        -log_sigmoid(M) * (1 - sigmoid(M)) + np.exp(-M) * sigmoid(M),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    contrast, expected = BY_HAND[name]
    assert float(jax.jit(contrast)(CHOSEN, REJECTED)) == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", BY_HAND)
def test_slopes_are_those_of_finite_differences(name):
    contrast, _ = BY_HAND[name]
    chosen, rejected = jnp.float32(0.2), jnp.float32(-0.1)
    found = jax.jit(jax.grad(contrast, argnums=(0, 1)))(chosen, rejected)
    values = jax.jit(jax.vmap(contrast))
    h = 1e-2
    up_down = values(chosen + jnp.array([h, -h, 0, 0]), rejected + jnp.array([0, 0, h, -h]))
    expected = [(up_down[0] - up_down[1]) / (2 * h), (up_down[2] - up_down[3]) / (2 * h)]
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert float(found[1]) > 0, "raising what was rejected costs"


def test_without_noise_the_noisy_ones_are_dpo():
    for noisy in (contrasts.logistic, contrasts.robust):
        found = noisy(jnp.float32(CHOSEN), jnp.float32(REJECTED), label_smoothing=0.0)
        assert float(found) == pytest.approx(-log_sigmoid(M), rel=1e-6)


def test_a_far_margin_is_finite():
    for contrast, _ in BY_HAND.values():
        value, slope = jax.jit(jax.value_and_grad(contrast))(jnp.float32(-300.0), jnp.float32(300.0))
        assert np.isfinite(value) and np.isfinite(slope)
