"""Policy losses on batches: the table's numbers, gradients, and identities between methods."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import build, jit_and_plain

from mlrl import importance, reductions
from mlrl.losses import corrections, policy

A = [[1.0, -1.0, 2.0]]
OLD = [[-1.0, -1.0, -1.0]]
NEW = [[-1.69315, -1.0, -0.59453]]


def one_row(**given):
    arrays = {"advantages": A, "old_log_probs": OLD, "log_probs": NEW} | given
    arrays = {k: jnp.asarray(v, jnp.float32) for k, v in arrays.items()}
    shape = arrays["log_probs"].shape
    return build(np.ones(shape, bool), group=range(shape[0]), outcome=np.zeros(shape[0]),
                 reduction=reductions.token_mean, **arrays)  # fmt: skip


def run(wrap, loss_fn, scores, batch):
    """(loss, metrics, gradient by log-probs) from one pass."""
    (loss, metrics), gradient = wrap(jax.value_and_grad(lambda s: loss_fn(s, batch), has_aux=True))(scores)
    return float(loss), metrics, gradient.log_probs


@jit_and_plain
def test_ppo_by_hand(wrap):
    loss, metrics, gradient = run(wrap, policy.ppo_clip, *one_row())
    assert loss == pytest.approx(-0.63333, abs=1e-5)
    np.testing.assert_allclose(gradient, [[-0.5 / 3, 1 / 3, 0.0]], rtol=1e-5)
    assert float(metrics["loss/policy"]) == pytest.approx(loss)
    assert float(metrics["ratio/mean"]) == pytest.approx(1.0, abs=1e-5)
    assert float(metrics["ratio/clipped_share"]) == pytest.approx(1 / 3)
    k3 = np.mean([0.5 - 1 + np.log(2), 0.0, 1.5 - 1 - np.log(1.5)])
    assert float(metrics["kl/old"]) == pytest.approx(k3, rel=1e-4)


@jit_and_plain
def test_gspo_by_hand(wrap):
    scores, batch = one_row()
    gspo = functools.partial(policy.gspo, clip_low=0.2, clip_high=0.2)
    loss, metrics, gradient = run(wrap, gspo, scores, batch)
    assert float(metrics["ratio/mean"]) == pytest.approx(0.90856, abs=1e-5)
    assert loss == pytest.approx(-0.60571, abs=1e-5)
    # every token moves the mean log-ratio by 1/3, and the ratio by 0.90856 / 3; the advantages sum to 2
    np.testing.assert_allclose(gradient, np.full((1, 3), -0.90856 * 2 / 9), rtol=1e-4)


@jit_and_plain
def test_gspos_token_form_credits_each_token(wrap):
    token = functools.partial(policy.gspo_token, clip_low=0.2, clip_high=0.2)
    loss, _, gradient = run(wrap, token, *one_row())
    assert loss == pytest.approx(-0.60571, abs=1e-5)
    np.testing.assert_allclose(gradient, -0.90856 * np.array(A) / 3, rtol=1e-4)
    equal = one_row(advantages=[[2.0, 2.0, 2.0]])
    sequence = functools.partial(policy.gspo, clip_low=0.2, clip_high=0.2)
    np.testing.assert_allclose(run(wrap, token, *equal)[2], run(wrap, sequence, *equal)[2], rtol=1e-5)


def test_gspo_on_completions_of_one_token_is_ppo():
    mask = np.zeros((4, 3), bool)
    mask[:, 2] = True
    scores, batch = build(mask, group=[0, 0, 2, 2], outcome=np.zeros(4))
    kw = dict(clip_low=0.2, clip_high=0.28)
    for gspo in (policy.gspo, policy.gspo_token):
        a = run(jax.jit, functools.partial(gspo, **kw), scores, batch)
        b = run(jax.jit, functools.partial(policy.ppo_clip, **kw), scores, batch)
        assert a[0] == pytest.approx(b[0], rel=1e-5)
        np.testing.assert_allclose(a[2], b[2], rtol=1e-5)


ON_POLICY = {
    "ppo_clip": policy.ppo_clip,
    "dual_clip": policy.dual_clip,
    "gspo_token": policy.gspo_token,
    "cispo": policy.cispo,
    "sapo": policy.sapo,
    "stable_reinforce": policy.stable_reinforce,
    "decoupled_ppo": corrections.decoupled_ppo,
    "dppo_tv": policy.dppo_tv,
}


@pytest.mark.parametrize("name", ON_POLICY)
def test_on_policy_every_method_has_reinforces_gradient(name):
    scores, batch = one_row(old_log_probs=NEW, behavior_log_probs=NEW)
    _, metrics, gradient = run(jax.jit, ON_POLICY[name], scores, batch)
    np.testing.assert_allclose(gradient, run(jax.jit, policy.reinforce, scores, batch)[2], rtol=1e-5)
    assert float(metrics["ratio/mean"]) == 1.0
    assert float(metrics["ratio/clipped_share"]) == 0.0
    assert float(metrics["kl/old"]) == 0.0


def test_dual_clip_bounds_bad_tokens_only():
    given = dict(advantages=[[1.0, -1.0, -4.0]], old_log_probs=[[-1.0, -1.0, -3.0]])
    given["log_probs"] = [[-1.69315, -1.0, -0.69741]]
    loss, metrics, gradient = run(jax.jit, policy.dual_clip, *one_row(**given))
    assert loss == pytest.approx((-0.5 + 1 + 12) / 3, rel=1e-5)
    np.testing.assert_allclose(gradient, np.array([[-0.5, 1.0, 0.0]]) / 3, rtol=1e-5)


def test_stable_reinforce_stops_the_gradient_beyond_its_bound():
    far = one_row(log_probs=[[-1.0, -1.0, -1.0]], old_log_probs=[[-9.0, -1.0, -1.0]], advantages=[[-1.0, -1.0, 1.0]])
    loss, _, gradient = run(jax.jit, policy.stable_reinforce, *far)
    assert loss == pytest.approx((1000 + 1 - 1) / 3, rel=1e-4)
    np.testing.assert_allclose(gradient, np.array([[0.0, 1.0, -1.0]]) / 3, rtol=1e-5)


def test_an_astronomic_ratio_leaves_the_gradient_finite():
    wild = one_row(log_probs=[[-1.0, -1.0, -1.0]], old_log_probs=[[-900.0, -1.0, -1.0]], advantages=[[1.0, 1.0, 1.0]])
    loss, metrics, gradient = run(jax.jit, policy.ppo_clip, *wild)
    assert np.isfinite(loss) and np.isfinite(gradient).all() and np.isfinite(float(metrics["kl/old"]))


@jit_and_plain
def test_decoupled_ppo_weighs_by_the_truncated_behavior_ratio(wrap):
    # p_old / p_behavior = 2, 0.5 and 10, the last held at 5
    behavior = np.array(OLD) - np.log([[2.0, 0.5, 10.0]])
    loss, metrics, gradient = run(wrap, corrections.decoupled_ppo, *one_row(behavior_log_probs=behavior))
    assert loss == pytest.approx((2 * -0.5 + 0.5 * 1.0 + 5 * -2.4) / 3, rel=1e-5)
    np.testing.assert_allclose(gradient, np.array([[2 * -0.5, 0.5 * 1.0, 0.0]]) / 3, rtol=1e-5)
    assert float(metrics["importance/mean"]) == pytest.approx(2.5, rel=1e-5)


def test_corrections_reject_at_each_level():
    behavior = np.array(OLD) - np.log([[2.0, 0.5, 10.0]])
    masked = functools.partial(importance.weights, bound=importance.zero_outside, high=5.0)
    fn = functools.partial(corrections.corrected, loss_fn=policy.ppo_clip, weight_fn=masked)
    assert run(jax.jit, fn, *one_row(behavior_log_probs=behavior))[0] == pytest.approx((2 * -0.5 + 0.5) / 3, rel=1e-5)
    product = functools.partial(masked, level=importance.sequence_sum)  # 2 * 0.5 * 10 = 10: the row is rejected
    fn = functools.partial(corrections.corrected, loss_fn=policy.ppo_clip, weight_fn=product)
    assert run(jax.jit, fn, *one_row(behavior_log_probs=behavior))[0] == 0.0


@jit_and_plain
def test_trajectory_balance_by_hand(wrap):
    # the row moved by -0.69315 + 0 + 0.40547 = -0.28768; A = 0.5; weights of a token mean over one row sum to 1
    loss, _, gradient = run(wrap, policy.trajectory_balance, *one_row(advantages=[[0.5, 0.5, 0.5]]))
    assert loss == pytest.approx(0.5 * (-0.28768 - 0.5) ** 2, rel=1e-4)
    np.testing.assert_allclose(gradient, np.full((1, 3), -0.78768), rtol=1e-4)
