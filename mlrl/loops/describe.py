"""What an experiment would do, in words and numbers, before anything is compiled."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from mlrl import meshes
from mlrl import prompts as prompts_lib
from mlrl.evaluation import completions
from mlrl.loops import checks
from mlrl.models.transformer import Config, cache_bytes
from mlrl.types import Refused, RewardFn, Task, TrainState, refusing_models


def size(tree: Any) -> int:
    """Bytes of all arrays in `tree`, abstract ones too; keys count as nothing."""
    leaves = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def mebibytes(count: float) -> str:
    """A number of bytes in MiB."""
    return f"{count / 2**20:,.1f} MiB"


def the_update(experiment: Any, rows: int, reads: Collection[str] = ()) -> str:
    """Minibatches, epochs and micro-batches of a step of `rows` rows, in words, and if they leave clips idle."""
    each = rows // experiment.minibatches
    steps = experiment.epochs * experiment.minibatches
    micro = experiment.micro_batch_rows
    pieces = f", in micro-batches of {micro}" if micro and micro != each else ""
    unclipped = ""
    if steps == 1 and "Batch.old_log_probs" in reads and not experiment.steps_ahead:
        unclipped = "; its ratio to the policy that sampled is 1, so that nothing is clipped"
    return (f"{experiment.epochs} epoch(s) x {experiment.minibatches} minibatch(es) = {steps} optimizer step(s) of "
            f"{each} rows{pieces}{unclipped}")  # fmt: skip


def the_refill(experiment: Any, rows: int) -> list[str]:
    """Dynamic sampling in words; nothing without it."""
    most = experiment.max_attempts
    if most == 1:
        return []
    return [f"prompts whose rows teach nothing are exchanged, in at most {most} draws: {most * rows} rows sampled"]


def the_dispatch(experiment: Any) -> str:
    """Steps that are one program, or overlap, in words; nothing where each is dispatched by itself."""
    count = experiment.steps_per_dispatch
    if experiment.steps_ahead:
        return "; each step's rows are sampled while the step before learns, by weights one update old"
    return f" {count} times in one program, so that the host hears of every {count} steps at once" if count > 1 else ""


def the_model(config: Config, state: TrainState) -> str:
    """Size and dtypes of the model."""
    number = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))  # noqa: E731
    trained, frozen = number(state.params), number(state.frozen)
    how = ""
    if config.lora_rank:
        names = ", ".join(config.lora_kernels or config.kernels)
        how = (f"; {trained:,} of the parameters are trained, with adapters of rank {config.lora_rank} on {names}; the "
               f"others are frozen in {config.param_dtype}")  # fmt: skip
    head = "tied head" if config.tied_head else "untied head"
    value = ", value head" if config.value_head else ""
    if config.critic_layers:
        critic = number(state.params["critic"])
        value = f", and a critic of {config.critic_layers} layers of its own: {critic:,} of the parameters"
    return (f"{trained + frozen:,} parameters ({config.layers} layers of width {config.width}, {config.heads} heads, "
            f"{config.kv_heads} of keys and values, {head}{value}), computing in {config.dtype}{how}")  # fmt: skip


def the_memory(experiment: Any, config: Config, state: TrainState, *, rows: int, columns: int, scored: int,
               update_rows: int, reads: Collection[str]) -> str:  # fmt: skip
    """The large arrays, per device if there is one; an estimate by formula, not what the compiler will allocate.

    Args:
      reads: what the losses look at: whole distributions are there at once, whatever the chunks.
    """
    cache, tokens = cache_bytes(config, rows, columns), config.vocabulary_size
    if "Scores.logits" not in reads:
        scored = min(scored, experiment.score_chunk_columns or scored)
        tokens = min(tokens, experiment.score_chunk_vocabulary or tokens)
    logits = update_rows * scored * tokens * 4
    named = "parameters, the critic's among them" if config.critic_layers else "parameters"
    parts = {
        named: size(state.params), "frozen parameters": size(state.frozen), "optimizer": size(state.opt_state),
        "gradients": size(state.params), "reference": size(state.reference), "reward models": size(state.reward_models),
        "KV cache": cache, "logits of an update (fp32)": logits,
    }  # fmt: skip
    return ", ".join(f"{name} {mebibytes(count)}" for name, count in parts.items() if count)


def the_meshes(experiment: Any) -> str:
    """How many devices, and how they are arranged."""
    mesh, rollout_mesh = checks.meshes_of(experiment)
    whole = "before any of it is split over " if mesh.size > 1 else ""
    other = "" if rollout_mesh == mesh else f", and for rollouts {meshes.words(rollout_mesh)}"
    return whole + meshes.words(mesh) + other


def the_evaluations(experiment: Any) -> str:
    """What is measured, and when."""
    if not experiment.evaluations:
        return "none: set Experiment.evaluations to measure held-out prompts"
    return "; ".join(
        f"{e.task.name}: {e.prompts} prompts, {e.words()}"
        + (f", every {e.every_steps} steps" if e.every_steps else ", before and after")
        for e in experiment.evaluations
    )


def tried(reward: RewardFn, task: Task, *, rows: int = 3) -> list[str]:
    """The reward of the demonstrations of a few real prompts, a line each."""
    weights = jnp.asarray(task.rates, jnp.float32)
    prompts = prompts_lib.draw(task, jax.random.key(0), 0, rows, weights)
    rollout = prompts_lib.played(prompts_lib.demonstrations(task, jax.random.key(0), 0, rows, weights))

    try:
        unbound = refusing_models("models are bound in the loop")
        rewards, _ = reward.update(reward.init(), rollout, prompts, task, unbound)
    except Refused as refusal:
        if "models are bound" in str(refusal):
            return ["it asks models, so it can be tried only in a run"]
        raise
    rewards, rollout, prompts = jax.device_get((rewards, rollout, prompts))
    lines = []
    for b, text in enumerate(completions(rollout, task)):
        prompt = task.vocabulary.decode(prompts.tokens[b][prompts.valid[b]])
        earned = ", ".join(f"{name} {float(part[b]):g}" for name, part in rewards.parts.items()
                           if not name.startswith("unscored/"))  # fmt: skip
        lines.append(f"{_short(prompt)} -> {_short(text)}: {earned if rewards.scored[b] else 'unscored'}")
    return lines


def table(rows: dict[str, str | list[str]]) -> str:
    """Names on the left, texts on the right."""
    width = max(len(name) for name in rows)
    lines = []
    for name, texts in rows.items():
        for i, text in enumerate([texts] if isinstance(texts, str) else texts):
            lines.append(f"{name if i == 0 else '':<{width}}  {text}")
    return "\n".join(lines)


def _short(text: str, limit: int = 60) -> str:
    text = repr(text)
    return text if len(text) <= limit else f"...{text[-limit:]}"
