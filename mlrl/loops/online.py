"""The online loop: prompts -> rollout -> reward -> annotate -> advantage -> update, step after step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mlrl import (
    advantages,
    chunks,
    controllers,
    curricula,
    meshes,
    optimizers,
    processes,
    reductions,
    runs,
    scoring,
    selection,
)
from mlrl import prompts as prompts_lib
from mlrl.batches import unannotated
from mlrl.controllers import Controlled
from mlrl.costs.work import of_step
from mlrl.evaluation import AnyEvaluation
from mlrl.loops import checks, dispatch, pipeline, refill, sizing, stages, states
from mlrl.loops import describe as describe_
from mlrl.loops.stages import evaluator
from mlrl.loops.start import FrozenModel, StartFn, own_start, random_parameters
from mlrl.loops.states import Program, initial_state
from mlrl.models import lora
from mlrl.models.transformer import Config, Transformer
from mlrl.monitoring import reference_metrics, step_metrics, value_metrics
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
    Prompts,
    ReductionFn,
    RewardFn,
    Rewards,
    Rollout,
    RolloutFn,
    SelectFn,
    StatefulAdvantage,
    Task,
    TrainState,
)
from mlrl.updates import update

Annotations = dict[str, Any]  # fields of a Batch that models fill in, by name
StepFn = Callable[[TrainState, Prompts], tuple[TrainState, Metrics, Batch]]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What an online run is made of. Every field is a function, a number, or a noun.

    What a step is: `prompts_per_step` (N) prompts, `group_size` (G) completions each, B = N * G rows; they are
    rewarded, and learned from in `epochs` * `minibatches` optimizer steps.

    task            where prompts come from
    reward_fn       a plain function (see mlrl.rewards.lifting.lift) or a RewardFn
    losses          functions of (Scores, Batch), summed; any may be controllers.controlled
    num_steps       how many steps the run has
    model           the shape of the policy (and of its value head or critic)
    prompts_per_step, group_size  N and G
    rollout_fn      how prompts become rows
    sampling        temperature and filters; the learner scores at the same temperature
    advantage_fn    Batch -> (advantages, returns); may be controllers.controlled, or a StatefulAdvantage
    select_fn       Batch -> rows that stay in the loss
    reduction       mask -> weights: what "mean" means, over a whole minibatch
    old_log_probs   the ratio's denominator: as recorded by the sampler, or recomputed
    minibatches, epochs  how often the rows of a step are cut, and gone over
    micro_batch_rows  rows in memory at a time, of a minibatch; 0: all
    length_buckets  widths of completions, in tokens, ascending: micro-batches are filled by length and cut to the least
                    of these that holds them; the last must hold all. (): every micro-batch is as wide as the rollout
    score_chunk_columns, score_chunk_vocabulary  score so many columns, or tokens of the vocabulary, at a time, so that
                    memory does not grow with their number; 0: all at once. See scoring.score
    sizes           micro_batch_rows and the two above as they are set, or found by timing: chunks.fastest()
    forward         how the learner reads rows: each prompt once for its whole group, or every row whole
    optimizer       an optax transformation
    curriculum      sampling weights over the task's sources
    prompts_fn      (prompts as drawn, the reward's state, task) -> prompts of the same shapes: for tasks that a reward
                    remembers, such as those that the policy proposed
    refill_fn       Batch -> rows worth learning from; prompts none of whose rows are make room for new prompts,
    max_attempts    until the step has had so many draws of `prompts_per_step` prompts; 1: no refill
    reference       the frozen model that losses read as reference_log_probs; a teacher is one
    reference_tokens  of the reference's distributions, for losses that read them: so many likeliest; 0: all
    reward_models   frozen models that rewards ask, as start.reward_model, see rewards.learned
    start           (model, key) -> the first parameters
    evaluations     what to measure on held-out prompts
    mesh            the devices, as a function, so that an experiment can be read without touching them
    rollout_mesh    mesh -> the same devices as rollouts split things over them, such as meshes.rearranged
    steps_ahead     0, or 1: a step's rows are sampled while the step before learns, by weights one update old; see
                    loops.pipeline
    steps_per_dispatch  K whole steps in one program, with task and reward in the graph; saving and evaluating, as all
                    that is done every so many steps, come between
    recording       what the run writes down
    seed            of prompts, sampling and first parameters
    """

    task: Task
    reward_fn: RewardFn | Callable
    losses: tuple[LossFn | Controlled, ...]
    num_steps: int
    model: Config = Config()
    prompts_per_step: int = 32
    group_size: int = 8
    rollout_fn: RolloutFn = single_turn
    sampling: Sampling = Sampling()
    advantage_fn: AdvantageFn | Controlled | StatefulAdvantage = advantages.grpo
    select_fn: SelectFn = selection.keep_all
    reduction: ReductionFn = reductions.token_mean
    old_log_probs: Callable[..., Array] = scoring.sampler_log_probs
    optimizer: optax.GradientTransformation = optimizers.adamw()
    curriculum: CurriculumFn = curricula.fixed()
    prompts_fn: Callable[[Prompts, Any, Task], Prompts] = prompts_lib.as_drawn
    refill_fn: SelectFn = selection.keep_all
    max_attempts: int = 1
    minibatches: int = 1
    epochs: int = 1
    micro_batch_rows: int = 0
    length_buckets: tuple[int, ...] = ()
    forward: scoring.Forward = scoring.shared_prompts()
    score_chunk_columns: int = 0
    score_chunk_vocabulary: int = 0
    sizes: chunks.Search = chunks.as_set()
    start: StartFn = random_parameters
    reference: FrozenModel = own_start()
    reference_tokens: int = 0
    reward_models: tuple[FrozenModel, ...] = ()
    evaluations: tuple[AnyEvaluation, ...] = ()
    mesh: Callable[[], jax.sharding.Mesh] = meshes.mesh
    rollout_mesh: Callable[[jax.sharding.Mesh], jax.sharding.Mesh] = meshes.same
    steps_ahead: int = 0
    steps_per_dispatch: int = 1
    recording: runs.Recording = runs.Recording()
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Parts:
    """An experiment closed over its models and checked. Nothing is compiled yet."""

    experiment: Experiment
    model: Transformer
    reference_model: Transformer
    reward: RewardFn
    reads: frozenset[str]  # the fields that losses, advantage and selection look at: nothing else is computed
    reward_models: tuple[tuple[FrozenModel, Transformer], ...] = ()
    unit_rows: int = 1  # of a group that a loss compares
    rows: tuple = ()  # shapes of a step's prompts, rows and rewards, once they are known

    def stateful(self) -> dict[str, Any]:
        """First states of the curriculum and the reward."""
        return {"curriculum": self.experiment.curriculum.init(self.experiment.task), "reward": self.reward.init()}


