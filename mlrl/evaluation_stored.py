"""Evaluation of judgements on stored completions: which of two is better, which steps are right, and how sure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mlrl import metrics, processes, scoring, stored
from mlrl.evaluation import Measured, Results, due, interval
from mlrl.losses.preference import implicit_reward
from mlrl.types import Array, Batch, Params, Refused, Scores, Task, require_whole
from mlrl.updates import fields_read

RowReward = Callable[[Scores, Batch], Array]  # -> [B]
JudgeFn = Callable[[Scores, Batch, Array, int], tuple[Array, Array]]  # -> (log-odds [N,K], truth [N,K])


def pairs(
    scores: Scores, batch: Batch, labels: Array, each: int, *, reward_fn: RowReward = implicit_reward
) -> tuple[Array, Array]:
    """Whether the one candidate of a prompt is better than the other: log-odds r_i - r_j, for i < j.

    Args:
      scores, batch: what reward_fn reads, of B = N * C rows in whole groups.
      labels: not read.
      each: C.
      reward_fn: preference.implicit_reward, preference.likelihood_reward, reward_models.row_values, or one like them.
        A `beta` in it must be that of the loss.
    Returns: (log-odds [N,K], truth [N,K] 1 or 0; NaN where the outcomes are equal or one is missing), K = C(C-1)/2.
    """
    del labels
    first, second = np.triu_indices(each, 1)
    by_prompt = lambda x: x.reshape(-1, each)  # noqa: E731
    reward = by_prompt(reward_fn(scores, batch))
    outcome = by_prompt(jnp.where(batch.rewards.scored, batch.rewards.outcome, jnp.nan))
    difference = outcome[:, first] - outcome[:, second]
    truth = jnp.where(jnp.abs(difference) > 1e-6, (difference > 0).astype(jnp.float32), jnp.nan)
    return reward[:, first] - reward[:, second], truth


def steps(scores: Scores, batch: Batch, labels: Array, each: int) -> tuple[Array, Array]:
    """Whether each labelled step is right: its log-odds are scores.values there. (log-odds, truth), each [N,C*L]."""
    by_prompt = lambda x: x.reshape(-1, each * x.shape[1])  # noqa: E731
    return by_prompt(scores.values), by_prompt(jnp.where(jnp.isnan(labels), jnp.nan, (labels > 0.5)))


@dataclasses.dataclass(frozen=True)
class StoredEvaluation:
    """How well the model judges stored completions, and how often that is measured.

    task          held-out prompts with candidates: the first `prompts` of them, always the same
    judge_fn      `pairs` (a preference: implicit rewards, or a reward model's) or `steps` (a process reward model)
    prompts       how many prompts
    every_steps   measured before, after, and every so many steps; 0: before and after only
    """

    task: Task
    judge_fn: JudgeFn = pairs
    prompts: int = 256
    every_steps: int = 0

    def __post_init__(self):
        require_whole("StoredEvaluation", "prompts", self.prompts, 1)
        require_whole("StoredEvaluation", "every_steps", self.every_steps, 0)
        if not isinstance(self.task, Task):
            raise Refused(f"StoredEvaluation.task must be a Task, got {self.task!r}: call a function, as @name()")

    def due(self, step: int, last_step: int) -> bool:
        """Whether this is measured after `step` steps of a run that ends at `last_step`."""
        return due(self.every_steps, step, last_step)

    def words(self) -> str:
        """What is measured."""
        return "the judgement of their stored completions"

    def require_candidates(self) -> None:
        """Raises Refused, if the task has no candidates."""
        stored.candidates_per_prompt(self.task)

    def reads(self, batch: Batch) -> set[str]:
        """The fields that the judge looks at, as "Batch.reference_log_probs"; nothing is computed."""
        each = stored.candidates_per_prompt(self.task)
        rows = jax.eval_shape(lambda: jax.tree.map(lambda x: jnp.zeros((each, *x.shape[1:]), x.dtype), batch))
        scores = Scores(rows.advantages, rows.advantages, rows.advantages)
        return fields_read(lambda s, b: self.judge_fn(s, b, b.advantages, each)[0], scores, rows)

    def measure(self, models: Measured) -> Callable[[Params, Params], Results]:
        """(params, reference's) -> accuracy, log-loss, Brier score and calibration error of the task's judgements."""
        each = stored.candidates_per_prompt(self.task)
        batch, labels = jax.tree.map(jnp.asarray, stored.first(self.task, self.prompts))
        with_reference = "Batch.reference_log_probs" in self.reads(batch)

        @jax.jit
        def judged(params: Params, reference: Params, batch: Batch, labels: Array) -> tuple[Array, Array]:
            if with_reference:
                said = scoring.score(models.reference_model, reference, batch.rollout)
                batch = batch.replace(reference_log_probs=said.log_probs)
            return self.judge_fn(scoring.score(models.model, params, batch.rollout), batch, labels, each)

        return lambda params, reference: {
            self.task.name: statistics(*processes.on_host(judged(params, reference, batch, labels)))
        }


def statistics(log_odds: np.ndarray, truth: np.ndarray) -> dict[str, dict[str, float]]:
    """Accuracy (a tie counts half), log-loss in nats, Brier score, and calibration error of a judge.

    The calibration error compares how sure the judge is of what it says, max(p, 1 - p), with how often that is right,
    in ten bins of equal mass; it does not depend on which of two candidates comes first. With few prompts it is above
    0 even for a calibrated judge. Intervals are over prompts, of the calibration error by bootstrap.

    Args:
      log_odds: [N,K], of p = sigmoid(log_odds).
      truth: [N,K], 1 or 0, or NaN where there was nothing to judge.
    """
    log_odds, known = np.asarray(log_odds, np.float64), ~np.isnan(truth)
    signed = np.where(known, np.where(truth > 0.5, log_odds, -log_odds), np.nan)  # above 0 where the judge is right
    p = 1.0 / (1.0 + np.exp(-np.clip(signed, -60.0, 60.0)))
    per_prompt = {
        "accuracy": np.where(known, (signed > 0) + 0.5 * (signed == 0), np.nan),
        "log_loss": -np.log(p),
        "brier": np.square(1.0 - p),
    }
    found = {name: interval(_mean_of_known(x)) for name, x in per_prompt.items()}
    return found | {"calibration_error": _calibration(p[known.any(axis=1)])}


def _mean_of_known(x: np.ndarray) -> np.ndarray:
    """[N,K] -> [N], NaN for a prompt with nothing to judge."""
    known = ~np.isnan(x)
    return np.where(known.any(axis=1), np.where(known, x, 0.0).sum(axis=1) / np.maximum(known.sum(axis=1), 1), np.nan)


def _calibration(p: np.ndarray) -> dict[str, float]:
    """The expected calibration error, from the probability of what is true [N,K] (NaN: none), and its interval."""
    if len(p) == 0:
        return interval(np.zeros(0))

    def error(p: np.ndarray, axis: int) -> float:
        del axis
        known = p[~np.isnan(p)]
        right = (known > 0.5) + 0.5 * (known == 0.5)
        return metrics.expected_calibration_error(np.maximum(known, 1.0 - known), right)

    mean, low, high = metrics.bootstrap_interval(p, statistic=error, resamples=500)
    return {"value": mean, "low": low, "high": high, "prompts": len(p)}
