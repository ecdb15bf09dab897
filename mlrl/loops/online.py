"""The online loop: prompts -> rollout -> reward -> annotate -> advantage -> update, step after step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mlrl import advantages, curricula, meshes, optimizers, reductions, runs, scoring, selection
from mlrl import prompts as prompts_lib
from mlrl.evaluation import Evaluation, evaluator
from mlrl.loops import checks
from mlrl.loops import describe as describe_
from mlrl.loops.start import random_parameters
from mlrl.models.transformer import Config, Transformer
from mlrl.monitoring import step_metrics
from mlrl.rewards.lifting import lift
from mlrl.rollouts.single_turn import single_turn
from mlrl.sampling import Sampling
from mlrl.types import (
    AdvantageFn,
    Array,
    Batch,
    CurriculumFn,
    LossFn,
    Metrics,
    Models,
    Params,
    Prompts,
    ReductionFn,
    Refused,
    RewardFn,
    Rewards,
    Rollout,
    RolloutFn,
    Scores,
    SelectFn,
    Task,
    TrainState,
)
from mlrl.updates import unannotated, update


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What an online run is made of. Every field is a function, a number, or a noun.

    What a step is: `prompts_per_step` (N) prompts, `group_size` (G) completions each, B = N * G rows; they are
    rewarded, and learned from in `epochs` * `minibatches` optimizer steps.

    task            where prompts come from
    reward_fn       a plain function (see mlrl.rewards.lifting.lift) or a RewardFn
    losses          functions of (Scores, Batch), summed
    model           the shape of the policy (and of the value head on its trunk)
    rollout_fn      how prompts become rows
    sampling        temperature and filters; the learner scores at the same temperature
    advantage_fn    Batch -> (advantages, returns)
    select_fn       Batch -> rows that stay in the loss
    reduction       mask -> weights: what "mean" means, over a whole minibatch
    old_log_probs   the ratio's denominator: as recorded by the sampler, or recomputed
    optimizer       an optax transformation
    curriculum      sampling weights over the task's sources
    start           (model, key) -> the first parameters, also those of the frozen reference
    evaluations     what to measure on held-out prompts
    mesh            the devices, as a function, so that an experiment can be read without touching them
    """

    task: Task
    reward_fn: RewardFn | Callable
    losses: tuple[LossFn, ...]
    num_steps: int
    model: Config = Config()
    prompts_per_step: int = 32
    group_size: int = 8
    rollout_fn: RolloutFn = single_turn
    sampling: Sampling = Sampling()
    advantage_fn: AdvantageFn = advantages.grpo
    select_fn: SelectFn = selection.keep_all
    reduction: ReductionFn = reductions.token_mean
    old_log_probs: Callable[..., Array] = scoring.sampler_log_probs
    optimizer: optax.GradientTransformation = optimizers.adamw()
    curriculum: CurriculumFn = curricula.fixed()
    minibatches: int = 1
    epochs: int = 1
    micro_batch_rows: int = 0
    score_chunk_columns: int = 0
    start: Callable[[Transformer, Array], Params] = random_parameters
    evaluations: tuple[Evaluation, ...] = ()
    mesh: Callable[[], jax.sharding.Mesh] = meshes.data_mesh
    recording: runs.Recording = runs.Recording()
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Parts:
    """An experiment closed over its model and checked. Nothing is compiled yet."""

    experiment: Experiment
    model: Transformer
    reward: RewardFn
    reads: frozenset[str]  # the fields that losses, advantage and selection look at: nothing else is computed


def train(experiment: Experiment, run: runs.Run) -> TrainState:
    """Runs `experiment` in the folder of `run`, from its last checkpoint if it holds one. Returns the last state."""
    parts = prepare(experiment)
    with meshes.use(experiment.mesh()) as mesh:
        state = run.restore_or(abstract_state(parts), lambda: initial_state(parts), meshes.replicated(mesh))
        evaluate = evaluator(experiment.evaluations, parts.model, experiment.rollout_fn)
        next_prompts, take_step = prompt_source(parts), step_function(parts, run)
        run.begin(experiment.task, experiment.num_steps, evaluate, state)
        for step in range(int(state.step), experiment.num_steps):
            prompts = next_prompts(state, step)
            state, metrics, batch = take_step(state, prompts)
            run.record(state, step + 1, metrics, batch)
    return state