def train(experiment: Experiment, run: runs.Run) -> TrainState:
    """Runs `experiment` in the folder of `run`, from its last checkpoint if it holds one. Returns the last state."""
    parts = prepare(experiment)
    with meshes.use(experiment.mesh()) as mesh:
        parts = settled(parts, run.folder)
        compiled, next_prompts = jitted(parts), prompt_source(parts)
        take_step, first = step_function(parts, run, compiled), functools.partial(first_state, parts, compiled)
        state = run.restore_or(abstract_state(parts), first, mesh)
        evaluate = evaluator(parts, experiment.evaluations)
        each = experiment.steps_per_dispatch
        dispatch.can_start(int(state.step), each)
        run.begin(experiment.task, experiment.num_steps, evaluate, state, lambda: of_step(parts, programs(parts)))
        for step in range(int(state.step), experiment.num_steps, each):
            prompts = next_prompts(state, step + experiment.steps_ahead)
            state, metrics, batch = take_step(state, prompts)
            run.record(state, step + each, metrics, batch)
    return state


def prepare(experiment: Experiment) -> Parts:
    """Everything about an experiment that can be checked before compiling is checked here. Raises Refused."""
    checks.nouns(experiment)
    model = checks.model_for(experiment.model, experiment.task.vocabulary)
    checks.start_fits(experiment.start, model)
    checks.mesh_fits(experiment)
    checks.rows_divide(experiment, experiment.prompts_per_step * experiment.group_size)
    reference = experiment.reference.model(model)
    judges = tuple((judge, judge.model(model)) for judge in experiment.reward_models)
    parts = Parts(experiment, model, reference, lift(experiment.reward_fn), frozenset(), judges)
    checks.rewards_work(parts.reward, experiment.task)
    checks.evaluations_work(experiment.evaluations)
    prompts, rollout, rewards = stages.abstract_rows(parts)
    parts = dataclasses.replace(parts, rows=(prompts, rollout, rewards))
    batch = jax.eval_shape(unannotated, rollout, rewards)
    losses, advantage_fn = stages.bound(parts, controllers.initial(experiment))
    reads = checks.what_is_read(losses, (advantage_fn, experiment.select_fn), batch, model.config.vocabulary_size)
    parts = dataclasses.replace(parts, reads=frozenset(reads | stages.asked_of_models(parts, prompts, rollout)))
    checks.reward_models_are_asked(len(judges), parts.reads, in_graph=parts.reward.in_graph)
    checks.compatible(experiment.model, reads)
    checks.judges_have_models(experiment, batch, parts.reads)
    checks.one_kl(losses, advantage_fn, batch, model.config.vocabulary_size)
    checks.groups_teach(advantage_fn, batch, experiment.group_size)
    if checks.compares_rows(losses, batch, model.config.vocabulary_size):
        checks.groups_are_compared(experiment.group_size, "set Experiment.group_size to 2 or more")
        parts = dataclasses.replace(parts, unit_rows=experiment.group_size)
        checks.rows_divide(experiment, experiment.prompts_per_step * experiment.group_size, parts.unit_rows)
    checks.sampling_fits(experiment.sampling, experiment.old_log_probs, reads)
    checks.caches_are_minded(experiment.model, experiment.old_log_probs, reads)
    experiment.sizes.candidates(_whole(parts))
    checks.buckets_cover(experiment.length_buckets, rollout.tokens.shape[1] - prompts.tokens.shape[1])
    checks.refill_fits(experiment, parts.reward.in_graph)
    pipeline.fits(experiment)
    dispatch.fits(experiment, reward_in_graph=parts.reward.in_graph, one_mesh=stages.one_mesh(parts))
    state = abstract_state(parts)
    checks.evaluations_sample(experiment, model, lora.policy(state), by_step=True)
    jax.eval_shape(functools.partial(learn, parts), state, prompts, rollout, rewards)
    return parts


