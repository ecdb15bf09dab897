"""Evaluation on held-out prompts: greedy accuracy, mean@k, pass@k and maj@k, with intervals."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from mlrl import metrics, processes, prompts
from mlrl.models.transformer import Config, Transformer
from mlrl.rewards.lifting import lift
from mlrl.sampling import GREEDY, Sampling
from mlrl.types import (
    Models,
    Params,
    Prompts,
    Refused,
    RewardFn,
    Rollout,
    RolloutFn,
    Task,
    refusing_models,
    require_whole,
)

Results = dict[str, dict[str, dict[str, float]]]  # task -> metric -> {"value", "low", "high"}


def as_in_training(*_: Any, **__: Any) -> Rollout:
    """Stands for the experiment's own rollout_fn; it is never called."""
    raise Refused("as_in_training stands for Experiment.rollout_fn, and cannot be called")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What to measure, and how often.

    task             held-out prompts: the first `prompts` of them, always the same
    reward_fn        judges the completions; its unshaped outcome counts, and an outcome above 0.5 is correct
    prompts          how many prompts
    samples          k completions a prompt, besides the greedy one; 0: greedy only
    every_steps      measured before, after, and every so many steps; 0: before and after only
    sampling         of those k; the temperature, top-k and top-p
    seed             of the samples
    answer           completion -> the answer that maj@k votes on
    parts            parts of the reward, such as "length_tokens", whose means over completions are measured too: of the
                     sampled ones, or without any of the greedy ones
    rollout_fn       how prompts become rows here; by default as in training. For a game, against a fixed opponent
    """

    task: Task
    reward_fn: RewardFn | Callable
    prompts: int = 256
    samples: int = 0
    every_steps: int = 0
    sampling: Sampling = Sampling()
    answer: Callable[[str], Any] = str.strip
    parts: Sequence[str] = ()
    seed: int = 0
    rollout_fn: RolloutFn = as_in_training

    def __post_init__(self):
        require_whole("Evaluation", "prompts", self.prompts, 1)
        for name in ("samples", "every_steps"):
            require_whole("Evaluation", name, getattr(self, name), 0)
        if not isinstance(self.task, Task):
            raise Refused(f"Evaluation.task must be a Task, got {self.task!r}: call a function, as @name()")
        known = lift(self.reward_fn).names if self.parts else ()
        for name in self.parts:
            if name not in known:
                shown = ", ".join(part for part in known if not part.startswith("unscored/"))
                raise Refused(f"Evaluation.parts names {name!r}, but the parts of its reward are {shown}")

    def due(self, step: int, last_step: int) -> bool:
        """Whether this is measured after `step` steps of a run that ends at `last_step`."""
        return due(self.every_steps, step, last_step)

    def measure(self, models: Measured) -> Callable[[Params, Params], Results]:
        """(params, reference's) -> results; samplers are compiled at their first use, and once."""
        measured = _measure(self, models._replace(rollout_fn=self.rollout(models.rollout_fn)))
        return lambda params, reference: measured(params)

    def rollout(self, in_training: RolloutFn) -> RolloutFn:
        """How this samples, in an experiment that trains on `in_training`."""
        return in_training if inspect.unwrap(self.rollout_fn) is as_in_training else self.rollout_fn

    def words(self) -> str:
        """What is measured."""
        return "greedy" + (f" and {self.samples} samples each" if self.samples else "")


SampleFn = Callable[[Params, Any], Any]  # (params, prompts) -> what is measured of the rows that were sampled


def in_place(sample: SampleFn, rows: Any) -> SampleFn:
    """Compiles `sample`, for rows of these shapes, where it is called."""
    return jax.jit(sample)


class Measured(NamedTuple):
    """What evaluations look at: the policy's model, how it samples, and the model of the frozen reference.

    `compiled` is what compiles what samples: for the devices of rollouts, if a loop has such.
    """

    model: Transformer
    rollout_fn: RolloutFn
    reference_model: Transformer
    compiled: Callable[[SampleFn, Any], SampleFn] = in_place


class AnyEvaluation(Protocol):
    """What every kind of evaluation has: `Evaluation` is of sampled completions, others of stored ones."""

    task: Task
    prompts: int
    every_steps: int

    def due(self, step: int, last_step: int) -> bool: ...

    def measure(self, models: Measured) -> Callable[[Params, Params], Results]: ...

    def words(self) -> str: ...


def due(every_steps: int, step: int, last_step: int) -> bool:
    """Before, after, and every so many steps; 0: before and after only."""
    return step in (0, last_step) or (every_steps > 0 and step % every_steps == 0)


class Evaluator(NamedTuple):
    """(params, step, last_step, the reference's params) -> results of what is due; `due` says whether anything is."""

    evaluate: Callable[[Params, int, int, Params], Results]
    due: Callable[[int, int], bool]

    def __call__(self, params: Params, step: int, last_step: int, reference: Params = ()) -> Results:
        return self.evaluate(params, step, last_step, reference)


def evaluator(evaluations: Sequence[AnyEvaluation], model: Transformer, rollout_fn: RolloutFn,
              reference_model: Transformer = Transformer(Config()),
              compiled: Callable[[SampleFn, Any], SampleFn] = in_place) -> Evaluator:  # fmt: skip
    """Binds evaluations to models. Only those that read the frozen reference need its model and parameters."""
    models = Measured(model, rollout_fn, reference_model, compiled)
    measures = [(evaluation, evaluation.measure(models)) for evaluation in evaluations]

    def evaluate(params: Params, step: int, last_step: int, reference: Params) -> Results:
        due = (measure(params, reference) for e, measure in measures if e.due(step, last_step))
        return {name: found for results in due for name, found in results.items()}

    return Evaluator(evaluate, lambda step, last: any(e.due(step, last) for e in evaluations))


def _measure(evaluation: Evaluation, models: Measured) -> Callable[[Params], Results]:
    """params -> results of the task, and of each of its sources if it has several."""
    task, reward = evaluation.task, lift(evaluation.reward_fn)
    batch = prompts.first(task, evaluation.prompts)

    def sampler(sampling: Sampling, samples: int) -> Callable[[Params], Rollout]:
        each = prompts.repeat(batch, samples)  # groups of one: a rollout may give a larger group a row of its own

        def run(params: Params, each: Prompts) -> Rollout:
            key = jax.random.key(evaluation.seed)
            return models.rollout_fn(models.model, params, each, key, vocabulary=task.vocabulary, sampling=sampling,
                                     group_size=1)  # fmt: skip

        sample = models.compiled(run, each)
        return lambda params: sample(params, each)

    greedy = sampler(GREEDY, 1)
    sampled = sampler(evaluation.sampling, evaluation.samples) if evaluation.samples else greedy  # not called then

    def outcomes(rollout: Rollout, group_size: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """(right [N,k] as 0 or 1, NaN where unscored; answers [N,k]; parts [N,k])."""
        rows = prompts.repeat(batch, group_size)
        if not reward.in_graph:
            rollout, rows = processes.on_host((rollout, rows))
        rewards, _ = reward.update(reward.init(), rollout, rows, task, _no_models(task))
        rewards, rollout = processes.on_host((rewards, rollout))
        correct = np.where(rewards.scored, rewards.outcome > 0.5, np.nan)
        answers = [evaluation.answer(text) for text in completions(rollout, task)]
        parts = {name: np.asarray(rewards.parts[name]).reshape(-1, group_size) for name in evaluation.parts}
        return correct.reshape(-1, group_size), np.asarray(answers, object).reshape(-1, group_size), parts

    def measure(params: Params) -> Results:
        correct, _, parts = outcomes(greedy(params), 1)
        more = outcomes(sampled(params), evaluation.samples) if evaluation.samples else ()
        parts = more[2] if more else parts

        def results(own: np.ndarray) -> dict[str, dict[str, float]]:
            found = {"greedy": interval(correct[own, 0])}
            found |= {name: interval(values[own].mean(axis=1)) for name, values in parts.items()}
            return found | (_sampled_results(more[0][own], more[1][own]) if more else {})

        sources = np.asarray(batch.source)
        by_source = {f"{task.name}/{task.sources[s]}": results(sources == s) for s in np.unique(sources)}
        everything = {task.name: results(np.ones_like(sources, bool))}
        return everything | (by_source if len(task.sources) > 1 else {})

    return measure


def completions(rollout: Rollout, task: Task) -> list[str]:
    """The text of every row's actions; rollout on the host."""
    return [task.vocabulary.decode(tokens[mask]) for tokens, mask in zip(rollout.tokens, rollout.action_mask)]


def _sampled_results(correct: np.ndarray, answers: np.ndarray) -> dict[str, dict[str, float]]:
    """mean@k, pass@1..k in powers of two, and maj@k, each with a 95% interval over prompts.

    A prompt with an unscored sample (NaN) is in none of them; "prompts" says how many are left.
    """
    k, whole = correct.shape[1], ~np.isnan(correct).any(axis=1)
    right, answers = correct[whole] > 0.5, answers[whole]
    results = {f"mean@{k}": interval(right.mean(axis=1))}
    j = 1
    while j <= k:
        results[f"pass@{j}"] = interval(metrics.pass_at_k(k, right.sum(axis=1), j))
        j *= 2
    votes = [metrics.majority_correct(list(a), list(r)) for a, r in zip(answers, right)]
    return results | {f"maj@{k}": interval(np.asarray(votes, float))}


def interval(x: np.ndarray) -> dict[str, float]:
    """Mean over prompts and its 95% interval: Wilson's for right-or-wrong, else normal. Unscored (NaN) is left out."""
    x = x[~np.isnan(x)]
    if x.size == 0:
        return {"value": math.nan, "low": math.nan, "high": math.nan, "prompts": 0}
    if np.isin(x, (0.0, 1.0)).all():
        mean, low, high = metrics.wilson_interval(float(x.sum()), x.size)
    else:
        mean, half = x.mean(), 1.96 * x.std(ddof=min(1, x.size - 1)) / np.sqrt(x.size)
        low, high = mean - half, mean + half
    return {"value": float(mean), "low": float(low), "high": float(high), "prompts": int(x.size)}


def _no_models(task: Task) -> Models:
    return refusing_models(f"the evaluation of {task.name!r} uses a reward that asks models: name one that does not")