def prepare(experiment: Experiment) -> Parts:
    """Everything about an experiment that can be checked before compiling is checked here. Raises Refused."""
    checks.nouns(experiment)
    model = checks.model_for(experiment.model, experiment.task.vocabulary)
    checks.rows_divide(experiment, experiment.prompts_per_step * experiment.group_size)
    parts = Parts(experiment, model, lift(experiment.reward_fn), frozenset())
    checks.rewards_work(parts.reward, experiment.task)
    checks.evaluations_work(experiment.evaluations)
    prompts, rollout, rewards = _abstract_step(parts)
    batch = jax.eval_shape(unannotated, rollout, rewards)
    reads = checks.what_is_read(experiment.losses, (experiment.advantage_fn, experiment.select_fn), batch)
    parts = dataclasses.replace(parts, reads=frozenset(reads | _asked_of_models(parts, prompts, rollout)))
    checks.compatible(experiment.model, reads)
    checks.groups_teach(experiment.advantage_fn, batch, experiment.group_size)
    checks.sampling_fits(experiment.sampling, experiment.old_log_probs, reads)
    jax.eval_shape(functools.partial(learn, parts), abstract_state(parts), prompts, rollout, rewards)
    return parts


def _asked_of_models(parts: Parts, prompts: Prompts, rollout: Rollout) -> set[str]:
    """What the reward asks of models that the state must keep for it: the reference, or nothing."""
    asked = set()

    def judge(state: TrainState, prompts: Prompts, rollout: Rollout) -> Rewards:
        bound = models(parts, state.replace(reference=state.params))

        def noted(rollout: Rollout) -> Scores:
            asked.add("Batch.reference_log_probs")
            return bound.reference(rollout)

        rows, bound_ = prompts_lib.repeat(prompts, parts.experiment.group_size), bound._replace(reference=noted)
        return parts.reward.update(state.reward, rollout, rows, parts.experiment.task, bound_)[0].check()

    if parts.reward.in_graph:
        jax.eval_shape(judge, abstract_state(parts), prompts, rollout)
    return asked


def prompt_source(parts: Parts) -> Callable[[TrainState, int], Prompts]:
    """(state, step) -> the step's prompts, a pure function of the run's key, the step and the curriculum's state."""
    experiment = parts.experiment

    def draw(key: Array, step: Array | int, curriculum_state: Any) -> Prompts:
        weights = experiment.curriculum.weights(curriculum_state)
        return prompts_lib.draw(experiment.task, key, step, experiment.prompts_per_step, weights)

    if experiment.task.in_graph:
        draw = jax.jit(draw)
    return lambda state, step: draw(state.key, step, state.curriculum).check()


def step_function(parts: Parts, run: runs.Run) -> Callable[[TrainState, Prompts], tuple[TrainState, Metrics, Batch]]:
    """The step: one jit when the reward is in the graph, else two with the host's rewards between them."""
    if parts.reward.in_graph:
        return jax.jit(functools.partial(whole_step, parts), donate_argnums=0)
    sample, learn_ = jax.jit(functools.partial(sample_rows, parts)), jax.jit(functools.partial(learn, parts))

    def step(state: TrainState, prompts: Prompts) -> tuple[TrainState, Metrics, Batch]:
        with run.phase("rollout"):
            rollout = jax.block_until_ready(sample(state, prompts))
        with run.phase("reward"):
            rewards, reward_state = reward_rows(parts, state, jax.device_get(rollout), jax.device_get(prompts))
        with run.phase("update"):
            return jax.block_until_ready(learn_(state.replace(reward=reward_state), prompts, rollout, rewards))

    return step


def whole_step(parts: Parts, state: TrainState, prompts: Prompts) -> tuple[TrainState, Metrics, Batch]:
    """One training step as one pure function: sample, reward, learn."""
    rollout = sample_rows(parts, state, prompts)
    rewards, reward_state = reward_rows(parts, state, rollout, prompts)
    return learn(parts, state.replace(reward=reward_state), prompts, rollout, rewards)


