"""Divergences from a teacher by hand, and their limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import build, jit_and_plain

from mlrl import reductions
from mlrl.losses import distillation as d
from mlrl.types import Distribution

P = np.array([0.5, 0.3, 0.2])  # student
Q = np.array([0.1, 0.6, 0.3])  # teacher
STUDENT, TEACHER = jnp.log(P) + 3.0, jnp.log(Q) - 1.0  # logits are free up to a constant


def kl(a, b):
    return float(np.sum(a * np.log(a / b)))


@jit_and_plain
@pytest.mark.parametrize(
    "divergence,expected",
    [
        (d.forward_kl, kl(Q, P)),
        (d.reverse_kl, kl(P, Q)),
        (d.jensen_shannon, 0.5 * kl(Q, (P + Q) / 2) + 0.5 * kl(P, (P + Q) / 2)),
        (
            functools.partial(d.jensen_shannon, beta=0.1),
            0.1 * kl(Q, 0.1 * Q + 0.9 * P) + 0.9 * kl(P, 0.1 * Q + 0.9 * P),
        ),
        (functools.partial(d.top_k, k=1), kl(np.array([0.6, 0.4]), np.array([0.3, 0.7]))),
        (functools.partial(d.top_k, k=2), kl(np.array([0.6, 0.3, 0.1]), np.array([0.3, 0.2, 0.5]))),
    ],
    ids=["forward", "reverse", "jensen_shannon", "skewed", "top_1", "top_2"],
)
def test_values_by_hand(divergence, expected, wrap):
    assert float(wrap(divergence)(STUDENT, TEACHER)) == pytest.approx(expected, rel=1e-4)
    assert float(wrap(divergence)(TEACHER, TEACHER)) == pytest.approx(0.0, abs=1e-6)


def test_gradients_by_hand():
    np.testing.assert_allclose(jax.grad(d.forward_kl)(STUDENT, TEACHER), P - Q, atol=1e-6)
    expected = P * (np.log(P / Q) - kl(P, Q))
    np.testing.assert_allclose(jax.grad(d.reverse_kl)(STUDENT, TEACHER), expected, atol=1e-6)
    np.testing.assert_array_equal(jax.grad(d.jensen_shannon, argnums=1)(STUDENT, TEACHER), np.zeros(3))


def test_jensen_shannon_between_its_limits():
    small = 1e-3
    near_forward = float(d.jensen_shannon(STUDENT, TEACHER, beta=small)) / small
    near_reverse = float(d.jensen_shannon(STUDENT, TEACHER, beta=1 - small)) / small
    assert near_forward == pytest.approx(kl(Q, P), rel=0.02)
    assert near_reverse == pytest.approx(kl(P, Q), rel=0.02)


def test_a_lumped_tail_bounds_the_whole_from_below():
    assert float(d.top_k(STUDENT, TEACHER, k=1)) < float(d.top_k(STUDENT, TEACHER, k=2)) + 1e-6
    assert float(d.top_k(STUDENT, TEACHER, k=1, divergence=d.reverse_kl)) < kl(P, Q)


def test_impossible_tokens_stay_finite():
    banned = jnp.array([0.0, -jnp.inf, 0.0])
    assert np.isfinite(float(d.reverse_kl(banned, TEACHER)))
    assert np.isfinite(jax.grad(d.reverse_kl)(banned, TEACHER)).all()


@jit_and_plain
def test_teacher_kl_by_hand_and_only_where_the_student_failed(wrap):
    log_probs, teacher = jnp.array([[-1.0, -2.0], [-1.0, -1.0]]), jnp.array([[-2.0, -1.0], [-3.0, -1.0]])
    scores, batch = build(np.ones((2, 2), bool), group=[0, 0], outcome=[0.0, 1.0], reduction=reductions.token_mean,
                          log_probs=log_probs, reference_log_probs=teacher)  # fmt: skip
    f = functools.partial(d.teacher_kl, kl_coef=0.1)
    loss, metrics = wrap(f)(scores, batch)
    assert float(loss) == pytest.approx(0.1 * (0.5 + 0.5 + 2.0 + 0.0) / 4, rel=1e-5)
    assert float(metrics["kl/teacher"]) == pytest.approx((1 - 1 + 2 + 0) / 4)
    gated = functools.partial(f, gate=d.failed_rows)
    assert float(wrap(gated)(scores, batch)[0]) == pytest.approx(0.1 * 1.0 / 4, rel=1e-5)
    gradient = wrap(jax.grad(lambda s: gated(s, batch)[0]))(scores).log_probs
    np.testing.assert_allclose(gradient, [[0.025, -0.025], [0, 0]], rtol=1e-5)


def distributions(k):
    """One row of two tokens: a student's logits, and the teacher's k likeliest tokens; NaN beyond the mask."""
    scores, batch = build([[1, 1, 0]], group=[0], outcome=[0.0], reduction=reductions.token_mean)
    student = jnp.stack([STUDENT, jnp.log(Q), jnp.full(3, jnp.nan)])[None]
    known = jnp.log(jnp.stack([jnp.asarray(Q), jnp.asarray(Q), jnp.asarray(Q)]))[None]
    top, ids = jax.lax.top_k(known, k)
    known = Distribution(ids, top.at[:, 2].set(jnp.nan))
    return scores.replace(logits=student), batch.replace(reference_distribution=known)


@jit_and_plain
@pytest.mark.parametrize("k, expected", [(3, kl(Q, P)), (1, kl(np.array([0.6, 0.4]), np.array([0.3, 0.7])))])
def test_match_by_hand(k, expected, wrap):
    """The first token differs from the teacher, the second does not, the third is padding."""
    scores, batch = distributions(k)
    loss, metrics = wrap(functools.partial(d.match, distill_coef=2.0))(scores, batch)
    assert float(loss) == pytest.approx(2.0 * expected / 2, rel=1e-4)
    assert float(metrics["divergence/teacher"]) == pytest.approx(expected / 2, rel=1e-4)
    gradient = wrap(jax.grad(lambda s: d.match(s, batch)[0]))(scores).logits
    assert np.isfinite(gradient).all() and not gradient[0, 2].any()
    if k == 3:
        np.testing.assert_allclose(gradient[0, 0], (P - Q) / 2, atol=1e-6)


def test_a_teacher_speaks_only_of_groups_that_nobody_solved():
    _, batch = build(np.ones((4, 1), bool), group=[0, 0, 1, 1], outcome=[1.0, 0.0, 0.0, 0.0])
    np.testing.assert_array_equal(d.unsolved_groups(batch), [0, 0, 1, 1])