def settled(parts: Parts, folder: Any) -> Parts:
    """The parts with the micro-batch and chunk sizes of the run in `folder`; called on the mesh of the update."""
    return sizing.settled(parts, folder, _whole(parts), _updating)


def _updating(parts: Parts) -> Program:
    """What follows the rewards, as a program of its own also where the whole step is one."""
    given = (states.abstract_state(parts), *stages.abstract_rows(parts))
    return Program(jax.jit(functools.partial(learn, parts), donate_argnums=0), given, parts.experiment.mesh())


def _whole(parts: Parts) -> chunks.Whole:
    prompts, rollout, _ = stages.abstract_rows(parts)
    rows, columns = rollout.tokens.shape
    scored, vocabulary = columns - prompts.tokens.shape[1], parts.model.config.vocabulary_size
    return chunks.Whole(rows // parts.experiment.minibatches, parts.unit_rows, scored, vocabulary)


def abstract_state(parts: Parts) -> TrainState:
    """Shapes and dtypes of the state between two steps, without computing any of it."""
    return pipeline.abstract(parts, states.abstract_state(parts))


def first_state(parts: Parts, compiled: dict[str, Callable]) -> TrainState:
    """The state before the first step, with the rows of that step if rollouts are ahead of updates."""
    state = initial_state(parts)
    if not parts.experiment.steps_ahead:
        return state
    return pipeline.with_rows(state, prompt_source(parts)(state, 0), compiled["rollout"])


def prompt_source(parts: Parts) -> Callable[..., Prompts]:
    """(state, step, attempt = 0) -> prompts, a pure function of the run's key, the numbers, and the states of the
    curriculum and of the reward.
    """
    experiment = parts.experiment

    def draw(key: Array, step: Array | int, curriculum_state: Any) -> Prompts:
        weights = experiment.curriculum.weights(curriculum_state)
        return prompts_lib.draw(experiment.task, key, step, experiment.prompts_per_step, weights)

    if experiment.task.in_graph:
        draw = jax.jit(draw)
    most = experiment.max_attempts

    def drawn(state: TrainState, step: Array | int, attempt: Array | int = 0) -> Prompts:
        prompts = draw(state.key, step * most + attempt, state.curriculum)
        return experiment.prompts_fn(prompts, state.reward, experiment.task).check()

    return drawn if experiment.task.in_graph else lambda *which: meshes.rows_from_host(drawn(*which))


def step_function(parts: Parts, run: runs.Run, compiled: dict[str, Callable]) -> StepFn:
    """The step: one program where nothing of it is on the host, on another mesh or of another step; else several.

    Of `steps_per_dispatch` steps the prompts are the first's, and metrics are of each; see `dispatch.dispatched`. Where
    rollouts are ahead, the prompts are the next step's; see `pipeline`.

    Args:
      compiled: the programs of `jitted`.
    """
    next_prompts, sample = prompt_source(parts), compiled["rollout"]
    if "step" in compiled:

        def one_program(state: TrainState, prompts: Prompts) -> tuple[TrainState, Metrics, Batch]:
            # Inside one program, phases cannot be timed.
            run.rehearse("rollout", lambda: sample(state, prompts), steps=parts.experiment.steps_per_dispatch)
            return compiled["step"](state, prompts)

        return one_program
    judge = functools.partial(stages.reward_rows, parts)
    judge = jax.jit(judge) if parts.reward.in_graph else judge

    def rewarded(state: TrainState, prompts: Prompts, rollout: Rollout) -> tuple[Rewards, Any]:
        given = (rollout, prompts) if parts.reward.in_graph else processes.on_host((rollout, prompts))
        rewards, reward_state = judge(state, *given)
        return meshes.rows_from_host(rewards), reward_state

    if parts.experiment.steps_ahead:
        return pipeline.step_function(parts, run, sample, rewarded, compiled["update"])

    def step(state: TrainState, prompts: Prompts) -> tuple[TrainState, Metrics, Batch]:
        def attempt(number: int, reward_state: Any) -> tuple[Prompts, Rollout, Rewards, Any]:
            drawn = next_prompts(state, int(state.step), number) if number else prompts
            with run.phase("rollout"):
                as_in_one = parts.reward.in_graph and number == 0  # the same randomness as in one program
                rollout = jax.block_until_ready(sample(state, drawn, *(() if as_in_one else (number,))))
            if "annotate" in compiled:  # the devices say what models think of the rows while the host rewards them
                said.append(compiled["annotate"](state, drawn, rollout))
            with run.phase("reward"):
                rewards, reward_state = rewarded(state.replace(reward=reward_state), drawn, rollout)
            return drawn, rollout, rewards, reward_state

        said: list[Annotations] = []
        rows, reward_state, counts = refill.on_host(parts, attempt, state.reward)
        with run.phase("update"):
            state, metrics, batch = compiled["update"](state.replace(reward=reward_state), *rows, *said)
            return jax.block_until_ready((state, metrics | counts, batch))

    return step


def jitted(parts: Parts) -> dict[str, Callable]:
    """What the loop compiles: the rollout, and the whole step or, where that is not one program, the update; before it
    the annotation, if the host can reward rows meanwhile.
    """
    sample = stages.sampler(parts, pipeline.sample_next if parts.experiment.steps_ahead else sample_rows)
    if stages.one_program(parts):
        return {"rollout": sample, "step": jax.jit(whole_program(parts), donate_argnums=0)}
    learned = {"update": jax.jit(functools.partial(learn, parts), donate_argnums=0)}
    if not parts.reward.in_graph and _annotates_first(parts):
        learned = {"annotate": jax.jit(functools.partial(annotations, parts))} | learned
    return {"rollout": sample, **learned}


def _annotates_first(parts: Parts) -> bool:
    """Whether models are asked about rows before the update, and about the rows that will be learned from."""
    experiment = parts.experiment
    return stages.asks_models(parts) and experiment.max_attempts == 1 and not experiment.steps_ahead


def programs(parts: Parts) -> dict[str, Program]:
    """What the loop compiles, what it calls it with, and where. Moving between two meshes is left out.

    "step" is one step, also of an experiment that dispatches several at a time: each of those costs the same, and the
    program that repeats it holds one more batch of rows.
    """
    parts = dataclasses.replace(parts, experiment=dataclasses.replace(parts.experiment, steps_per_dispatch=1))
    prompts, rollout, rewards = stages.abstract_rows(parts)
    state, mesh = states.abstract_state(parts), parts.experiment.mesh()
    given, compiled = {"step": (state, prompts), "update": (state, prompts, rollout, rewards)}, jitted(parts)
    if "annotate" in compiled:
        given["annotate"] = (state, prompts, rollout)
        given["update"] += (jax.eval_shape(compiled["annotate"], *given["annotate"]),)
    learned = {name: Program(f, given[name], mesh) for name, f in compiled.items() if name in given}
    return {"rollout": stages.sampling(parts, sample_rows, state, prompts), **learned}


def whole_program(parts: Parts) -> dispatch.WholeStep:
    """What is one program where that is possible: a whole step, or as many as are dispatched at once."""
    whole, count = functools.partial(whole_step, parts), parts.experiment.steps_per_dispatch
    next_prompts = prompt_source(parts)
    return whole if count == 1 else dispatch.dispatched(whole, lambda state: next_prompts(state, state.step), count)


def whole_step(parts: Parts, state: TrainState, prompts: Prompts) -> tuple[TrainState, Metrics, Batch]:
    """One training step as one pure function: sample, reward, learn."""
    next_prompts = prompt_source(parts)

    def attempt(number: Array | int, reward_state: Any) -> tuple[Prompts, Rollout, Rewards, Any]:
        drawn = prompts if isinstance(number, int) else next_prompts(state, state.step, number)
        rollout = sample_rows(parts, state, drawn, number)
        rewards, reward_state = stages.reward_rows(parts, state.replace(reward=reward_state), rollout, drawn)
        return drawn, rollout, rewards, reward_state

    rows, reward_state, counts = refill.in_graph(parts, attempt, state.reward)
    state, metrics, batch = learn(parts, state.replace(reward=reward_state), *rows)
    return state, metrics | counts, batch


def sample_rows(parts: Parts, state: TrainState, prompts: Prompts, attempt: Array | int = 0) -> Rollout:
    """The current policy's episodes: [N] prompts -> [B] rows; every attempt has randomness of its own."""
    key = stages.step_key(state, 0)
    first = isinstance(attempt, int) and attempt == 0
    return stages.sample_rows(parts, state, prompts, key if first else jax.random.fold_in(key, attempt))


def annotations(parts: Parts, state: TrainState, prompts: Prompts, rollout: Rollout) -> Annotations:
    """What models say of the rows, as fields of a Batch. It does not depend on rewards."""
    prepare, score, _ = stages.forward(parts, prompts)
    score_rows = lambda model, params, rows, **more: score(  # noqa: E731
        model, params, rows, *prepare(model, params), **more)  # fmt: skip
    batch = stages.annotate(parts, state, unannotated(rollout), score_rows)
    return {name: getattr(batch, name) for name in stages.ANNOTATED}


def learn(parts: Parts, state: TrainState, prompts: Prompts, rollout: Rollout, rewards: Rewards,
          said: Annotations | None = None) -> tuple[TrainState, Metrics, Batch]:  # fmt: skip
    """Annotate the rows, credit their tokens, and update: the state of the next step, metrics, and the rows.

    Args:
      said: what `annotations` gave for these rows, if it was asked before.
    """
    experiment = parts.experiment
    prepare, score, readable = stages.forward(parts, prompts)
    losses, advantage_fn = stages.bound(parts, state.controllers)
    said = annotations(parts, state, prompts, rollout) if said is None else said
    batch = unannotated(rollout, rewards).replace(**said)
    credit, returns = advantage_fn(batch)
    batch = batch.replace(advantages=credit, returns=returns)
    can_be_read = readable(rollout)
    batch = batch.replace(mask=batch.mask & (experiment.select_fn(batch) & can_be_read)[:, None])
    with_logits = "Scores.logits" in parts.reads
    state, metrics = update(
        state, batch, stages.step_key(state, 1),
        prepare=functools.partial(prepare, parts.model), losses=losses,
        score_fn=functools.partial(score, parts.model, with_logits=with_logits),
        reduction=experiment.reduction, optimizer=experiment.optimizer, minibatches=experiment.minibatches,
        epochs=experiment.epochs, micro_batch_rows=experiment.micro_batch_rows, unit_rows=parts.unit_rows,
        bucket_columns=[prompts.tokens.shape[1] + tokens for tokens in experiment.length_buckets],
    )  # fmt: skip
    metrics |= step_metrics(batch) | reference_metrics(batch, parts.reads) | value_metrics(batch, parts.reads)
    metrics |= controllers.as_metrics(state.controllers)
    metrics |= curricula.as_metrics(experiment.curriculum.weights(state.curriculum), experiment.task)
    metrics["unreadable_share"] = 1.0 - jnp.mean(can_be_read)
    rows = prompts_lib.repeat(prompts, experiment.group_size)
    state = state.replace(
        step=state.step + 1, curriculum=experiment.curriculum.update(state.curriculum, rows, batch),
        controllers=controllers.turned(experiment, state.controllers, metrics, batch),
    )  # fmt: skip
    return state, metrics, batch


def describe(parts: Parts) -> str:
    """What a step and a run are, in words, and the rewards of real rows; compiles nothing but the rewards."""
    experiment, task = parts.experiment, parts.experiment.task
    prompts, rollout, _ = stages.abstract_rows(parts)
    state = abstract_state(parts)
    n, g = experiment.prompts_per_step, experiment.group_size
    (rows, columns), width = rollout.tokens.shape, prompts.tokens.shape[1]
    programs = "the whole step" if stages.one_program(parts) else "the rollout, and the update after the rewards"
    programs += describe_.the_dispatch(experiment)
    reads = sorted(name for name in parts.reads if name in ("Batch.values", "Batch.reference_log_probs"))
    return describe_.table({
        "task": f"{task.name}: {', '.join(task.sources)}",
        "a step": [f"{n} prompts x {g} completions = {rows} rows of {width} + {columns - width} columns, "
                   f"at most {rows * (columns - width):,} sampled tokens",
                   *describe_.the_refill(experiment, rows), describe_.the_update(experiment, rows, parts.reads)],
        "a run": f"{experiment.num_steps:,} steps, {experiment.num_steps * rows:,} rows, "
                 f"{experiment.num_steps * n / sum(task.sizes):.2f} epochs of {sum(task.sizes):,} prompts",
        "model": describe_.the_model(parts.model.config, state),
        "memory": describe_.the_memory(
            experiment, parts.model.config, state, rows=rows, columns=columns, scored=columns - width,
            update_rows=experiment.micro_batch_rows or rows // experiment.minibatches, reads=parts.reads,
        ) + f"; {describe_.the_meshes(experiment)}",
        "annotated": ", ".join(["old log-probs", *(name.removeprefix("Batch.") for name in reads)]),
        "compiled": programs + "; what each evaluation runs" * bool(experiment.evaluations),
        "evaluated": describe_.the_evaluations(experiment),
        "rewards": describe_.tried(parts.reward, task),
    })  # fmt: skip
