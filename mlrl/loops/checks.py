"""Checks of an experiment before anything is compiled: each refuses in one line that says what to change."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mlrl import prompts as prompts_lib
from mlrl import scoring
from mlrl.evaluation import Evaluation
from mlrl.models.transformer import Config, Transformer
from mlrl.rewards.lifting import lift
from mlrl.sampling import Sampling
from mlrl.types import Batch, LossFn, Models, Refused, RewardFn, Scores, Task, Vocabulary
from mlrl.updates import check_division, fields_read, total_loss


_ASKS_MODELS = "models are bound in the loop"


def model_for(config: Config, vocabulary: Vocabulary) -> Transformer:
    """The model of `config`, with an embedding for every id of the vocabulary."""
    size = config.vocabulary_size or vocabulary.size
    if size < vocabulary.size:
        raise Refused(f"Config.vocabulary_size is {size}, but the task's vocabulary has {vocabulary.size} ids: "
                      f"set it to 0 or to at least {vocabulary.size}")  # fmt: skip
    return Transformer(dataclasses.replace(config, vocabulary_size=size))


def rows_divide(experiment: Any, rows: int) -> None:
    """The rows of a step divide into minibatches, micro-batches and devices."""
    for name in ("num_steps", "minibatches", "epochs", "prompts_per_step", "rows_per_step", "group_size"):
        if getattr(experiment, name, 1) < 1:
            raise Refused(f"Experiment.{name} must be at least 1, got {getattr(experiment, name)}")
    check_division(rows, experiment.minibatches, experiment.micro_batch_rows)
    devices = experiment.mesh().size
    per_step = getattr(experiment, "prompts_per_step", rows)
    if per_step % devices:
        raise Refused(f"{per_step} prompts or rows a step do not divide over {devices} devices: change the number or "
                      "data_mesh.devices")  # fmt: skip


def what_is_read(losses: Sequence[LossFn], of_batch: Sequence[Callable[[Batch], Any]], batch: Batch) -> set[str]:
    """Names such as "Batch.values" and "Scores.entropy" of the fields that anything looks at."""
    if not losses:
        raise Refused("Experiment.losses is empty: name at least one loss")
    scores = Scores(batch.advantages, batch.advantages, batch.advantages)
    reads = fields_read(lambda s, b: total_loss(losses, s, b)[0], scores, batch)
    for function in of_batch:
        reads |= fields_read(function, batch)
    return {name.replace("['", ".").replace("']", "") for name in reads}


def compatible(config: Config, reads: set[str] | frozenset[str]) -> None:
    """A loss or advantage that reads values needs a model that has them."""
    if {"Scores.values", "Batch.values"} & reads and not config.value_head:
        raise Refused("a loss or the advantage reads values, but the model has no value head: set "
                      "Config.value_head = True or choose an advantage without values")  # fmt: skip


def sampling_fits(sampling: Sampling, old_log_probs: Callable, reads: set[str] | frozenset[str]) -> None:
    """Importance ratios need one distribution in numerator and denominator, and a group needs randomness."""
    recorded = inspect.unwrap(old_log_probs) is scoring.sampler_log_probs
    if sampling.filtered and recorded and "Batch.old_log_probs" in reads:
        raise Refused("importance ratios under top-k or top-p would compare two different distributions: set "
                      "Sampling.top_k = 0 and top_p = 1.0, or Experiment.old_log_probs = "
                      "@scoring.recomputed_log_probs")  # fmt: skip
    if sampling.temperature == 0.0:
        raise Refused("Sampling.temperature is 0.0 (greedy), so all completions of a group are the same: set it above 0")


def evaluations_work(evaluations: Sequence[Evaluation]) -> None:
    """Tries the reward of every evaluation on real prompts."""
    names = [evaluation.task.name for evaluation in evaluations]
    if len(set(names)) < len(names):
        raise Refused(f"two evaluations have tasks of the same name, and results go by name: {sorted(names)}")
    for evaluation in evaluations:
        rewards_work(lift(evaluation.reward_fn), evaluation.task)


def rewards_work(reward: RewardFn, task: Task, *, rows: int = 2) -> None:
    """Tries the reward on demonstrations of real prompts: a raise, a hang, a wrong type or shape shows before compiling."""
    weights = jnp.asarray(task.rates, jnp.float32)

    def unbound(*_, **__):
        raise Refused(_ASKS_MODELS)

    def attempt() -> Any:
        prompts = prompts_lib.draw(task, jax.random.key(0), 0, rows, weights)
        rollout = prompts_lib.demonstrations(task, jax.random.key(0), 0, rows, weights)
        return reward.update(reward.init(), rollout, prompts, task, Models(unbound, unbound, unbound))[0]

    try:
        rewards = jax.eval_shape(attempt) if reward.in_graph and task.in_graph else attempt()
    except Refused as refusal:
        if _ASKS_MODELS in str(refusal):
            return
        raise
    rewards.check()
