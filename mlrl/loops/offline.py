"""The offline loop: stored rows -> annotate -> update. Supervised learning is this loop with a next-token loss."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mlrl import chunks, controllers, meshes, optimizers, reductions, runs, scoring, stored
from mlrl.controllers import Controlled
from mlrl.costs.work import of_step
from mlrl.evaluation import AnyEvaluation, Results
from mlrl.loops import checks, sizing, stages
from mlrl.loops import describe as describe_
from mlrl.loops.stages import evaluator
from mlrl.loops.start import FrozenModel, StartFn, own_start, random_parameters
from mlrl.loops.states import Program, abstract_state, initial_state
from mlrl.losses.supervised import next_token
from mlrl.models import lora
from mlrl.models.transformer import Config, Transformer
from mlrl.monitoring import row_metrics
from mlrl.rollouts.single_turn import single_turn
from mlrl.types import (
    AdvantageFn,
    Array,
    Batch,
    LossFn,
    Metrics,
    Params,
    ReductionFn,
    Rollout,
    RolloutFn,
    Scores,
    Task,
    TrainState,
)
from mlrl.updates import computed_alone, fields_read, update


def never(results: Results) -> bool:
    """Runs to the last step."""
    del results
    return False


def at_accuracy(results: Results, *, accuracy: float, metric: str = "greedy") -> bool:
    """Stops once `metric` of every evaluation has reached `accuracy`; sources of a mixture do not count."""
    whole = [found[metric]["value"] for name, found in results.items() if "/" not in name and metric in found]
    return bool(whole) and min(whole) >= accuracy


def no_advantages(batch: Batch) -> tuple[Array, Array]:
    """Advantages and returns as they are: NaN, for losses that read neither."""
    return batch.advantages, batch.returns


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What an offline run is made of. Every field is a function, a number, or a noun.

    A step is `rows_per_step` stored rows, learned from in `minibatches` optimizer steps.

    task         where the rows come from
    num_steps    how many steps the run has
    rows_per_step  B
    rows_fn      (task, key, step, rows, weights) -> Batch: by default the task's demonstrations; see mlrl.stored
    losses       functions of (Scores, Batch), summed; any may be controllers.controlled
    advantage_fn   Batch -> (advantages, returns), for losses that read them; may be controllers.controlled
    old_log_probs  what the advantage reads as such: of the policy before the update, since nobody sampled the rows
    reference    the frozen model that losses read as reference_log_probs; a teacher is one
    reference_tokens  of the reference's distributions, for losses that read them: so many likeliest; 0: all
    stop         results of an evaluation -> whether that is enough
    sizes        micro_batch_rows, score_chunk_columns, score_chunk_vocabulary as set, or timed: chunks.fastest()
    score_fn     how rows are read: as they are, or laid end to end (packing.score)
    rollout_fn   how the evaluations sample
    """

    task: Task
    num_steps: int
    losses: tuple[LossFn | Controlled, ...] = (next_token,)
    rows_fn: Callable[..., Batch] = stored.demonstrations
    advantage_fn: AdvantageFn | Controlled = no_advantages
    old_log_probs: Callable[..., Array] = scoring.recomputed_log_probs
    model: Config = Config()
    rows_per_step: int = 64
    reduction: ReductionFn = reductions.token_mean
    optimizer: optax.GradientTransformation = optimizers.adamw()
    minibatches: int = 1
    epochs: int = 1
    micro_batch_rows: int = 0
    score_chunk_columns: int = 0
    score_chunk_vocabulary: int = 0
    sizes: chunks.Search = chunks.as_set()
    score_fn: Callable[..., Scores] = scoring.score
    start: StartFn = random_parameters
    reference: FrozenModel = own_start()
    reference_tokens: int = 0
    stop: Callable[[Results], bool] = never
    evaluations: tuple[AnyEvaluation, ...] = ()
    rollout_fn: RolloutFn = single_turn
    mesh: Callable[[], jax.sharding.Mesh] = meshes.mesh
    recording: runs.Recording = runs.Recording()
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Parts:
    """An experiment closed over its model and checked. Nothing is compiled yet."""

    experiment: Experiment
    model: Transformer
    reference_model: Transformer
    reads: frozenset[str]
    unit_rows: int = 1  # of a group that a loss compares
    reward_models: tuple = ()  # there is no reward to ask any

    def stateful(self) -> dict[str, Any]:
        """Nothing else remembers."""
        return {}


