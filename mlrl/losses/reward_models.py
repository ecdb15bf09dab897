"""Losses that teach a value head to judge: Bradley-Terry, Plackett-Luce, and step by step.

A row's score is scores.values at its last action column: what the model thinks of everything before that token, which
is the closing EOS. Groups, pairs and weights are those of `losses.preference`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlrl.losses.preference import PairFn, all_pairs, pair_weights
from mlrl.reductions import row_last
from mlrl.types import Array, Batch, Metrics, Scores


def row_values(scores: Scores, batch: Batch) -> Array:
    """The value at each row's last masked column: [B]; 0 for a row without one."""
    return row_last(scores.values, batch.mask)


def bradley_terry(
    scores: Scores, batch: Batch, *, margin: float = 0.0, centre_coef: float = 0.0, pair_fn: PairFn = all_pairs
) -> tuple[Array, Metrics]:
    """-log sigmoid(r_chosen - r_rejected - margin (o_chosen - o_rejected)) + centre_coef (r_chosen + r_rejected)^2.

    Args:
        scores: reads values.
        batch: reads rewards.outcome, mask, weights.
        margin: reward difference asked for per unit of difference in outcome.
        centre_coef: pulls the mean reward of a pair to 0; 0.01 is customary.
        pair_fn: which pairs.

    Returns:
        (loss, {"loss/reward_model", "preference/accuracy", "preference/margin"}).

    Reference: Ouyang et al. 2022; Touvron et al. 2023 (margin); Eisenstein et al. 2023 (centring).
    """
    weights = pair_weights(batch, pair_fn=pair_fn)
    reward = row_values(scores, batch)
    outcome = jnp.where(batch.rewards.scored, batch.rewards.outcome, 0.0)
    difference = reward[:, None] - reward[None, :]
    loss = jax.nn.softplus(margin * (outcome[:, None] - outcome[None, :]) - difference)
    if centre_coef:
        loss = loss + centre_coef * jnp.square(reward[:, None] + reward[None, :])
    return _report("reward_model", jnp.sum(weights * loss), weights, difference)


def plackett_luce(scores: Scores, batch: Batch) -> tuple[Array, Metrics]:
    """Listwise: minus the log-likelihood of each group's order, sum over rows of log sum_{j not above i} e^{r_j} - r_i.

    The last place of a group adds 0. Rows of equal outcome share a place: each is compared with all of them. A
    group's terms share its weight by its number of rows.

    Args:
        scores: reads values.
        batch: reads rewards.outcome, mask, weights.

    Returns:
        (loss, {"loss/reward_model", "preference/accuracy", "preference/margin"}), the last two over all pairs.

    Reference: Plackett 1975; Luce 1959.
    """
    eligible = batch.rewards.scored & batch.mask.any(axis=1) & (batch.rollout.role == 0)
    outcome = jnp.where(eligible, batch.rewards.outcome, 0.0)
    same = (batch.rollout.group[:, None] == batch.rollout.group[None, :]) & eligible[:, None] & eligible[None, :]
    reward = row_values(scores, batch)
    below = same & (outcome[None, :] <= outcome[:, None] + 1e-6)
    rivals = jnp.where(below, reward[None, :], -jnp.inf)
    term = jax.nn.logsumexp(jnp.where(eligible[:, None], rivals, 0.0), axis=1) - reward
    together = same.astype(jnp.float32)
    share = (together @ batch.weights.sum(axis=1)) / jnp.maximum(together.sum(axis=1), 1.0)
    loss = jnp.sum(jnp.where(eligible, share * term, 0.0))
    return _report("reward_model", loss, pair_weights(batch), reward[:, None] - reward[None, :])


def step_labels(scores: Scores, batch: Batch) -> tuple[Array, Metrics]:
    """Process reward model: binary cross-entropy of sigmoid(values) with the 0/1 label of each step.

    Args:
        scores: reads values.
        batch: the mask marks the columns that carry a label (the token behind each step, whose value is of
            the state in which the step has ended), rewards.tokens holds
            the labels in [0, 1] there. Reduce by token_mean for a mean over steps.

    Returns:
        (loss, {"loss/reward_model", "preference/accuracy"}).

    Reference: Lightman et al. 2023, "Let's Verify Step by Step", with two classes instead of three.
    """
    logits = jnp.where(batch.mask, scores.values, 0.0)
    labels = jnp.where(batch.mask, batch.rewards.tokens, 0.0)
    loss = jnp.sum(batch.weights * (jax.nn.softplus(logits) - labels * logits))
    right = (logits > 0) == (labels > 0.5)
    accuracy = jnp.sum(batch.token_weights * right)
    return loss, {"loss/reward_model": jax.lax.stop_gradient(loss), "preference/accuracy": accuracy}


def _report(name: str, loss: Array, weights: Array, difference: Array) -> tuple[Array, Metrics]:
    difference = jax.lax.stop_gradient(difference)
    return loss, {
        f"loss/{name}": jax.lax.stop_gradient(loss),
        "preference/accuracy": jnp.sum(weights * (difference > 0)),
        "preference/margin": jnp.sum(weights * difference),
    }
