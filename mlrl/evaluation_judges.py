"""Evaluation of a policy as a judge: of fixed completions whose quality is known, and of what it writes itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mlrl import metrics, processes, prompts, stored
from mlrl.evaluation import Measured, Results, due, interval
from mlrl.rewards import judges
from mlrl.sampling import GREEDY
from mlrl.tasks.judgements import Form
from mlrl.types import Array, Params, Prompts, Refused, Rollout, Task, require_whole


@dataclasses.dataclass(frozen=True)
class JudgeEvaluation:
    """How well the policy judges, by greedy grades, and what it thinks of itself.

    Of stored completions: "auc" (how often the better of two completions of a prompt gets the higher grade; equal
    grades count half), "correlation" (of grade and quality, Pearson's over all), "grade" and "quality" (means), and
    "unreadable" (the share of answers that are no grade). Of the policy's own greedy completions: "own_grade" and
    "own_unreadable".

    task          held-out prompts with rated candidates: the first `prompts` of them, always the same
    form          what the judge reads, as in training
    prompts       how many prompts
    every_steps   measured before, after, and every so many steps; 0: before and after only
    """

    task: Task
    form: Form = Form()
    prompts: int = 128
    every_steps: int = 0

    def __post_init__(self):
        require_whole("JudgeEvaluation", "prompts", self.prompts, 1)
        require_whole("JudgeEvaluation", "every_steps", self.every_steps, 0)
        if not isinstance(self.task, Task):
            raise Refused(f"JudgeEvaluation.task must be a Task, got {self.task!r}: call a function, as @name()")

    def due(self, step: int, last_step: int) -> bool:
        """Whether this is measured after `step` steps of a run that ends at `last_step`."""
        return due(self.every_steps, step, last_step)

    def words(self) -> str:
        """What is measured."""
        return "its grades of stored completions and of its own"

    def require_candidates(self) -> None:
        """Raises Refused, if the task has no candidates."""
        stored.candidates_per_prompt(self.task)

    def measure(self, models: Measured) -> Callable[[Params, Params], Results]:
        """(params, reference's) -> results."""
        each, vocabulary = stored.candidates_per_prompt(self.task), self.task.vocabulary
        batch, _ = jax.tree.map(jnp.asarray, stored.first(self.task, self.prompts))
        asked = jax.tree.map(jnp.asarray, prompts.first(self.task, self.prompts))

        def graded(params: Params, given: tuple[Prompts, Rollout]) -> Array:
            def generate(rows: Prompts, key: Array, *, rollout_fn: Callable, **how: object) -> Rollout:
                return rollout_fn(models.model, params, rows, key, vocabulary=vocabulary, **how)

            asked, rows = given
            about = judges.asked_of(self.form, vocabulary, rows, asked)
            return judges.grades(generate, *about, jax.random.key(0), form=self.form, vocabulary=vocabulary)[:, 0]

        def graded_own(params: Params, asked: Prompts) -> Array:
            own = models.rollout_fn(models.model, params, asked, jax.random.key(0), vocabulary=vocabulary,
                                    sampling=GREEDY, group_size=1)  # fmt: skip
            return graded(params, (asked, own))

        candidates = (prompts.repeat(asked, each), batch.rollout)
        of_stored, of_own = models.compiled(graded, candidates), models.compiled(graded_own, asked)

        def measure(params: Params, reference: Params) -> Results:
            found, own = processes.on_host((of_stored(params, candidates), of_own(params, asked)))
            quality = np.where(batch.rewards.scored, batch.rewards.outcome, np.nan)
            results = statistics(np.asarray(found).reshape(-1, each), quality.reshape(-1, each))
            own = np.asarray(own)
            results |= {"own_grade": interval(own), "own_unreadable": interval(np.isnan(own).astype(float))}
            return {self.task.name: results}

        return measure


def statistics(grades: np.ndarray, quality: np.ndarray) -> dict[str, dict[str, float]]:
    """auc, correlation, grade, quality and unreadable of grades [N,C], NaN where unreadable, of known quality [N,C].

    Pairs of equal quality are in no AUC. Intervals are over prompts, of the correlation by bootstrap.
    """
    grades, quality = np.asarray(grades, np.float64), np.asarray(quality, np.float64)
    first, second = np.triu_indices(grades.shape[1], 1)
    better = np.sign(quality[:, first] - quality[:, second])
    higher = np.sign(grades[:, first] - grades[:, second])
    told = np.where((better == 0) | np.isnan(better) | np.isnan(higher), np.nan, 0.5 + 0.5 * better * higher)
    known = ~np.isnan(told)
    count = known.sum(axis=1)
    auc = np.where(count > 0, np.where(known, told, 0.0).sum(axis=1) / np.maximum(count, 1), np.nan)
    return {
        "auc": interval(auc),
        "correlation": _correlation(np.stack([grades, quality], axis=-1)),
        "grade": interval(_mean(grades)),
        "quality": interval(_mean(quality)),
        "unreadable": interval(np.isnan(grades).mean(axis=1)),
    }


def _mean(x: np.ndarray) -> np.ndarray:
    """[N,C] -> [N], NaN without any."""
    known = ~np.isnan(x)
    return np.where(known.any(axis=1), np.where(known, x, 0.0).sum(axis=1) / np.maximum(known.sum(axis=1), 1), np.nan)


def _correlation(both: np.ndarray) -> dict[str, float]:
    """Pearson's, with its interval, of [N,C,2]; NaN where one of the two does not vary."""

    def pearson(both: np.ndarray, axis: int) -> float:
        del axis
        x, y = both.reshape(-1, 2)[~np.isnan(both.reshape(-1, 2)).any(axis=1)].T
        if x.size < 2 or x.std() == 0 or y.std() == 0:
            return float("nan")
        return float(np.corrcoef(x, y)[0, 1])

    value, low, high = metrics.bootstrap_interval(both, statistic=pearson, resamples=200)
    return {"value": value, "low": low, "high": high, "prompts": len(both)}