def train(experiment: Experiment, run: runs.Run) -> TrainState:
    """Runs `experiment` in the folder of `run`, from its last checkpoint if it holds one. Returns the last state."""
    parts = prepare(experiment)
    with meshes.use(experiment.mesh()) as mesh:
        parts = sizing.settled(parts, run.folder, _whole(parts), lambda parts: programs(parts)["update"])
        state = run.restore_or(abstract_state(parts), lambda: initial_state(parts), mesh)
        evaluate = evaluator(parts, experiment.evaluations)
        next_rows, take_step = row_source(parts), jitted(parts)["update"]
        cost = lambda: of_step(parts, programs(parts))  # noqa: E731
        if experiment.stop(run.begin(experiment.task, experiment.num_steps, evaluate, state, cost)):
            return state
        for step in range(int(state.step), experiment.num_steps):
            state, metrics, batch = take_step(state, next_rows(state, step))
            results = run.record(state, step + 1, metrics, batch)
            if experiment.stop(results):
                run.save(state, results)
                break
    return state


def prepare(experiment: Experiment) -> Parts:
    """Everything about an experiment that can be checked before compiling is checked here. Raises Refused."""
    checks.nouns(experiment)
    controllers.require_no_memory(experiment)
    model = checks.model_for(experiment.model, experiment.task.vocabulary)
    checks.start_fits(experiment.start, model)
    checks.mesh_fits(experiment)
    checks.rows_divide(experiment, experiment.rows_per_step)
    parts = Parts(experiment, model, experiment.reference.model(model), frozenset())
    batch = _abstract_rows(parts)
    losses, advantage_fn = stages.bound(parts, controllers.initial(experiment))
    reads = checks.what_is_read(losses, (), batch, model.config.vocabulary_size)
    made = {"Batch.advantages", "Batch.returns"} & reads
    if made:
        reads = (reads - made) | fields_read(advantage_fn, batch)
    checks.compatible(experiment.model, reads)
    checks.stored_rows_suffice(reads, experiment.old_log_probs)
    parts = dataclasses.replace(parts, reads=frozenset(reads), unit_rows=_unit_rows(parts, losses, batch))
    experiment.sizes.candidates(_whole(parts))
    checks.evaluations_work(experiment.evaluations)
    checks.judges_have_models(experiment, batch, reads)
    experiment.stop({})
    state = abstract_state(parts)
    checks.evaluations_sample(experiment, model, lora.policy(state))
    jax.eval_shape(functools.partial(learn, parts), state, batch)
    return parts


def _whole(parts: Parts) -> chunks.Whole:
    rows, columns = _abstract_rows(parts).rollout.tokens.shape
    rows //= parts.experiment.minibatches
    return chunks.Whole(rows, parts.unit_rows, columns - 1, parts.model.config.vocabulary_size)


def _unit_rows(parts: Parts, losses: tuple[LossFn, ...], batch: Batch) -> int:
    """Rows of a group, if a loss compares them; else 1. Raises Refused, if there is nothing to compare."""
    experiment = parts.experiment
    if not checks.compares_rows(losses, batch, parts.model.config.vocabulary_size):
        return 1
    size = checks.rows_of_a_group(_groups(parts, batch))
    checks.groups_are_compared(size, "set Experiment.rows_fn = @stored.candidates and a task with pairs, such as "
                                     "preferences.read or pairs.against_corrupted")  # fmt: skip
    checks.rows_divide(experiment, experiment.rows_per_step, size)
    return size


def _groups(parts: Parts, batch: Batch) -> np.ndarray:
    """The group of each row of a step; of a task in the graph, without computing the rows."""
    if parts.experiment.task.in_graph:
        return np.asarray(computed_alone(lambda: _rows(parts, jax.random.key(0), 0).rollout.group))
    return np.asarray(batch.rollout.group)


def row_source(parts: Parts) -> Callable[[TrainState, int], Batch]:
    """(state, step) -> the step's rows, a pure function of the run's key and the step."""
    rows = functools.partial(_rows, parts)
    if parts.experiment.task.in_graph:
        rows = jax.jit(rows)
        return lambda state, step: rows(state.key, step)
    return lambda state, step: meshes.rows_from_host(rows(state.key, step))


def _rows(parts: Parts, key: Array, step: Array | int) -> Batch:
    task = parts.experiment.task
    return parts.experiment.rows_fn(task, key, step, parts.experiment.rows_per_step, jnp.asarray(task.rates))


