"""Preference losses on rows that come in groups: which row is better is read from the outcomes, found by group id.

A pair is two rows of one group whose rewards.outcome differ; the higher is the chosen one. Both must be in the mask
and have role 0. A group's weight is the sum of its rows' weights, shared by its pairs: with
`reductions.sequence_mean_token_mean` and two rows a group, the loss is the mean over pairs. A group whose outcomes are
equal has no pair and still counts in that mean; `selection.with_spread` takes it out.

Groups must stay whole when a batch is split: rows of a group side by side, and `updates.update` told how many those
are (unit_rows); the loops see to it.
Sums of log-probs run over the mask. Delta is the row's sum of log_probs - reference_log_probs.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mlrl import importance, reductions
from mlrl.losses import contrasts
from mlrl.types import Array, Batch, Metrics, Scores

PairFn = Callable[[Array, Array, Array], Array]  # outcome [B], group [B], eligible [B] -> is pair [B,B] bool
Contrast = Callable[[Array, Array], Array]  # rewards of chosen rows [B,1] and rejected rows [1,B] -> losses [B,B]


def all_pairs(outcome: Array, group: Array, eligible: Array) -> Array:
    """pair[i,j]: rows i and j share a group, both are eligible, and i has the higher outcome (by more than 1e-6)."""
    same = (group[:, None] == group[None, :]) & eligible[:, None] & eligible[None, :]
    return same & (outcome[:, None] > outcome[None, :] + 1e-6)


def best_and_worst(outcome: Array, group: Array, eligible: Array) -> Array:
    """Only each group's best rows against its worst (online DPO). Rows that tie share the pair."""
    pairs = all_pairs(outcome, group, eligible)
    return pairs & ~pairs.any(axis=0)[:, None] & ~pairs.any(axis=1)[None, :]


def pair_weights(batch: Batch, *, pair_fn: PairFn = all_pairs) -> Array:
    """Weight of each pair (chosen, rejected): [B,B], 0 where there is none. The module's first lines say how."""
    rows = batch.weights.sum(axis=1)
    eligible = batch.rewards.scored & batch.mask.any(axis=1) & (batch.rollout.role == 0)
    outcome = jnp.where(eligible, batch.rewards.outcome, 0.0)
    pairs = pair_fn(outcome, batch.rollout.group, eligible).astype(jnp.float32)
    same = (batch.rollout.group[:, None] == batch.rollout.group[None, :]).astype(jnp.float32)
    return pairs * (same @ rows)[:, None] / jnp.maximum(same @ pairs.sum(axis=1), 1.0)[:, None]


def _deltas(scores: Scores, batch: Batch, row_of: Callable[[Array, Array], Array] = reductions.row_sum) -> Array:
    return row_of(importance.log_ratio(scores.log_probs, batch.reference_log_probs, batch.mask), batch.mask)


def _log_probs(scores: Scores, batch: Batch) -> Array:
    return reductions.row_sum(scores.log_probs, batch.mask)


def _mean_log_probs(scores: Scores, batch: Batch) -> Array:
    return reductions.row_mean(scores.log_probs, batch.mask)


def _add_up(name: str, pair_loss: Array, row_reward: Array, scores: Scores, batch: Batch, weights: Array):
    """Sums a [B,B] loss, and reports the implicit rewards of chosen and rejected rows as means over pairs."""
    loss = jnp.sum(jnp.where(weights > 0, weights * pair_loss, 0.0))
    margin = row_reward[:, None] - row_reward[None, :]
    log_probs = _mean_log_probs(scores, batch)
    metrics = {
        f"loss/{name}": loss,
        "preference/accuracy": jnp.sum(weights * (margin > 0)),
        "preference/margin": jnp.sum(weights * margin),
        "preference/chosen_log_prob": jnp.sum(weights * log_probs[:, None]),
        "preference/rejected_log_prob": jnp.sum(weights * log_probs[None, :]),
    }
    return loss, jax.tree.map(jax.lax.stop_gradient, metrics)


def implicit_reward(
    scores: Scores, batch: Batch, *, beta: float = 0.1, row_of: Callable[[Array, Array], Array] = reductions.row_sum
) -> Array:
    """DPO's reward of each row, beta * Delta: [B]. Reads log_probs, reference_log_probs, mask."""
    return beta * _deltas(scores, batch, row_of)


