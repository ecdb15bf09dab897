"""Checks of an experiment before anything is compiled: each refuses in one line that says what to change."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mlrl import meshes, scoring
from mlrl import prompts as prompts_lib
from mlrl.controllers import Controlled
from mlrl.evaluation import AnyEvaluation, Evaluation, completions
from mlrl.evaluation_attempts import AttemptsEvaluation, pairs
from mlrl.evaluation_games import Match
from mlrl.evaluation_judges import JudgeEvaluation
from mlrl.evaluation_stored import StoredEvaluation
from mlrl.loops.start import FrozenModel
from mlrl.models.transformer import Config, Transformer
from mlrl.rewards.completions import name_of
from mlrl.rewards.lifting import lift
from mlrl.sampling import GREEDY, Sampling
from mlrl.types import (
    Batch,
    CurriculumFn,
    Distribution,
    LossFn,
    Prompts,
    Refused,
    RewardFn,
    Rewards,
    Rollout,
    Scores,
    StatefulAdvantage,
    Task,
    Vocabulary,
    refusing_models,
    require_whole,
)
from mlrl.updates import check_division, fields_read, total_loss

_log = logging.getLogger("mlrl")
_ASKS_MODELS = "models are bound in the loop"


def nouns(experiment: Any) -> None:
    """Fields hold what their names say; a function stands nowhere that its result belongs."""
    kinds = {"task": Task, "model": Config, "sampling": Sampling, "optimizer": optax.GradientTransformation,
             "curriculum": CurriculumFn, "losses": Sequence, "evaluations": Sequence,
             "reference": FrozenModel, "reward_models": Sequence}  # fmt: skip
    for name, kind in kinds.items():
        value = getattr(experiment, name, ())
        if value != () and not isinstance(value, kind):
            hint = f": call it, as @{name_of(value)}()" if callable(value) and kind is not Sequence else ""
            shown = name_of(value) if callable(value) else repr(value)
            wanted = "tuple, as (@name,)" if kind is Sequence else kind.__name__
            raise Refused(f"Experiment.{name} must be a {wanted}, got {shown}{hint}")
    for number, value in enumerate(getattr(experiment, "reward_models", ())):
        if not isinstance(value, FrozenModel):
            raise Refused(f"Experiment.reward_models[{number}] must be a FrozenModel, as @start.reward_model(), got "
                          f"{name_of(value) if callable(value) else repr(value)}")  # fmt: skip
    for field in dataclasses.fields(experiment):
        value, named = getattr(experiment, field.name), field.name.endswith("_fn") and field.name != "reward_fn"
        usable = callable(value) or isinstance(value, Controlled | StatefulAdvantage)
        if (named or callable(field.default)) and not usable:
            raise Refused(f"Experiment.{field.name} must be a function, as @module.name, got {value!r}")
    for name in ("num_steps", "num_rounds", "minibatches", "epochs", "prompts_per_step", "prompts_per_round",
                 "rows_per_step", "group_size"):
        require_whole("Experiment", name, getattr(experiment, name, 1), 1)
    for name in ("seed", "micro_batch_rows", "score_chunk_columns", "score_chunk_vocabulary"):
        require_whole("Experiment", name, getattr(experiment, name, 0), 0)


def model_for(config: Config, vocabulary: Vocabulary) -> Transformer:
    """The model of `config`, with an embedding for every id of the vocabulary."""
    size = config.vocabulary_size or vocabulary.size
    if size < vocabulary.size:
        raise Refused(f"Config.vocabulary_size is {size}, but the task's vocabulary has {vocabulary.size} ids: "
                      f"set it to 0 or to at least {vocabulary.size}")  # fmt: skip
    if config.param_dtype == "int8" and not config.lora_rank:
        raise Refused("Config.param_dtype is 'int8', which freezes all weights: set Config.lora_rank to train adapters "
                      "over them, or param_dtype to 'float32'")  # fmt: skip
    return Transformer(dataclasses.replace(config, vocabulary_size=size))


def start_fits(start: Callable[[Transformer, Any], Any], model: Transformer) -> None:
    """First parameters that are read from files are those of the model; a start that can tell has a `check`."""
    getattr(start, "check", lambda model: None)(model)


def rows_divide(experiment: Any, rows: int, unit_rows: int = 1) -> None:
    """The rows of a step divide into minibatches, micro-batches and devices, in whole groups of `unit_rows`."""
    minibatches = getattr(experiment, "minibatches", 1)
    check_division(rows, minibatches, experiment.micro_batch_rows, unit_rows)
    mesh, rollout_mesh = meshes_of(experiment)
    prompts = {"prompts or rows a step": getattr(experiment, "prompts_per_step", rows)}
    learned = {"rows of a minibatch": rows // minibatches, "micro_batch_rows": experiment.micro_batch_rows}
    for counts, where in ((prompts | learned, mesh), (prompts, rollout_mesh)):
        for name, count in counts.items():
            if count % meshes.row_shards(where):
                raise Refused(f"{count} {name} do not divide over {meshes.row_shards(where)} devices: change the "
                              "number or the mesh, or use fewer devices by mesh.devices")  # fmt: skip


def meshes_of(experiment: Any) -> tuple[Mesh, Mesh]:
    """The mesh of the update, and that of rollouts."""
    mesh = experiment.mesh()
    return mesh, getattr(experiment, "rollout_mesh", meshes.same)(mesh)


def mesh_fits(experiment: Any) -> None:
    """An axis of the mesh that is there for a part of the model has that part to split."""
    mesh, rollout_mesh = meshes_of(experiment)
    both = set(mesh.devices.flat) | set(rollout_mesh.devices.flat)
    if len(both) > mesh.size and jax.process_count() > 1:
        raise Refused(f"rollouts have devices of their own, and the run is in {jax.process_count()} processes, between "
                      "which weights do not move: set Experiment.rollout_mesh to @meshes.rearranged or @meshes.same")
    shards = max(mesh.shape["expert"] for mesh in (mesh, rollout_mesh))
    if shards > 1 and not experiment.model.experts:
        raise Refused(f"mesh.expert is {shards}, but the model has no experts: set mesh.expert = 1, or Config.experts")


def rounds_divide(experiment: Any) -> None:
    """A round divides into chunks of prompts, and is at least as large as an optimizer step."""
    whole, chunk = experiment.prompts_per_round, experiment.prompts_per_step
    if whole % chunk:
        raise Refused(f"prompts_per_round = {whole} does not divide into chunks of prompts_per_step = {chunk}")
    rows = whole * experiment.group_size
    if experiment.rows_per_step > rows:
        raise Refused(f"rows_per_step is {experiment.rows_per_step}, but a round has {rows} rows: make it smaller")


def groups_stay_whole(experiment: Any, unit: int) -> None:
    """Optimizer steps and micro-batches hold whole groups, where a loss compares the rows of a group."""
    for name in ("rows_per_step", "micro_batch_rows"):
        if getattr(experiment, name) % unit:
            raise Refused(f"{name} = {getattr(experiment, name)} would split groups of {unit} rows, which a loss "
                          f"compares: make it a multiple of {unit}")  # fmt: skip


def selects_rows(select_fn: Callable[[Batch], Any], rows: Batch) -> None:
    """A selection says yes or no to every row."""
    kept, b = jax.eval_shape(select_fn, rows), rows.mask.shape[0]
    if getattr(kept, "shape", None) != (b,) or kept.dtype != bool:
        shown = f"{kept.dtype}{list(kept.shape)}" if hasattr(kept, "shape") else type(kept).__name__
        raise Refused(f"{name_of(select_fn)} must return bool[{b}], one yes or no a row, got {shown}")


def what_is_read(losses: Sequence[LossFn], of_batch: Sequence[Callable[[Batch], Any]], batch: Batch,
                 vocabulary_size: int) -> set[str]:  # fmt: skip
    """Names such as "Batch.values" and "Scores.entropy" of the fields that anything looks at."""
    if not losses:
        raise Refused("Experiment.losses is empty: name at least one loss")
    number = batch.advantages
    wide = jax.ShapeDtypeStruct((*number.shape, vocabulary_size), jnp.float32)
    scores = Scores(number, number, number, logits=wide)
    ids = jax.ShapeDtypeStruct(wide.shape, jnp.int32)
    batch = batch.replace(reference_distribution=Distribution(ids, wide))
    reads = fields_read(lambda s, b: total_loss(losses, s, b)[0], scores, batch)
    for function in of_batch:
        reads |= fields_read(function, batch)
    return {name.replace("['", ".").replace("']", "") for name in reads}


def compatible(config: Config, reads: set[str] | frozenset[str]) -> None:
    """A loss or advantage that reads values needs a model that has them."""
    if {"Scores.values", "Batch.values"} & reads and not config.value_head:
        raise Refused("a loss or the advantage reads values, but the model has no value head: set "
                      "Config.value_head = True or choose an advantage without values")  # fmt: skip


def one_kl(losses: Sequence[LossFn], advantage_fn: Callable[[Batch], Any], batch: Batch, vocabulary_size: int) -> None:
    """A KL to the reference stands in the reward or in the loss, never in both.

    It is in the reward where the advantages depend on the reference; their returns may (KTO keeps its z0 there).
    """
    if "Batch.reference_log_probs" not in fields_read(lambda b: advantage_fn(b)[0], batch):
        return
    for loss_fn in losses:
        if "Batch.reference_log_probs" in what_is_read((loss_fn,), (), batch, vocabulary_size):
            raise Refused(f"the KL to the reference is in the reward (the advantage reads it) and in the loss "
                          f"{name_of(loss_fn)}: it would count twice; set one of the two kl_coef to 0.0")  # fmt: skip


def refill_fits(experiment: Any, reward_in_graph: bool) -> None:
    """Dynamic sampling draws prompts where the step runs, and keeps in the end what it drew for."""
    require_whole("Experiment", "max_attempts", experiment.max_attempts, 1)
    if experiment.max_attempts == 1:
        return
    if reward_in_graph and not experiment.task.in_graph:
        raise Refused(f"Experiment.max_attempts is {experiment.max_attempts}, but new prompts cannot be drawn inside "
                      "the step: the task is on the host and the reward in the graph; set max_attempts to 1, or judge "
                      "on the host with completions.per_completion")  # fmt: skip


def stored_rows_suffice(reads: set[str] | frozenset[str], old_log_probs: Callable) -> None:
    """Stored rows have no advantages until an advantage function makes them, and no log-probs of a sampler."""
    missing = sorted({"Batch.advantages", "Batch.returns"} & reads)
    if missing:
        raise Refused(f"a loss reads {missing[0]}, which stored rows do not have: set Experiment.advantage_fn (for "
                      "kto, @advantages.kto), choose another loss, or the online loop")  # fmt: skip
    if "Batch.old_log_probs" in reads and scoring.recorded(old_log_probs):
        raise Refused("Batch.old_log_probs is read, and nobody sampled stored rows: set Experiment.old_log_probs = "
                      "@scoring.recomputed_log_probs")  # fmt: skip


def compares_rows(losses: Sequence[LossFn], batch: Batch, vocabulary_size: int) -> bool:
    """Whether a loss looks at which rows share a group, as preference losses and reward models do."""
    return "Batch.rollout.group" in what_is_read(losses, (), batch, vocabulary_size)


def rows_of_a_group(group: np.ndarray) -> int:
    """How many rows share a group, side by side and as many in each. Raises Refused, if they do not."""
    size = int(np.argmax(group != group[0])) or len(group)
    starts = group[::size]
    if len(group) % size or (group != starts.repeat(size)).any() or len(set(starts.tolist())) < len(starts):
        raise Refused("a loss compares the rows of a group, but Experiment.rows_fn mixes them: it must put the rows of "
                      "a group side by side, as many in each, as stored.candidates does")  # fmt: skip
    return size


def groups_are_compared(group_size: int, remedy: str) -> None:
    """A loss that compares the rows of a group has nothing to learn from a group of one."""
    if group_size < 2:
        raise Refused(f"a loss compares the rows of a group, but every group has one row: {remedy}")


def groups_teach(advantage_fn: Callable[[Batch], Any], batch: Batch, group_size: int) -> None:
    """A group of one has no baseline of its own: refused where it leaves every advantage 0, whatever the rewards."""
    if group_size > 1:
        return
    made = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)
    rows = jnp.arange(made.mask.shape[0])
    last = jnp.zeros_like(made.mask).at[:, -1].set(True)
    tokens = jnp.where(last, rows[:, None].astype(jnp.float32), 0.0)
    rollout = made.rollout.replace(group=rows.astype(made.rollout.group.dtype), action_mask=last, valid=last)
    rewards = made.rewards.replace(tokens=tokens, outcome=tokens[:, -1], scored=jnp.ones_like(made.rewards.scored))
    advantages, _ = advantage_fn(made.replace(rollout=rollout, rewards=rewards, mask=last))
    if not bool(jnp.any(advantages != 0)):
        raise Refused("Experiment.group_size is 1, and the advantage compares a row with its group: every advantage "
                      "would be 0; set group_size to 2 or more, or choose another advantage")  # fmt: skip


def sampling_fits(sampling: Sampling, old_log_probs: Callable, reads: set[str] | frozenset[str], *,
                  group_size: int = 2) -> None:  # fmt: skip
    """Importance ratios need one distribution in numerator and denominator, and a group needs randomness."""
    if sampling.filtered and scoring.recorded(old_log_probs) and "Batch.old_log_probs" in reads:
        raise Refused("importance ratios under top-k or top-p would compare two different distributions: set "
                      "Sampling.top_k = 0 and top_p = 1.0, or Experiment.old_log_probs = "
                      "@scoring.recomputed_log_probs")  # fmt: skip
    if sampling.temperature == 0.0 and group_size > 1:
        raise Refused("Sampling.temperature is 0.0 (greedy), so all completions of a group are alike: set it above 0")


def compares_with_sampler(old_log_probs: Callable, reads: set[str] | frozenset[str]) -> bool:
    """Whether anything reads how likely rows were to the sampler."""
    recorded = "Batch.old_log_probs" in reads and scoring.recorded(old_log_probs)
    return recorded or "Batch.rollout.behavior_log_probs" in reads


def caches_are_minded(config: Config, old_log_probs: Callable, reads: set[str] | frozenset[str]) -> None:
    """Warns where rows are sampled through coarser caches than are learned from, and nothing reads how likely they were
    to that sampler: the ratio is then taken to be 1.
    """
    if jnp.dtype(config.cache_dtype or config.dtype).itemsize >= jnp.dtype(config.dtype).itemsize:
        return
    if not compares_with_sampler(old_log_probs, reads):
        _log.warning("Config.cache_dtype is %r, and the losses take rows to be the learner's own, with a ratio of 1: "
                     "choose a loss that reads the log-probs recorded by the sampler, as policy.ppo_clip with "
                     "old_log_probs = @scoring.sampler_log_probs, or weigh rows by losses.corrections",
                     config.cache_dtype)  # fmt: skip


def buckets_cover(length_buckets: tuple[int, ...], completion_columns: int) -> None:
    """Buckets are ascending numbers of tokens, and the last holds the longest completion."""
    if not isinstance(length_buckets, tuple):
        raise Refused(f"Experiment.length_buckets must be a tuple of numbers of tokens, got {length_buckets!r}")
    for tokens in length_buckets:
        require_whole("Experiment", "length_buckets", tokens, 1)
    if list(length_buckets) != sorted(set(length_buckets)):
        raise Refused(f"Experiment.length_buckets must be ascending, got {length_buckets}")
    if length_buckets and length_buckets[-1] < completion_columns:
        raise Refused(f"the last of Experiment.length_buckets is {length_buckets[-1]}, but completions may have "
                      f"{completion_columns} tokens: add {completion_columns}")  # fmt: skip


def evaluations_work(evaluations: Sequence[AnyEvaluation]) -> None:
    """Tries the reward of every evaluation on real prompts, or looks at the stored completions that it judges."""
    names = [evaluation.task.name for evaluation in evaluations]
    if len(set(names)) < len(names):
        raise Refused(f"two evaluations have tasks of the same name, and results go by name: {sorted(names)}")
    for evaluation in evaluations:
        asked = functools.partial(prompts_lib.first, evaluation.task, evaluation.prompts)
        jax.eval_shape(asked) if evaluation.task.in_graph else asked()  # whether there are as many
        if isinstance(evaluation, StoredEvaluation | JudgeEvaluation):
            evaluation.require_candidates()
        elif isinstance(evaluation, Evaluation):
            rewards_work(lift(evaluation.reward_fn), evaluation.task)


def evaluations_sample(experiment: Any, model: Transformer, params: Any, *, by_step: bool = False) -> None:
    """Traces the sampler of every evaluation, but (`by_step`) those that sample as the step does; compiles nothing."""
    for evaluation in experiment.evaluations:
        if not isinstance(evaluation, Evaluation | AttemptsEvaluation | Match):
            continue
        if not by_step or evaluation.rollout(experiment.rollout_fn) is not experiment.rollout_fn:
            task = evaluation.task
            rollout = jax.eval_shape(
                lambda params, task=task, sample=evaluation.rollout(experiment.rollout_fn): sample(
                    model, params, prompts_lib.first(task, 1), jax.random.key(0), vocabulary=task.vocabulary,
                    sampling=GREEDY, group_size=1,
                ).check(), params,
            )  # fmt: skip
            if isinstance(evaluation, AttemptsEvaluation):
                jax.eval_shape(pairs, rollout)


def judges_have_models(experiment: Any, batch: Batch, reads: set[str] | frozenset[str]) -> None:
    """Evaluations of stored completions need the value head or the reference that their judge reads."""
    for evaluation in experiment.evaluations:
        if not isinstance(evaluation, StoredEvaluation):
            continue
        asked = evaluation.reads(batch)
        compatible(experiment.model, asked)
        if "Batch.reference_log_probs" in asked and "Batch.reference_log_probs" not in reads:
            raise Refused(f"the evaluation of {evaluation.task.name!r} reads the reference, which is kept only if a "
                          "loss reads it: choose a reward_fn without it, as preference.likelihood_reward")  # fmt: skip


def reward_models_are_asked(count: int, asked: set[str], *, in_graph: bool) -> None:
    """Each of an experiment's reward models is asked by its reward; of one on the host that is not known."""
    for number in range(count if in_graph else 0):
        if f"TrainState.reward_models[{number}]" not in asked:
            raise Refused(f"no reward asks reward model {number} of the {count} in Experiment.reward_models: set "
                          "reward_fn = @learned.score (its `which` is the number), or leave the model out")  # fmt: skip


