"""KL, entropy and covariance terms by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import build, jit_and_plain

from mlrl import divergences, reductions
from mlrl.losses import policy, regularizers
from mlrl.types import Refused


def rows(values, **given):
    values = jnp.asarray(values, jnp.float32)
    given = {k: jnp.asarray(v, jnp.float32) for k, v in given.items()}
    return build(np.ones(values.shape, bool), group=range(len(values)), outcome=np.zeros(len(values)),
                 reduction=reductions.token_mean, log_probs=values, **given)  # fmt: skip


@jit_and_plain
def test_kl_penalty_by_hand(wrap):
    scores, batch = rows([[-1.0, -1.0]], reference_log_probs=[[0.0, -3.0]])  # log-ratios -1 and 2
    k3 = functools.partial(regularizers.kl_penalty, kl_coef=0.1)
    loss, metrics = wrap(k3)(scores, batch)
    expected = 0.1 * np.mean([np.e - 1 - 1, np.exp(-2) - 1 + 2])
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["loss/kl"]) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["kl/reference"]) == pytest.approx(0.5)  # k1, without the coefficient
    gradient = wrap(jax.grad(lambda s: k3(s, batch)[0]))(scores).log_probs
    np.testing.assert_allclose(gradient, 0.05 * np.array([[1 - np.e, 1 - np.exp(-2)]]), rtol=1e-5)


def test_kl_penalty_limits_value_and_gradient_but_not_the_log():
    scores, batch = rows([[-1.0, -1.0]], reference_log_probs=[[-51.0, -1.5]])
    k2 = functools.partial(regularizers.kl_penalty, kl_coef=1.0, estimator=divergences.k2)
    loss, metrics = k2(scores, batch)
    assert float(loss) == pytest.approx((200 + 0.125) / 2)
    assert float(metrics["kl/reference"]) == pytest.approx((50 + 0.5) / 2)
    np.testing.assert_allclose(jax.grad(lambda s: k2(s, batch)[0])(scores).log_probs, [[0.0, 0.25]])


def test_a_traced_coefficient_of_zero_is_not_off():
    scores, batch = rows([[-1.0, -1.0]], reference_log_probs=[[0.0, -3.0]])
    f = jax.jit(lambda c: regularizers.kl_penalty(scores, batch, kl_coef=c))
    assert float(f(0.0)[0]) == 0.0 and "kl/reference" in f(0.0)[1]
    assert float(f(0.2)[0]) == pytest.approx(2 * float(f(0.1)[0]), rel=1e-6)


@jit_and_plain
def test_kl_by_turn_by_hand(wrap):
    scores, batch = rows([[-1.0, -1.0, -1.0]], reference_log_probs=[[0.0, -3.0, -2.0]])  # log-ratios -1, 2 and 1
    batch = batch.replace(rollout=batch.rollout.replace(turn=jnp.asarray([[0, 1, 2]])))
    f = functools.partial(regularizers.kl_by_turn, kl_coefs=(0.3, 0.6))  # the last is that of turn 2 too
    loss, metrics = wrap(f)(scores, batch)
    assert float(loss) == pytest.approx((0.3 * 0.5 + 0.6 * 2.0 + 0.6 * 0.5) / 3, rel=1e-6)
    assert float(metrics["kl/turn_0"]) == pytest.approx(-1 / 3) and float(metrics["kl/turn_1"]) == pytest.approx(1.0)
    gradient = wrap(jax.grad(lambda s: f(s, batch)[0]))(scores).log_probs
    np.testing.assert_allclose(gradient, np.array([[-0.3, 1.2, 0.6]]) / 3, rtol=1e-5)


def test_kl_by_turn_is_kl_penalty_where_turns_weigh_the_same_and_may_be_off():
    scores, batch = rows([[-1.0, -1.0]], reference_log_probs=[[0.0, -3.0]])
    same = regularizers.kl_penalty(scores, batch, kl_coef=0.1, estimator=divergences.k2)[0]
    assert float(regularizers.kl_by_turn(scores, batch, kl_coefs=(0.1, 0.1))[0]) == pytest.approx(float(same))
    assert regularizers.kl_by_turn(scores, batch, kl_coefs=(0.0, 0.0))[1] == {}
    with pytest.raises(Refused, match="kl_coefs is empty"):
        regularizers.kl_by_turn(scores, batch, kl_coefs=())


@jit_and_plain
def test_entropy_bonus_by_hand(wrap):
    scores, batch = rows([[-1.0, -1.0]], entropy=[[0.5, 1.5]])
    f = functools.partial(regularizers.entropy_bonus, entropy_coef=0.01)
    loss, metrics = wrap(f)(scores, batch)
    assert float(loss) == pytest.approx(-0.01) and float(metrics["entropy"]) == pytest.approx(1.0)
    np.testing.assert_allclose(wrap(jax.grad(lambda s: f(s, batch)[0]))(scores).entropy, [[-0.005, -0.005]])


def test_top_share_counts_masked_tokens_only():
    mask = jnp.array([[0, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]], bool)
    x = jnp.array([[9.0, 1, 5, 3, 5, 2], [1.0, 1, jnp.nan, 9, 9, 9]])
    top = lambda share: regularizers.top_share(x, mask, share=share).astype(int).tolist()
    assert top(0.2) == [[0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert top(0.4) == [[0, 0, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0]]
    assert top(1.0) == mask.astype(int).tolist()


def test_only_hesitant_tokens_learn_and_the_denominator_stays():
    scores, batch = rows([[-1.0] * 5], entropy=[[0.1, 0.9, 0.2, 0.3, 0.4]], advantages=[[1.0] * 5])
    f = functools.partial(regularizers.high_entropy_only, loss_fn=policy.reinforce, share=0.2)
    np.testing.assert_allclose(jax.grad(lambda s: f(s, batch)[0])(scores).log_probs, [[0, -0.2, 0, 0, 0]], rtol=1e-6)
    everything = functools.partial(regularizers.high_entropy_only, loss_fn=policy.reinforce, share=1.0)
    assert float(everything(scores, batch)[0]) == pytest.approx(float(policy.reinforce(scores, batch)[0]))


# Row mean of log-probs -2: centred [1, -1], times A = 2: covariances 2 and -2.
COV = dict(advantages=[[2.0, 2.0]], old_log_probs=[[-1.5, -3.0]])


def test_covariance_by_hand():
    scores, batch = rows([[-1.0, -3.0]], **COV)
    np.testing.assert_allclose(
        regularizers.covariance(scores.log_probs, batch.advantages, batch.mask), [[2.0, -2.0]], rtol=1e-6
    )


def test_clip_cov_drops_tokens_between_its_bounds():
    scores, batch = rows([[-1.0, -3.0]], **COV)
    f = functools.partial(regularizers.clip_cov, loss_fn=policy.reinforce)
    np.testing.assert_allclose(jax.grad(lambda s: f(s, batch)[0])(scores).log_probs, [[0.0, -1.0]])
    assert float(f(scores, batch)[1]["covariance/dropped_share"]) == 0.5
    above = functools.partial(f, low=0.5, high=1.5)
    assert float(above(scores, batch)[1]["covariance/dropped_share"]) == 0.0


def test_kl_cov_holds_high_covariance_to_the_old_policy():
    scores, batch = rows([[-1.0, -3.0]], **COV)
    f = functools.partial(regularizers.kl_cov, kl_coef=1.0)
    loss, metrics = f(scores, batch)
    assert float(loss) == pytest.approx(0.5 * 0.5) and float(metrics["covariance/held_share"]) == 0.5
    np.testing.assert_allclose(jax.grad(lambda s: f(s, batch)[0])(scores).log_probs, [[0.5, 0.0]])
