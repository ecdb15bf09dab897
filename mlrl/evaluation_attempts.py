"""Evaluation of self-correction: how right first attempts are, and what second attempts make of them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mlrl import correction, processes, prompts
from mlrl.evaluation import Measured, Results, as_in_training, due, interval
from mlrl.sampling import GREEDY, Sampling
from mlrl.types import Array, Params, Prompts, Refused, Rollout, RolloutFn, Task, require_whole


@dataclasses.dataclass(frozen=True)
class AttemptsEvaluation:
    """What to measure of pairs of attempts, and how often.

    In results.json: `correction.NAMES` and "unchanged" (the share of second attempts that repeat the first) for one
    greedy pair of each prompt, and, behind "sampled/", for `samples` pairs. Intervals are over prompts.

    task          held-out prompts: the first `prompts` of them, always the same
    prompts       how many prompts
    samples       K pairs of a prompt, each with a first attempt of its own; 0: greedy only
    every_steps   measured before, after, and every so many steps; 0: before and after only
    rollout_fn    two turns, each paid 1 if it is right: multi_turn with environments.retry.always; by default as in
                  training
    """

    task: Task
    prompts: int = 256
    samples: int = 0
    every_steps: int = 0
    sampling: Sampling = Sampling()
    seed: int = 0
    rollout_fn: RolloutFn = as_in_training

    def __post_init__(self):
        require_whole("AttemptsEvaluation", "prompts", self.prompts, 1)
        for name in ("samples", "every_steps"):
            require_whole("AttemptsEvaluation", name, getattr(self, name), 0)
        if not isinstance(self.task, Task):
            raise Refused(f"AttemptsEvaluation.task must be a Task, got {self.task!r}: call a function, as @name()")

    def due(self, step: int, last_step: int) -> bool:
        """Whether this is measured after `step` steps of a run that ends at `last_step`."""
        return due(self.every_steps, step, last_step)

    def rollout(self, in_training: RolloutFn) -> RolloutFn:
        """How this samples, in an experiment that trains on `in_training`."""
        return in_training if inspect.unwrap(self.rollout_fn) is as_in_training else self.rollout_fn

    def words(self) -> str:
        """What is measured."""
        return "a greedy pair of attempts" + (f" and {self.samples} sampled pairs each" if self.samples else "")

    def measure(self, models: Measured) -> Callable[[Params, Params], Results]:
        """(params, reference's) -> results; samplers are compiled at their first use, and once."""
        rollout_fn = self.rollout(models.rollout_fn)
        batch = prompts.first(self.task, self.prompts)

        def sampler(sampling: Sampling, samples: int) -> Callable[..., tuple[Array, Array]]:
            each = prompts.repeat(batch, samples)

            def run(params: Params, each: Prompts) -> tuple[Array, Array]:
                key = jax.random.key(self.seed)
                return pairs(rollout_fn(models.model, params, each, key, vocabulary=self.task.vocabulary,
                                        sampling=sampling, group_size=1))  # fmt: skip

            sample = models.compiled(run, each)
            return lambda params: sample(params, each)

        greedy = sampler(GREEDY, 1)
        sampled = sampler(self.sampling, self.samples) if self.samples else greedy  # not called then

        def found(sample: Callable, params: Params, each: int, prefix: str) -> dict[str, dict[str, float]]:
            right, same = processes.on_host(sample(params))
            right, same = np.asarray(right).reshape(-1, each, 2), np.asarray(same).reshape(-1, each)
            results = correction.statistics(right[..., 0], right[..., 1])
            results |= {"unchanged": interval(same.mean(axis=1))}
            return {prefix + name: value for name, value in results.items()}

        def measure(params: Params, reference: Params) -> Results:
            results = found(greedy, params, 1, "")
            if self.samples:
                results |= found(sampled, params, self.samples, "sampled/")
            return {self.task.name: results}

        return measure


def pairs(rollout: Rollout) -> tuple[Array, Array]:
    """Of rows of two turns: (right [B,2] bool, was each attempt paid more than 1/2; same [B] bool, are they equal).

    Raises: Refused, if no environment made the rollout.
    """
    if isinstance(rollout.earned, tuple):
        raise Refused("AttemptsEvaluation: this rollout has no environment that pays its attempts: set rollout_fn to "
                      "multi_turn.multi_turn with environments.retry.always")  # fmt: skip
    of = [rollout.action_mask & (rollout.turn == k) for k in range(2)]
    right = jnp.stack([jnp.where(mask, rollout.earned, 0.0).sum(axis=1) > 0.5 for mask in of], axis=1)
    order = [jnp.argsort(~mask, axis=1, stable=True) for mask in of]
    said = [jnp.where(jnp.take_along_axis(mask, at, axis=1), jnp.take_along_axis(rollout.tokens, at, axis=1), -1)
            for mask, at in zip(of, order)]  # fmt: skip
    return right, jnp.all(said[0] == said[1], axis=1)
