"""The equations of the policy gradient by hand, values and slopes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import jit_and_plain

from mlrl.losses import surrogates as s

OLD = jnp.array([-1.0, -1.0, -1.0])
NEW = jnp.array([-1.69315, -1.0, -0.59453])  # ratios 0.5, 1, 1.5
A = jnp.array([1.0, -1.0, 2.0])


def value_and_slope(wrap, f):
    """Per-token values, clipped marks and derivatives by log_probs at NEW."""
    value, clipped = wrap(lambda lp: f(lp))(NEW)
    return value, clipped, wrap(jax.grad(lambda lp: f(lp)[0].sum()))(NEW)


@jit_and_plain
def test_ppo_by_hand(wrap):
    value, clipped, slope = value_and_slope(wrap, lambda lp: s.clipped_surrogate(lp - OLD, A))
    assert float(value.mean()) == pytest.approx(-0.63333, abs=1e-5)
    np.testing.assert_allclose(value, [-0.5, 1.0, -2.4], rtol=1e-5)
    np.testing.assert_allclose(slope, [-0.5, 1.0, 0.0], rtol=1e-5)  # -r A where not clipped
    assert clipped.tolist() == [False, False, True]


@jit_and_plain
def test_ppo_clips_each_side_by_its_own_bound(wrap):
    ratio, advantages = jnp.array([0.5, 0.5, 1.25, 1.25]), jnp.array([-1.0, 1.0, 1.0, -1.0])
    value, clipped = wrap(lambda x: s.clipped_surrogate(x, advantages, clip_low=0.1, clip_high=0.28))(jnp.log(ratio))
    np.testing.assert_allclose(value, [0.9, -0.5, -1.25, 1.25], rtol=1e-5)
    assert clipped.tolist() == [True, False, False, False]


@jit_and_plain
def test_dual_clip_by_hand(wrap):
    old, new = jnp.array([-1.0, -1.0, -3.0]), jnp.array([-1.69315, -1.0, -0.69741])
    f = lambda lp: s.dual_clipped_surrogate(lp - old, jnp.array([1.0, -1.0, -4.0]), clip_dual=3.0)
    value, clipped = wrap(f)(new)
    np.testing.assert_allclose(value, [-0.5, 1.0, 12.0], rtol=1e-5)
    assert clipped.tolist() == [False, False, True]
    np.testing.assert_allclose(wrap(jax.grad(lambda lp: f(lp)[0].sum()))(new), [-0.5, 1.0, 0.0], rtol=1e-5)


@jit_and_plain
def test_cispo_keeps_the_gradient_of_clipped_tokens(wrap):
    value, held, slope = value_and_slope(wrap, lambda lp: s.clipped_weight(lp, lp - OLD, A))
    np.testing.assert_allclose(value, [0.5 * 1.69315, -1.0, 1.2 * 2 * 0.59453], rtol=1e-5)
    np.testing.assert_allclose(slope, [-0.5, 1.0, -2.4], rtol=1e-5)
    assert held.tolist() == [False, False, True]


@jit_and_plain
def test_sapo_by_hand_and_its_slope_at_one(wrap):
    value, _, slope = value_and_slope(wrap, lambda lp: s.soft_gate(lp - OLD, A))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    tau = np.array([1.0, 1.05, 1.0])
    ratio = np.array([0.5, 1.0, 1.5])
    gate = sigmoid(tau * (ratio - 1))
    np.testing.assert_allclose(value, -np.array(A) * 4 / tau * gate, rtol=1e-5)
    np.testing.assert_allclose(slope, -np.array(A) * 4 * gate * (1 - gate) * ratio, rtol=1e-4)
    assert float(slope[1]) == pytest.approx(1.0)  # -A at ratio 1


@jit_and_plain
def test_reinforce_by_hand(wrap):
    np.testing.assert_allclose(wrap(s.score_function)(NEW, A), [1.69315, -1.0, 1.18906], rtol=1e-5)
    np.testing.assert_allclose(wrap(jax.grad(lambda lp: s.score_function(lp, A).sum()))(NEW), -A)


@jit_and_plain
def test_nft_by_hand(wrap):
    # q = 0.25: right A = 0.75, wrong A = -0.25. Ratios 0.5 (right), 0.5 (wrong), 2 (wrong, at the floor)
    advantages, log_ratio = jnp.array([0.75, -0.25, -0.25, 0.0]), jnp.log(jnp.array([0.5, 0.5, 2.0, 3.0]))
    f = lambda x: s.implicit_negative(x, advantages)
    value, at_floor = wrap(f)(log_ratio)
    proxy = (1 - 0.25 * 0.5) / 0.75
    np.testing.assert_allclose(value, [0.75 * np.log(2), -0.75 * np.log(proxy), 0.0, 0.0], rtol=1e-5, atol=1e-7)
    assert at_floor.tolist() == [False, False, True, False]
    slope = wrap(jax.grad(lambda x: f(x)[0].sum()))(log_ratio)
    # wrong: w * (q r / (1 - q)) / max(proxy, 1); the floor does not stop it
    np.testing.assert_allclose(slope, [-0.75, 0.25 * 0.5 / proxy, 0.25 * 2.0, 0.0], rtol=1e-5)


def test_on_policy_nft_is_dr_grpo_or_grpo():
    q = 0.25
    dr_grpo = jnp.array([1 - q, -q])
    slope = lambda **kw: jax.grad(lambda x: s.implicit_negative(x, dr_grpo, **kw)[0].sum())(jnp.zeros(2))
    np.testing.assert_allclose(slope(), -dr_grpo, rtol=1e-6)
    np.testing.assert_allclose(slope(weight_of=s.inverse_odds), -dr_grpo / np.sqrt(q * (1 - q)), rtol=1e-6)
    np.testing.assert_allclose(slope(negative_weight=0.0), [-(1 - q), 0.0], rtol=1e-6)  # rejection sampling


@jit_and_plain
def test_dppo_tv_by_hand(wrap):
    # probabilities 0.5 from 0.2 (moved 0.3) and 0.21 from 0.2; a rare token may triple: 0.03 from 0.01
    old = jnp.log(jnp.array([0.2, 0.2, 0.2, 0.01]))
    new = jnp.log(jnp.array([0.5, 0.5, 0.21, 0.04]))
    advantages = jnp.array([1.0, -1.0, 1.0, 1.0])
    f = lambda lp: s.total_variation_gate(lp, old, advantages)
    value, blocked = wrap(f)(new)
    assert blocked.tolist() == [True, False, False, False]
    ratio = np.array([0.0, 2.5, 1.05, 3.0])
    np.testing.assert_allclose(value, -np.array(advantages) * ratio * np.array(new), rtol=1e-5)
    np.testing.assert_allclose(wrap(jax.grad(lambda lp: f(lp)[0].sum()))(new), [0, 2.5, -1.05, -3.0], rtol=1e-5)


@jit_and_plain
def test_vespo_by_hand(wrap):
    # the row's ratio is 0.5 * 1 * 1.5 = 0.75; phi(w) = w^k exp(lambda (1 - w))
    row = jnp.full(3, jnp.log(0.75))
    value, _, slope = value_and_slope(wrap, lambda lp: s.gamma_weight(lp, row, A))
    good, bad = 0.75**2 * np.exp(3 * 0.25), 0.75**3 * np.exp(2 * 0.25)
    weight = np.array([good, bad, good])
    np.testing.assert_allclose(value, -weight * np.array(A) * np.array(NEW), rtol=1e-5)
    np.testing.assert_allclose(slope, -weight * np.array(A), rtol=1e-5)
    on_policy = s.gamma_weight(NEW, jnp.zeros(3), A)[0]
    np.testing.assert_allclose(on_policy, s.score_function(NEW, A), rtol=1e-6)  # REINFORCE
