"""The iterated loop: roll out over a set of prompts -> reward -> select -> train on the selection -> again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
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
from mlrl.evaluation import Evaluation
from mlrl.loops import checks, configurations, pool, rounds, sizing, stages
from mlrl.loops import describe as describe_
from mlrl.loops.stages import evaluator
from mlrl.loops.start import FrozenModel, StartFn, own_start, random_parameters
from mlrl.loops.states import Program, abstract_state, initial_state
from mlrl.losses.supervised import next_token
from mlrl.models.transformer import Config, Transformer
from mlrl.monitoring import reference_metrics, step_metrics, value_metrics
from mlrl.rewards.completions import name_of
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
    Task,
    TrainState,
)
from mlrl.updates import update


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What an iterated run is made of. Every field is a function, a number, or a noun.

    What a round is: `group_size` completions of each of `prompts_per_round` prompts, all by the policy that the last
    round left, sampled `prompts_per_step` prompts at a time; they are rewarded and selected from; then come `epochs`
    passes over the selected rows in optimizer steps of `rows_per_step` rows. The last step of a pass may have fewer,
    and its mean is over those. A round is what `step` counts in logs and checkpoints.

    num_rounds    how many rounds the run has
    prompts_per_round  over how many prompts a round samples
    rows_per_step  selected rows of an optimizer step
    begin_round   (TrainState, optimizer) -> what training starts from: rounds.go_on, restart or
                  move_reference
    select_fn     Batch -> rows to train on, of all rows of the round
    configure     chooses the temperature and the threshold of each round: configurations.fixed() or balanced()
    advantage_fn  Batch -> (advantages, returns) over all rows of the round, for losses that read them
    losses        as in the online loop; where they compare the rows of a group, groups stay whole
    other fields  as in the online loop
    """

    task: Task
    reward_fn: RewardFn | Callable
    num_rounds: int
    losses: tuple[LossFn | Controlled, ...] = (next_token,)
    select_fn: SelectFn = selection.keep_correct
    begin_round: rounds.RoundFn = rounds.go_on
    configure: configurations.ConfigureFn = configurations.fixed()
    model: Config = Config()
    prompts_per_round: int = 512
    prompts_per_step: int = 128
    group_size: int = 8
    rows_per_step: int = 64
    epochs: int = 1
    micro_batch_rows: int = 0
    score_chunk_columns: int = 0
    score_chunk_vocabulary: int = 0
    sizes: chunks.Search = chunks.as_set()
    rollout_fn: RolloutFn = single_turn
    sampling: Sampling = Sampling()
    advantage_fn: AdvantageFn | Controlled = advantages.reinforce
    reduction: ReductionFn = reductions.token_mean
    old_log_probs: Callable[..., Array] = scoring.sampler_log_probs
    optimizer: optax.GradientTransformation = optimizers.adamw()
    curriculum: CurriculumFn = curricula.fixed()
    start: StartFn = random_parameters
    reference: FrozenModel = own_start()
    reference_tokens: int = 0
    reward_models: tuple[FrozenModel, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    mesh: Callable[[], jax.sharding.Mesh] = meshes.mesh
    rollout_mesh: Callable[[jax.sharding.Mesh], jax.sharding.Mesh] = meshes.same
    recording: runs.Recording = runs.Recording(save_every_steps=1, samples_every_steps=1)
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Parts:
    """An experiment closed over its models and checked. Nothing is compiled yet."""

    experiment: Experiment
    model: Transformer
    reference_model: Transformer
    reward: RewardFn
    reads: frozenset[str]
    reward_models: tuple[tuple[FrozenModel, Transformer], ...] = ()
    unit: int = 1  # rows that are drawn together: a group, where a loss compares its rows
    prompt_columns: int = 0  # the width of the prompts
    rows: tuple = ()  # shapes of a chunk's prompts, rows and rewards, once they are known

    def stateful(self) -> dict[str, Any]:
        """First states of the curriculum and the reward, and the first configuration."""
        return {"curriculum": self.experiment.curriculum.init(self.experiment.task), "reward": self.reward.init(),
                "configuration": self.experiment.configure.init()}  # fmt: skip


def train(experiment: Experiment, run: runs.Run) -> TrainState:
    """Runs `experiment` in the folder of `run`, from its last checkpoint if it holds one. Returns the last state."""
    parts = prepare(experiment)
    with meshes.use(experiment.mesh()) as mesh:
        parts = sizing.settled(parts, run.folder, _whole(parts), lambda parts: programs(parts)["update"])
        state = run.restore_or(abstract_state(parts), lambda: initial_state(parts), mesh)
        evaluate = evaluator(parts, experiment.evaluations)
        play = round_function(parts, run)
        run.begin(experiment.task, experiment.num_rounds, evaluate, state)
        for round_number in range(int(state.step), experiment.num_rounds):
            state, metrics, rows = play(state)
            run.record(state, round_number + 1, metrics, rows)
    return state


def round_function(parts: Parts, run: runs.Run) -> Callable[[TrainState], tuple[TrainState, Metrics, Batch]]:
    """A round: configure it, collect rows, choose among them, train on the chosen ones. Its programs have fixed shapes.
    """
    experiment, (collect, explore) = parts.experiment, pool.collector(parts, run, jitted(parts))
    begin_ = jax.jit(functools.partial(begun, parts))
    begin = lambda state: begin_(state.replace(frozen=(), reward_models=())).replace(  # noqa: E731  without a copy
        frozen=state.frozen, reward_models=state.reward_models)  # fmt: skip
    choose_, learn_ = jax.jit(functools.partial(choose, parts)), jitted(parts)["update"]
    advance = jax.jit(experiment.curriculum.update)

    def play(state: TrainState) -> tuple[TrainState, Metrics, Batch]:
        state = experiment.configure.choose(state, explore, experiment.select_fn)
        fresh = begin(state)
        prompts, rows, reward_state = collect(state.replace(reference=fresh.reference))
        credit, returns, keep, metrics = processes.on_host(choose_(state.controllers, state.configuration, rows))
        rows = rows.replace(advantages=credit, returns=returns, mask=rows.mask & keep[:, None])
        metrics |= pool.selection_metrics(rows, keep, experiment.group_size)
        metrics |= pool.exploration_metrics(rows, experiment.group_size)
        with run.phase("update"):
            trained, learned = fit(parts, learn_, fresh, rows, keep)
        if learned:  # a round that selects nothing leaves the model as it was
            state = trained.replace(controllers=controllers.turned(experiment, state.controllers, metrics | learned))
        curriculum = advance(state.curriculum, prompts_lib.repeat(prompts, experiment.group_size), rows)
        metrics |= learned | controllers.as_metrics(fresh.controllers) | configurations.as_metrics(state.configuration)
        return state.replace(step=state.step + 1, curriculum=curriculum, reward=reward_state), metrics, rows

    return play


def jitted(parts: Parts) -> dict[str, Callable]:
    """The large ones of the programs that a round compiles: chunks of rows are sampled and annotated, and updates."""
    rest = {"annotate": pool.annotate_chunk, "update": learn}
    rest = {name: jax.jit(functools.partial(function, parts)) for name, function in rest.items()}
    return {"rollout": stages.sampler(parts, pool.sample_chunk), **rest}


def programs(parts: Parts) -> dict[str, Program]:
    """The large programs of a round, what it calls them with, and where. Moving between two meshes is left out."""
    prompts, rollout, rewards = stages.abstract_rows(parts)
    state, compiled, mesh = abstract_state(parts), jitted(parts), parts.experiment.mesh()
    rows = jax.eval_shape(compiled["annotate"], state, prompts, rollout, rewards)
    return {
        "rollout": stages.sampling(parts, pool.sample_chunk, state, prompts, 0),
        "annotate": Program(compiled["annotate"], (state, prompts, rollout, rewards), mesh),
        "update": Program(compiled["update"], (state, pool.abstract(rows, parts.experiment.rows_per_step)), mesh),
    }


def begun(parts: Parts, state: TrainState) -> TrainState:
    """What a round's training starts from; its rows are sampled by the policy as it was before."""
    return meshes.split_state(parts.experiment.begin_round(state, parts.experiment.optimizer))


def choose(parts: Parts, controlled: dict[str, Array], configuration: Any,
           rows: Batch) -> tuple[Array, Array, Array, Metrics]:  # fmt: skip
    """Advantages and returns [B,L] of all rows of a round, which of them are kept [B], and metrics."""
    _, advantage_fn = stages.bound(parts, controlled)
    credit, returns = advantage_fn(rows)
    rows = rows.replace(advantages=credit, returns=returns)
    keep = configurations.selected_by(parts.experiment.select_fn, configuration)(rows) & rows.rewards.scored
    rows = rows.replace(mask=rows.mask & keep[:, None])
    balance = selection.balance_score(rows.rewards.outcome, keep, rows.rollout.group)
    metrics = step_metrics(rows) | reference_metrics(rows, parts.reads) | value_metrics(rows, parts.reads)
    metrics["selection/balance"] = balance
    return credit, returns, keep, metrics


def fit(parts: Parts, learn_: Callable, state: TrainState, rows: Batch,
        keep: np.ndarray) -> tuple[TrainState, Metrics]:  # fmt: skip
    """`epochs` passes over the kept rows: the state after them, and metrics averaged over the optimizer steps; {}
    without any.
    """
    keys = jax.random.split(stages.step_key(state, 1), parts.experiment.epochs)
    found = []
    for key in keys:
        order = np.asarray(jax.random.permutation(key, len(keep) // parts.unit))
        for batch in pool.batches(rows, keep, order, rows=parts.experiment.rows_per_step, unit=parts.unit):
            state, metrics = learn_(state, meshes.rows_from_host(batch))
            found.append(metrics)
    found = jax.device_get(found)
    means = {name: np.mean([one[name] for one in found]) for name in (found[0] if found else ())}
    return state, means | ({"optimizer_steps": np.float32(len(found))} if found else {})


def learn(parts: Parts, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One optimizer step."""
    experiment = parts.experiment
    score = functools.partial(stages.score, parts, parts.prompt_columns, parts.model,
                              with_logits="Scores.logits" in parts.reads)  # fmt: skip
    return update(
        state, batch, state.key, score_fn=score, losses=stages.bound(parts, state.controllers)[0],
        reduction=experiment.reduction, optimizer=experiment.optimizer,
        micro_batch_rows=experiment.micro_batch_rows,
    )  # fmt: skip


def prepare(experiment: Experiment) -> Parts:
    """Everything about an experiment that can be checked before compiling is checked here. Raises Refused."""
    checks.nouns(experiment)
    controllers.require_no_memory(experiment)
    configurations.fits(experiment)
    model = checks.model_for(experiment.model, experiment.task.vocabulary)
    checks.start_fits(experiment.start, model)
    checks.mesh_fits(experiment)
    checks.rows_divide(experiment, experiment.rows_per_step)
    checks.rounds_divide(experiment)
    judges = tuple((judge, judge.model(model)) for judge in experiment.reward_models)
    parts = Parts(experiment, model, experiment.reference.model(model), lift(experiment.reward_fn), frozenset(), judges)
    checks.rewards_work(parts.reward, experiment.task)
    checks.evaluations_work(experiment.evaluations)
    prompts, rollout, rewards = stages.abstract_rows(parts)
    parts = dataclasses.replace(parts, rows=(prompts, rollout, rewards))
    batch = jax.eval_shape(unannotated, rollout, rewards)
    losses, advantage_fn = stages.bound(parts, controllers.initial(experiment))
    read = functools.partial(checks.what_is_read, batch=batch, vocabulary_size=model.config.vocabulary_size)
    by_losses, reads = read(losses, ()), read(losses, (advantage_fn, experiment.select_fn))
    configurations.one_temperature(experiment, reads)
    reads |= stages.asked_of_models(parts, prompts, rollout) | rounds.reads(parts, reads)
    checks.reward_models_are_asked(len(judges), reads, in_graph=parts.reward.in_graph)
    unit = 1
    if "Batch.rollout.group" in by_losses:
        unit = experiment.group_size
        checks.groups_are_compared(unit, "set Experiment.group_size to 2 or more")
    parts = dataclasses.replace(parts, reads=frozenset(reads), unit=unit, prompt_columns=prompts.tokens.shape[1])
    checks.compatible(experiment.model, reads)
    checks.judges_have_models(experiment, batch, parts.reads)
    checks.one_kl(losses, advantage_fn, batch, model.config.vocabulary_size)
    if "Batch.advantages" in by_losses:
        checks.groups_teach(advantage_fn, batch, experiment.group_size)
    checks.sampling_fits(experiment.sampling, experiment.old_log_probs, reads, group_size=experiment.group_size)
    checks.groups_stay_whole(experiment, unit)
    experiment.sizes.candidates(_whole(parts))
    _trace(parts, prompts, rollout, rewards)
    return parts


def _whole(parts: Parts) -> chunks.Whole:
    columns = stages.abstract_rows(parts)[1].tokens.shape[1] - parts.prompt_columns
    return chunks.Whole(parts.experiment.rows_per_step, parts.unit, columns, parts.model.config.vocabulary_size)


def _trace(parts: Parts, prompts: Prompts, rollout: Rollout, rewards: Rewards) -> None:
    """Runs a round on shapes alone."""
    experiment, state = parts.experiment, abstract_state(parts)
    rounds.same_shapes(state, jax.eval_shape(functools.partial(begun, parts), state))
    batch = jax.eval_shape(functools.partial(pool.annotate_chunk, parts), state, prompts, rollout, rewards)
    rows = pool.abstract(batch, experiment.prompts_per_round * experiment.group_size)
    checks.selects_rows(experiment.select_fn, rows)
    jax.eval_shape(functools.partial(choose, parts), state.controllers, state.configuration, rows)
    jax.eval_shape(functools.partial(learn, parts), state, pool.abstract(batch, experiment.rows_per_step))


def describe(parts: Parts) -> str:
    """What a round and a run are, in words, and the rewards of real rows; compiles nothing but the rewards."""
    experiment, task, state = parts.experiment, parts.experiment.task, abstract_state(parts)
    _, rollout, _ = stages.abstract_rows(parts)
    n, g, width = experiment.prompts_per_round, experiment.group_size, parts.prompt_columns
    columns, each = rollout.tokens.shape[1], experiment.rows_per_step
    most = experiment.epochs * -(-n * g // each)
    whole = f", in whole groups of {g}" if parts.unit > 1 else ""
    begin = (experiment.begin_round.__doc__ or "").partition("\n")[0]
    return describe_.table({
        "task": f"{task.name}: {', '.join(task.sources)}",
        "a round": [f"{n} prompts x {g} completions = {n * g} rows of {width} + {columns - width} columns, sampled "
                    f"{experiment.prompts_per_step} prompts at a time",
                    f"{name_of(experiment.select_fn)} selects among them",
                    *configurations.in_words(experiment),
                    f"{experiment.epochs} epoch(s) over the selected rows, {each} rows an optimizer step{whole}: at "
                    f"most {most} steps", f"{name_of(experiment.begin_round)}: {begin}"],
        "a run": f"{experiment.num_rounds:,} rounds, {experiment.num_rounds * n * g:,} rows, "
                 f"{experiment.num_rounds * n / sum(task.sizes):.2f} epochs of {sum(task.sizes):,} prompts",
        "model": describe_.the_model(parts.model.config, state),
        "memory": describe_.the_memory(
            experiment, parts.model.config, state, rows=experiment.prompts_per_step * g, columns=columns,
            scored=columns - width, update_rows=experiment.micro_batch_rows or each, reads=parts.reads,
        ) + f"; {describe_.the_meshes(experiment)}",
        "compiled": "the rollout, the annotation, the selection and the update; what each evaluation runs",
        "evaluated": describe_.the_evaluations(experiment).replace("steps", "rounds"),
        "rewards": describe_.tried(parts.reward, task),
    })  # fmt: skip