def likelihood_reward(
    scores: Scores, batch: Batch, *, beta: float = 1.0, row_of: Callable[[Array, Array], Array] = reductions.row_mean
) -> Array:
    """The reward of losses without a reference, beta times the row's mean (or summed) log-prob: [B]."""
    return beta * row_of(scores.log_probs, batch.mask)


def dpo(
    scores: Scores,
    batch: Batch,
    *,
    beta: float = 0.1,
    contrast: Contrast = contrasts.logistic,
    row_of: Callable[[Array, Array], Array] = reductions.row_sum,
    nll_coef: float = 0.0,
    pair_fn: PairFn = all_pairs,
) -> tuple[Array, Metrics]:
    """DPO: -log sigmoid(beta (Delta_chosen - Delta_rejected)), plus nll_coef times the chosen row's mean NLL.

    Other contrasts make of it robust DPO, hinge, EXO, NCA, BCO, SPPO, APO and DiscoPOP.

    Args:
        scores: reads log_probs.
        batch: reads reference_log_probs, rewards.outcome, mask, weights.
        beta: strength of the implicit KL.
        contrast: from `losses.contrasts`: (chosen, rejected) rewards beta * Delta -> loss of the pair.
        row_of: reductions.row_sum, or row_mean for length-normalized DPO.
        nll_coef: 0.0 is off; 1.0 in iterative reasoning preference optimization.
        pair_fn: all_pairs, or best_and_worst for online DPO.

    Returns:
        (loss, metrics); the margin is of beta * Delta.

    Reference: Rafailov et al. 2023, "Direct Preference Optimization"; Pang et al. 2024 for the NLL term.
    """
    weights = pair_weights(batch, pair_fn=pair_fn)
    reward = beta * _deltas(scores, batch, row_of)
    loss = contrast(reward[:, None], reward[None, :])
    if nll_coef:
        loss = loss - nll_coef * _mean_log_probs(scores, batch)[:, None]
    return _add_up("dpo", loss, reward, scores, batch, weights)


def ipo(
    scores: Scores, batch: Batch, *, tau: float = 0.1, pair_fn: PairFn = all_pairs
) -> tuple[Array, Metrics]:
    """IPO: (Delta_chosen / n_chosen - Delta_rejected / n_rejected - 1 / (2 tau))^2, with per-token means.

    Args:
        scores: reads log_probs.
        batch: reads reference_log_probs, rewards.outcome, mask, weights.
        tau: strength of the regularization.
        pair_fn: which pairs.

    Returns:
        (loss, metrics); the margin is of the mean log-ratio.

    Reference: Azar et al. 2023. The paper has sums; the means are TRL's and HALOs'.
    """
    weights = pair_weights(batch, pair_fn=pair_fn)
    reward = _deltas(scores, batch, reductions.row_mean)
    loss = jnp.square(reward[:, None] - reward[None, :] - 0.5 / tau)
    return _add_up("ipo", loss, reward, scores, batch, weights)


def simpo(
    scores: Scores, batch: Batch, *, beta: float = 2.0, margin: float = 0.25, pair_fn: PairFn = all_pairs
) -> tuple[Array, Metrics]:
    """SimPO: -log sigmoid(beta (s_chosen - s_rejected - margin)), s the row's mean log-prob; no reference.

    Args:
        scores: reads log_probs.
        batch: reads rewards.outcome, mask, weights.
        beta: 2 to 10 in the authors' recipes.
        margin: gamma / beta, in nats per token; TRL's gamma is beta times this.
        pair_fn: which pairs.

    Returns:
        (loss, metrics); the margin logged is of beta * s.

    Reference: Meng et al. 2024, "SimPO".
    """
    weights = pair_weights(batch, pair_fn=pair_fn)
    reward = beta * _mean_log_probs(scores, batch)
    loss = contrasts.logistic(reward[:, None], reward[None, :] + beta * margin)
    return _add_up("simpo", loss, reward, scores, batch, weights)


def cpo(
    scores: Scores, batch: Batch, *, beta: float = 0.1, nll_coef: float = 1.0, pair_fn: PairFn = all_pairs
) -> tuple[Array, Metrics]:
    """CPO: -log sigmoid(beta (log p_chosen - log p_rejected)) + nll_coef * mean NLL of the chosen row; no reference.

    Args:
        scores: reads log_probs.
        batch: reads rewards.outcome, mask, weights.
        beta: on sums of log-probs.
        nll_coef: on the mean NLL per token of each chosen row.
        pair_fn: which pairs.

    Returns:
        (loss, metrics).

    Reference: Xu et al. 2024, "Contrastive Preference Optimization".
    """
    weights = pair_weights(batch, pair_fn=pair_fn)
    reward = beta * _log_probs(scores, batch)
    loss = contrasts.logistic(reward[:, None], reward[None, :])
    loss = loss - nll_coef * _mean_log_probs(scores, batch)[:, None]
    return _add_up("cpo", loss, reward, scores, batch, weights)


