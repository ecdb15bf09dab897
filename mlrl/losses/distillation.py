"""Learning from a teacher: divergences of whole distributions, and of single tokens inside a policy loss.

Whole distributions take logits [..., V] and return one number per position; reduce them like any per-token loss.
Teachers are constants. Everything is computed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mlrl import divergences, groups, importance
from mlrl.divergences import Estimator
from mlrl.losses.regularizers import is_off
from mlrl.types import Array, Batch, Metrics, Scores


def forward_kl(student_logits: Array, teacher_logits: Array) -> Array:
    """KL(teacher || student) = sum_v q (log q - log p): covers all the teacher does. [...,V], [...,V] -> [...]."""
    p, q = _logs(student_logits), jax.lax.stop_gradient(_logs(teacher_logits))
    return _kl(q, p)


def reverse_kl(student_logits: Array, teacher_logits: Array) -> Array:
    """KL(student || teacher) = sum_v p (log p - log q): seeks a mode. [...,V], [...,V] -> [...]."""
    p, q = _logs(student_logits), jax.lax.stop_gradient(_logs(teacher_logits))
    return _kl(p, q)


def jensen_shannon(student_logits: Array, teacher_logits: Array, *, beta: float = 0.5) -> Array:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student.

    Args:
        student_logits: [...,V].
        teacher_logits: [...,V].
        beta: in (0, 1). Divided by beta it nears the forward KL at 0; divided by 1 - beta, the reverse at 1.

    Returns:
        [...] in nats.

    Reference: Agarwal et al. 2023, "On-Policy Distillation of Language Models" (GKD).
    """
    p, q = _logs(student_logits), jax.lax.stop_gradient(_logs(teacher_logits))
    m = jnp.logaddexp(q + jnp.log(beta), p + jnp.log1p(-beta))
    return beta * _kl(q, m) + (1.0 - beta) * _kl(p, m)


def top_k(
    student_logits: Array, teacher_logits: Array, *, k: int, divergence: Callable[..., Array] = forward_kl
) -> Array:
    """A divergence over the teacher's k likeliest tokens, with all the rest lumped into one.

    Lumping keeps both sides distributions, and the result is a lower bound of the whole divergence. What is stored
    of a teacher is then k ids and k log-probs per position.

    Args:
        student_logits: [...,V].
        teacher_logits: [...,V].
        k: in [1, V).
        divergence: forward_kl, reverse_kl or jensen_shannon.

    Returns:
        [...] in nats.
    """
    q, ids = jax.lax.top_k(jax.lax.stop_gradient(_logs(teacher_logits)), k)
    p = jnp.take_along_axis(_logs(student_logits), ids, axis=-1)
    return divergence(_with_rest(p), _with_rest(q))


def _with_rest(log_probs: Array) -> Array:
    """Appends the log of the missing mass, held at 1e-7: [...,k] -> [...,k+1]."""
    rest = jnp.maximum(1.0 - jnp.exp(log_probs).sum(axis=-1, keepdims=True), 1e-7)
    return jnp.concatenate([log_probs, jnp.log(rest)], axis=-1)


def _logs(logits: Array) -> Array:
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


def _kl(log_a: Array, log_b: Array) -> Array:
    possible = log_a > -jnp.inf  # 0 log 0 is 0
    difference = jnp.where(possible, log_a, 0.0) - jnp.where(possible, log_b, 0.0)
    return jnp.sum(jnp.where(possible, jnp.exp(log_a), 0.0) * difference, axis=-1)


def every_row(batch: Batch) -> Array:
    """The teacher speaks of all rows: [B] ones."""
    return jnp.ones(batch.mask.shape[0], jnp.float32)


def failed_rows(batch: Batch, *, threshold: float = 0.5) -> Array:
    """The teacher speaks only of rows whose outcome is not above the threshold (KDRL's response-level mask): [B]."""
    return (batch.rewards.scored & (batch.rewards.outcome <= threshold)).astype(jnp.float32)