def rewards_work(reward: RewardFn, task: Task, *, rows: int = 2) -> None:
    """Tries the reward on demonstrations of real prompts: a raise, hang, wrong type or shape shows before compiling."""
    attempt = functools.partial(_attempt, reward, task, rows)
    try:
        rewards, _, _ = jax.eval_shape(attempt) if reward.in_graph and task.in_graph else attempt()
    except Refused as refusal:
        if _ASKS_MODELS in str(refusal):
            return
        raise
    rewards.check()


def rewards_are_finite(reward: RewardFn, task: Task, *, rows: int = 2) -> None:
    """Refuses a reward in the graph that is NaN or infinite on each of a few demonstrations; compiles only it."""
    if not (reward.in_graph and task.in_graph):
        return  # its values were seen by rewards_work, or will be in the first step
    try:
        rewards, rollout, prompts = jax.device_get(jax.jit(functools.partial(_attempt, reward, task, rows))())
    except Refused as refusal:
        if _ASKS_MODELS in str(refusal):
            return
        raise
    if not rewards.scored.any():
        guilty = [name for name, part in rewards.parts.items() if name.startswith("unscored/") and part.all()]
        names = ", ".join(repr(name.removeprefix("unscored/")) for name in guilty)
        prompt = task.vocabulary.decode(prompts.tokens[0][prompts.valid[0]])
        raise Refused(f"reward {names} returned NaN or infinity for each of {rows} demonstrations, as of the prompt "
                      f"{prompt!r} and completion {completions(rollout, task)[0]!r}")  # fmt: skip


def _attempt(reward: RewardFn, task: Task, rows: int) -> tuple[Rewards, Rollout, Prompts]:
    """The rewards of demonstrations of real prompts. Raises Refused with _ASKS_MODELS if they need models."""
    weights = jnp.asarray(task.rates, jnp.float32)
    prompts = prompts_lib.draw(task, jax.random.key(0), 0, rows, weights)
    rollout = prompts_lib.played(prompts_lib.demonstrations(task, jax.random.key(0), 0, rows, weights))

    return reward.update(reward.init(), rollout, prompts, task, refusing_models(_ASKS_MODELS))[0], rollout, prompts