def orpo(
    scores: Scores, batch: Batch, *, odds_coef: float = 0.1, pair_fn: PairFn = all_pairs
) -> tuple[Array, Metrics]:
    """ORPO: mean NLL of the chosen row - odds_coef log sigmoid(o_chosen - o_rejected), o = s - log(1 - e^s).

    Args:
        scores: reads log_probs.
        batch: reads rewards.outcome, mask, weights.
        odds_coef: the paper's lambda.
        pair_fn: which pairs.

    Returns:
        (loss, metrics); the margin is of the log-odds.

    Reference: Hong et al. 2024, "ORPO". The authors' NLL includes the prompt by default; ours is the mask's.
    """
    weights = pair_weights(batch, pair_fn=pair_fn)
    mean = _mean_log_probs(scores, batch)
    odds = mean - _log1mexp(mean)
    loss = odds_coef * contrasts.logistic(odds[:, None], odds[None, :]) - mean[:, None]
    return _add_up("orpo", loss, odds, scores, batch, weights)


def _log1mexp(x: Array) -> Array:
    """log(1 - exp(x)) for x < 0, exact near 0 and far from it; held at x = -1e-6."""
    x = jnp.minimum(x, -1e-6)
    near = x > -0.6931472
    return jnp.where(
        near, jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x)))
    )


def kto(
    scores: Scores,
    batch: Batch,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Array, Metrics]:
    """KTO, on single rows: w (1 - sigmoid(sign beta (Delta - z0))), sign and z0 from `advantages.kto`.

    Args:
        scores: reads log_probs.
        batch: reads reference_log_probs, advantages (the sign), returns (z0), mask, weights. A row weighs the sum of
            its tokens' weights: reduce by sequence_mean_token_mean.
        beta: as in DPO.
        desirable_weight: lambda_D.
        undesirable_weight: lambda_U.

    Returns:
        (loss, {"loss/kto", "preference/signed_reward"}).

    Reference: Ethayarajh et al. 2024, "KTO". z0 is of the policy before the update, over the whole batch.
    """
    sign = jnp.sign(reductions.row_mean(batch.advantages, batch.mask))
    reference_point = jax.lax.stop_gradient(reductions.row_mean(batch.returns, batch.mask))
    signed = sign * beta * (_deltas(scores, batch) - reference_point)
    rows = batch.weights.sum(axis=1)
    weight = jnp.where(sign > 0, desirable_weight, undesirable_weight) * rows
    loss = jnp.sum(weight * (1.0 - jax.nn.sigmoid(signed)))
    signed_reward = jnp.sum(rows * jax.lax.stop_gradient(signed))
    return loss, {"loss/kto": jax.lax.stop_gradient(loss), "preference/signed_reward": signed_reward}


def optimism(scores: Scores, batch: Batch, *, optimism_coef: float = 1e-3, beta: float = 0.01, greedy_role: int = 1):
    """SELM's term, added to DPO: optimism_coef * beta * Delta(greedy row), minimized, so what is likely loses mass.

    Args:
        scores: reads log_probs.
        batch: rows of role `greedy_role` hold the round's greedy completions, in the group of their pair; they form
            no pairs. A group's weight is shared by its greedy rows.
        optimism_coef: the paper's alpha.
        beta: DPO's.
        greedy_role: role of the greedy rows.

    Returns:
        (loss, {"loss/optimism"}).

    Reference: Zhang et al. 2024, "Self-Exploring Language Models" (SELM).
    """
    greedy = (batch.rollout.role == greedy_role) & batch.mask.any(axis=1)
    same = (batch.rollout.group[:, None] == batch.rollout.group[None, :]).astype(jnp.float32)
    share = greedy / jnp.maximum(same @ greedy.astype(jnp.float32), 1.0)
    weight = share * (same @ batch.weights.sum(axis=1))
    loss = optimism_coef * beta * jnp.sum(weight * _deltas(scores, batch))
    return loss, {"loss/optimism": jax.lax.stop_gradient(loss)}