def sample_rows(parts: Parts, state: TrainState, prompts: Prompts) -> Rollout:
    """The current policy's episodes: [N] prompts -> [B] rows."""
    experiment = parts.experiment
    return meshes.split_rows(
        experiment.rollout_fn(
            parts.model, state.params, meshes.split_rows(prompts), step_key(state, 0),
            vocabulary=experiment.task.vocabulary, sampling=experiment.sampling,
            group_size=experiment.group_size, policy_version=state.step,
        ).check()
    )  # fmt: skip


def reward_rows(parts: Parts, state: TrainState, rollout: Rollout, prompts: Prompts) -> tuple[Rewards, Any]:
    """What the rows earned, and the reward's next state."""
    rows = prompts_lib.repeat(prompts, parts.experiment.group_size)
    bound = models(parts, state)
    rewards, reward_state = parts.reward.update(state.reward, rollout, rows, parts.experiment.task, bound)
    return rewards.check(), reward_state


def learn(parts: Parts, state: TrainState, prompts: Prompts, rollout: Rollout,
          rewards: Rewards) -> tuple[TrainState, Metrics, Batch]:  # fmt: skip
    """Annotate the rows, credit their tokens, and update: the state of the next step, metrics, and the rows."""
    experiment = parts.experiment
    batch = annotate(parts, state, unannotated(rollout, rewards), prompts)
    credit, returns = experiment.advantage_fn(batch)
    batch = batch.replace(advantages=credit, returns=returns)
    batch = batch.replace(mask=batch.mask & experiment.select_fn(batch)[:, None])
    state, metrics = update(
        state, batch, step_key(state, 1),
        score_fn=lambda params, rows: score(parts, params, rows, prompts), losses=experiment.losses,
        reduction=experiment.reduction, optimizer=experiment.optimizer, minibatches=experiment.minibatches,
        epochs=experiment.epochs, micro_batch_rows=experiment.micro_batch_rows,
    )  # fmt: skip
    rows = prompts_lib.repeat(prompts, experiment.group_size)
    curriculum = experiment.curriculum.update(state.curriculum, rows, batch)
    return state.replace(step=state.step + 1, curriculum=curriculum), metrics | step_metrics(batch), batch


def annotate(parts: Parts, state: TrainState, batch: Batch, prompts: Prompts) -> Batch:
    """Adds what models say of the rows before the update, as far as anything reads it."""
    current = lambda rollout: score(parts, state.params, rollout, prompts)  # noqa: E731
    if "Batch.old_log_probs" in parts.reads:
        batch = batch.replace(old_log_probs=parts.experiment.old_log_probs(batch.rollout, current))
    if "Batch.values" in parts.reads:
        batch = batch.replace(values=current(batch.rollout).values)
    if "Batch.reference_log_probs" in parts.reads:
        reference = score(parts, state.reference, batch.rollout, prompts)
        batch = batch.replace(reference_log_probs=reference.log_probs)
    return jax.lax.stop_gradient(batch)


def score(parts: Parts, params: Params, rollout: Rollout, prompts: Prompts) -> Scores:
    """The learner's forward pass, at the sampler's temperature; the prompts' columns are not scored."""
    return scoring.score(
        parts.model, params, rollout, temperature=parts.experiment.sampling.temperature,
        first_column=prompts.tokens.shape[1], chunk_columns=parts.experiment.score_chunk_columns,
    )  # fmt: skip


def models(parts: Parts, state: TrainState) -> Models:
    """Models bound to their weights, for rewards that ask them."""
    experiment = parts.experiment

    def asked(params: Params, rollout: Rollout) -> Scores:  # of any rows: a judge's prompts have another width
        return scoring.score(parts.model, params, rollout, temperature=experiment.sampling.temperature,
                             chunk_columns=experiment.score_chunk_columns)  # fmt: skip

    def reference(rollout: Rollout) -> Scores:
        if not jax.tree.leaves(state.reference):
            raise Refused("a reward asks the reference beside a reward on the host, where it is kept only if a loss "
                          "reads it: add regularizers.kl_penalty, or keep to rewards in the graph")  # fmt: skip
        return asked(state.reference, rollout)

    return Models(
        generate=lambda prompts, key: experiment.rollout_fn(
            parts.model, state.params, prompts, key, vocabulary=experiment.task.vocabulary,
            sampling=experiment.sampling, group_size=1, policy_version=state.step,
        ),
        score=functools.partial(asked, state.params),
        reference=reference,
    )  # fmt: skip