def unsolved_groups(batch: Batch, *, threshold: float = 0.5) -> Array:
    """The teacher speaks only of groups in which no row's outcome is above the threshold (KDRL's group mask): [B]."""
    solved = batch.rewards.scored & (batch.rewards.outcome > threshold)
    solved_rows = groups.total(solved.astype(jnp.float32), batch.rollout.group, batch.rewards.scored)
    return (solved_rows == 0).astype(jnp.float32)


def match(
    scores: Scores,
    batch: Batch,
    *,
    divergence: Callable[..., Array] = forward_kl,
    distill_coef: float | Array = 1.0,
    gate: Callable[[Batch], Array] = every_row,
) -> tuple[Array, Metrics]:
    """Distillation of whole distributions: distill_coef * sum(weights * gate * divergence(student, teacher)).

    The teacher is the reference model; where it was asked for its K likeliest tokens only, the rest is one token more
    on both sides (`top_k`). On the student's own rollouts this is GKD, on stored rows word-level distillation.

    Args:
        scores: reads logits.
        batch: reads reference_distribution, mask, weights.
        divergence: forward_kl, reverse_kl or jensen_shannon.
        distill_coef: 0.0 is off; may be traced (a controller's).
        gate: batch -> [B], how much of each row the teacher speaks of.

    Returns:
        (loss, {"loss/distill", "divergence/teacher": token mean, neither gated nor scaled}).

    Reference: Hinton et al. 2015; Agarwal et al. 2023 (GKD). Left out: a temperature of distillation of its own.
    """
    if is_off(distill_coef):
        return jnp.zeros((), jnp.float32), {}
    teacher = batch.reference_distribution
    inside = batch.mask[..., None]  # before the softmax, so that NaN in padding reaches no gradient
    student = jnp.take_along_axis(_logs(jnp.where(inside, scores.logits, 0.0)), teacher.ids, axis=-1)
    known = jnp.where(inside, teacher.log_probs, 0.0)
    if teacher.ids.shape[-1] < scores.logits.shape[-1]:
        student, known = _with_rest(student), _with_rest(known)
    per_token = jnp.where(batch.mask, divergence(student, known), 0.0)
    speaks = gate(batch)[:, None]
    loss = distill_coef * jnp.sum(batch.weights * speaks * per_token)
    raw = jnp.sum(batch.token_weights * jax.lax.stop_gradient(per_token))
    return loss, {"loss/distill": jax.lax.stop_gradient(loss), "divergence/teacher": raw}


def teacher_kl(
    scores: Scores,
    batch: Batch,
    *,
    kl_coef: float | Array = 2e-3,
    estimator: Estimator = divergences.k2,
    gate: Callable[[Batch], Array] = every_row,
    limit: float = 20.0,
) -> tuple[Array, Metrics]:
    """Reverse KL to a teacher on the student's own tokens, the teacher being the reference model.

    loss = kl_coef * sum(weights * gate * estimator(log_probs - reference_log_probs)). k2 has the unbiased gradient
    of each token's KL (`mlrl.divergences`).
    With no other loss it is on-policy distillation; beside a policy loss it is KDRL.

    Args:
        scores: of the student.
        batch: reads reference_log_probs (the teacher's), mask, weights.
        kl_coef: 0.0 is off; may be traced (a controller's annealing).
        estimator: from `divergences`.
        gate: batch -> [B], how much of each row the teacher speaks of.
        limit: the log-ratio is held within +-limit nats, without gradient beyond.

    Returns:
        (loss, {"loss/teacher", "kl/teacher": raw token mean of k1}).

    Reference: Xu et al. 2025, "KDRL". Its response-level mask is `failed_rows`, its group-level one `unsolved_groups`.
    """
    if is_off(kl_coef):
        return jnp.zeros((), jnp.float32), {}
    log_ratio = importance.log_ratio(scores.log_probs, batch.reference_log_probs, batch.mask)
    per_token = divergences.limited(log_ratio, estimator=estimator, limit=limit)
    loss = kl_coef * jnp.sum(batch.weights * gate(batch)[:, None] * per_token)
    raw = jnp.sum(batch.token_weights * jax.lax.stop_gradient(log_ratio))
    return loss, {"loss/teacher": jax.lax.stop_gradient(loss), "kl/teacher": raw}
