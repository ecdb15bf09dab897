"""Checks of an experiment before anything is compiled: each refuses in one line that says what to change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mlrl import prompts as prompts_lib
from mlrl import scoring
from mlrl.models.transformer import Config, Transformer
from mlrl.types import Batch, LossFn, Models, Refused, RewardFn, Scores, Task, Vocabulary
from mlrl.updates import check_division, fields_read, total_loss


def model_for(config: Config, vocabulary: Vocabulary) -> Transformer:
    """The model of `config`, with an embedding for every id of the vocabulary."""
    size = config.vocabulary_size or vocabulary.size
    if size < vocabulary.size:
        raise Refused(f"Config.vocabulary_size is {size}, but the task's vocabulary has {vocabulary.size} ids: "
                      f"set it to 0 or to at least {vocabulary.size}")  # fmt: skip
    return Transformer(dataclasses.replace(config, vocabulary_size=size))


def rows_divide(experiment: Any) -> None:
    """Rows divide into minibatches, micro-batches and devices."""
    n, g = experiment.prompts_per_step, experiment.group_size
    for name in ("prompts_per_step", "group_size", "num_steps", "minibatches", "epochs"):
        if getattr(experiment, name) < 1:
            raise Refused(f"Experiment.{name} must be at least 1, got {getattr(experiment, name)}")
    check_division(n * g, experiment.minibatches, experiment.micro_batch_rows)
    devices = experiment.mesh().size
    if n % devices:
        raise Refused(f"prompts_per_step = {n} does not divide over {devices} devices: change prompts_per_step or "
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


def compatible(experiment: Any, reads: set[str]) -> None:
    """Parts that cannot work together are refused, with the reason."""
    if {"Scores.values", "Batch.values"} & reads and not experiment.model.value_head:
        raise Refused("a loss or the advantage reads values, but the model has no value head: set "
                      "Config.value_head = True or choose an advantage without values")  # fmt: skip
    by_sampler = experiment.old_log_probs is scoring.sampler_log_probs
    if experiment.sampling.filtered and by_sampler and "Batch.old_log_probs" in reads:
        raise Refused("importance ratios under top-k or top-p would compare two different distributions: set "
                      "Sampling.top_k = 0 and top_p = 1.0, or Experiment.old_log_probs = "
                      "@scoring.recomputed_log_probs")  # fmt: skip
    if experiment.sampling.temperature == 0.0:
        raise Refused("Sampling.temperature is 0.0 (greedy): every completion of a group would be the same; set it above 0")


def rewards_work(reward: RewardFn, task: Task, *, rows: int = 2) -> None:
    """Tries the reward on demonstrations of real prompts: a raise, a hang, a wrong type or shape shows before compiling."""
    weights = jnp.asarray(task.rates, jnp.float32)
    prompts = prompts_lib.draw(task, jax.random.key(0), 0, rows, weights)
    rollout = prompts_lib.demonstrations(task, jax.random.key(0), 0, rows, weights)

    def unbound(*_, **__):
        raise Refused("models are bound in the loop")

    run = lambda: reward.update(reward.init(), rollout, prompts, task, Models(unbound, unbound, unbound))  # noqa: E731
    if reward.in_graph:
        try:
            rewards, _ = jax.eval_shape(run)
        except Refused as refusal:
            if "models are bound" in str(refusal):
                return
            raise
    else:
        rewards, _ = run()
    rewards.check()