def _abstract_rows(parts: Parts) -> Batch:
    """Shapes and dtypes of a step's rows; the rows themselves, where the task is on the host."""
    rows = functools.partial(_rows, parts)
    draw = lambda: rows(jax.random.key(0), 0)  # noqa: E731
    return jax.eval_shape(draw) if parts.experiment.task.in_graph else draw()


def jitted(parts: Parts) -> dict[str, Callable]:
    """What the loop compiles: the update."""
    return {"update": jax.jit(functools.partial(learn, parts), donate_argnums=0)}


def programs(parts: Parts) -> dict[str, Program]:
    """What the loop compiles, what it calls it with, and where."""
    given = (abstract_state(parts), _abstract_rows(parts))
    return {"update": Program(jitted(parts)["update"], given, parts.experiment.mesh())}


def learn(parts: Parts, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics, Batch]:
    """Annotate the rows and update: the state of the next step, metrics, and the rows."""
    experiment = parts.experiment
    score_rows = functools.partial(score, parts)
    losses, advantage_fn = stages.bound(parts, state.controllers)
    batch = stages.annotate(parts, state, meshes.split_rows(batch), score_rows)
    credit, returns = advantage_fn(batch)
    batch = batch.replace(advantages=credit, returns=returns)
    with_logits = "Scores.logits" in parts.reads
    state, metrics = update(
        state, batch, stages.step_key(state, 0), losses=losses,
        score_fn=lambda params, rows: score_rows(parts.model, params, rows, with_logits=with_logits),
        reduction=experiment.reduction, optimizer=experiment.optimizer, minibatches=experiment.minibatches,
        epochs=experiment.epochs, micro_batch_rows=experiment.micro_batch_rows, unit_rows=parts.unit_rows,
    )  # fmt: skip
    metrics |= row_metrics(batch) | controllers.as_metrics(state.controllers)
    turned = controllers.turned(experiment, state.controllers, metrics)
    return state.replace(step=state.step + 1, controllers=turned), metrics, batch


def score(parts: Parts, model: Transformer, params: Params, rollout: Rollout, **more: Any) -> Scores:
    """The learner's forward pass, at temperature 1."""
    experiment = parts.experiment
    return experiment.score_fn(model, params, rollout, chunk_columns=experiment.score_chunk_columns,
                               chunk_vocabulary=experiment.score_chunk_vocabulary, **more)  # fmt: skip


def warm_start(*, experiment: Experiment) -> StartFn:
    """A start for another experiment: the parameters that this offline experiment ends with.

    Its own model and seed are replaced by those it is asked for; of a model with adapters it trains these alone, and
    the other run goes on with them. What it learned is kept in the other run's first checkpoint, and its own logs are
    not.
    """
    prepare(experiment)

    def start(model: Transformer, key: Array) -> Params:
        seed = int(jax.random.bits(key) & 0x7FFFFFFF)
        ours = dataclasses.replace(
            experiment, model=model.config, seed=seed,
            recording=runs.Recording(save_every_steps=0, samples_every_steps=0),
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, runs.Run(folder, ours.recording, title="warm start") as run:
            return lora.policy(train(ours, run))

    return start


def describe(parts: Parts) -> str:
    """What a step and a run are, in words; compiles nothing."""
    experiment, task = parts.experiment, parts.experiment.task
    batch = _abstract_rows(parts)
    rows, columns = batch.rollout.tokens.shape
    prompts = len(np.unique(_groups(parts, batch)))
    state = abstract_state(parts)
    return describe_.table({
        "task": f"{task.name}: {', '.join(task.sources)}",
        "a step": [f"{rows} stored rows of {columns} columns" + f", {prompts} prompts" * (prompts < rows),
                   describe_.the_update(experiment, rows)],
        "a run": f"{experiment.num_steps:,} steps, {experiment.num_steps * rows:,} rows, about "
                 f"{experiment.num_steps * prompts / sum(task.sizes):.2f} epochs of {sum(task.sizes):,} prompts",
        "model": describe_.the_model(parts.model.config, state),
        "memory": describe_.the_memory(
            experiment, parts.model.config, state, rows=0, columns=columns, scored=columns,
            update_rows=experiment.micro_batch_rows or rows // experiment.minibatches, reads=parts.reads,
        ) + f"; {describe_.the_meshes(experiment)}",
        "compiled": "the update; what each evaluation runs",
        "evaluated": describe_.the_evaluations(experiment),
    })  # fmt: skip