def step_key(state: TrainState, purpose: int) -> Array:
    """A key for one purpose in one step: resuming a run resumes its randomness."""
    branch = jax.random.fold_in(state.key, 0x73746570)  # prompts, and the first parameters, have branches of their own
    return jax.random.fold_in(jax.random.fold_in(branch, state.step), purpose)


def initial_state(parts: Parts) -> TrainState:
    """The state before the first step."""
    key = jax.random.fold_in(jax.random.key(parts.experiment.seed), 0x73746172)
    return state_from(parts, parts.experiment.start(parts.model, key))


def abstract_state(parts: Parts) -> TrainState:
    """Shapes and dtypes of the state, without computing any of it."""
    return jax.eval_shape(lambda key: state_from(parts, random_parameters(parts.model, key)), jax.random.key(0))


def state_from(parts: Parts, params: Params) -> TrainState:
    """The state of step 0 around the first parameters."""
    experiment = parts.experiment
    reference = params if "Batch.reference_log_probs" in parts.reads else ()
    return TrainState(
        step=jnp.int32(0), key=jax.random.key(experiment.seed), params=params,
        opt_state=experiment.optimizer.init(params), reference=jax.tree.map(jnp.copy, reference),
        curriculum=experiment.curriculum.init(experiment.task), reward=parts.reward.init(), controllers={},
        bad_updates=jnp.int32(0),
    )  # fmt: skip


def _abstract_step(parts: Parts) -> tuple[Prompts, Rollout, Rewards]:
    """Shapes and dtypes of a step's prompts, rows and rewards."""
    experiment = parts.experiment
    weights = jnp.asarray(experiment.task.rates, jnp.float32)
    draw = lambda: prompts_lib.draw(experiment.task, jax.random.key(0), 0, experiment.prompts_per_step, weights)  # noqa: E731
    prompts = jax.eval_shape(draw) if experiment.task.in_graph else draw()
    rollout = jax.eval_shape(functools.partial(sample_rows, parts), abstract_state(parts), prompts)
    b, length = rollout.tokens.shape
    number = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    rewards = Rewards(tokens=number(b, length), outcome=number(b), scored=jax.ShapeDtypeStruct((b,), bool),
                      parts={name: number(b) for name in parts.reward.names})  # fmt: skip
    return prompts, rollout, rewards


def describe(parts: Parts) -> str:
    """What a step and a run are, in words, and the rewards of real rows; compiles nothing but the rewards."""
    experiment, task = parts.experiment, parts.experiment.task
    prompts, rollout, _ = _abstract_step(parts)
    state = abstract_state(parts)
    n, g = experiment.prompts_per_step, experiment.group_size
    (rows, columns), width = rollout.tokens.shape, prompts.tokens.shape[1]
    programs = "the whole step" if parts.reward.in_graph else "the rollout, and the update after the host's rewards"
    reads = sorted(name for name in parts.reads if name in ("Batch.values", "Batch.reference_log_probs"))
    return describe_.table({
        "task": f"{task.name}: {', '.join(task.sources)}",
        "a step": [f"{n} prompts x {g} completions = {rows} rows of {width} + {columns - width} columns, "
                   f"at most {rows * (columns - width):,} sampled tokens",
                   describe_.the_update(experiment, rows)],
        "a run": f"{experiment.num_steps:,} steps, {experiment.num_steps * rows:,} rows, "
                 f"{experiment.num_steps * n / sum(task.sizes):.2f} epochs of {sum(task.sizes):,} prompts",
        "model": describe_.the_model(parts.model.config, state),
        "memory": describe_.the_memory(
            parts.model.config, state, rows=rows, columns=columns, scored=columns - width,
            update_rows=experiment.micro_batch_rows or rows // experiment.minibatches,
            vocabulary_size=parts.model.config.vocabulary_size,
        ) + f"; {experiment.mesh().size} device(s)",
        "annotated": ", ".join(["old log-probs", *(name.removeprefix("Batch.") for name in reads)]),
        "compiled": f"{programs}; two samplers for each evaluation",
        "evaluated": describe_.the_evaluations(experiment),
        "rewards": describe_.tried(parts.reward, task),
    })  # fmt: skip
