"""The stages of a step that loops share: rows are sampled, rewarded, and annotated with what models say of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mlrl import controllers, evaluation, meshes, scoring
from mlrl import prompts as prompts_lib
from mlrl.costs import work
from mlrl.evaluation import AnyEvaluation, Evaluator, SampleFn
from mlrl.loops import checks, configurations
from mlrl.loops.states import Parts, Program, abstract_state, reads_reference
from mlrl.models import lora
from mlrl.models.projections import as_multiplied
from mlrl.models.transformer import Transformer
from mlrl.sampling import Sampling
from mlrl.types import (
    AdvantageFn,
    Array,
    Batch,
    Distribution,
    LossFn,
    Models,
    Params,
    Prompts,
    Refused,
    Rewards,
    Rollout,
    RolloutFn,
    Scores,
    TrainState,
)

ANNOTATED = ("old_log_probs", "values", "reference_log_probs", "reference_distribution")
ScoreFn = Callable[..., Scores]  # (model, params, rollout, *, with_logits) -> Scores


def step_key(state: TrainState, purpose: int) -> Array:
    """A key for one purpose in one step: resuming a run resumes its randomness."""
    branch = jax.random.fold_in(state.key, 0x73746570)  # prompts, and the first parameters, have branches of their own
    return jax.random.fold_in(jax.random.fold_in(branch, state.step), purpose)


def sample_rows(parts: Parts, state: TrainState, prompts: Prompts, key: Array) -> Rollout:
    """The current policy's episodes: [N] prompts -> [B] rows."""
    experiment = parts.experiment
    return meshes.split_rows(
        experiment.rollout_fn(
            parts.model, lora.policy(state), meshes.split_rows(prompts), key,
            vocabulary=experiment.task.vocabulary,
            sampling=configurations.sampled_by(experiment.sampling, state.configuration),
            group_size=experiment.group_size, policy_version=state.step,
        ).check()
    )  # fmt: skip


def sampler(parts: Parts, sample: Callable[..., Rollout]) -> Callable[..., Rollout]:
    """sample(parts, state, prompts, ...) compiled for the mesh of rollouts, to be called on that of the update.

    Where the two differ, parameters and prompts are moved there first, the parameters in the dtype of products, and
    rows come back; see `meshes.mover`.
    """
    def shapes() -> tuple[Any, Any, Any]:
        prompts, rollout, _ = abstract_rows(parts)
        return acting(parts, abstract_state(parts)), prompts, rollout

    narrow = functools.partial(acting, parts)
    return _on_mesh_of_rollouts(parts, functools.partial(sample, parts), narrow, meshes.state_shardings, shapes)


def _on_mesh_of_rollouts(parts: Any, sample: Callable, narrow: Callable, shardings: Callable,
                         shapes: Callable[[], tuple[Any, Any, Any]]) -> Callable:  # fmt: skip
    """sample(held, rows, *more), compiled for where rollouts are and called where the update is.

    Args:
      narrow: held -> what is left of it to be moved.
      shardings: (what is left, mesh) -> where it lives.
      shapes: () -> those of what is left, of the rows, and of what `sample` returns; called where meshes differ. What
        `sample` is called with more is not moved.
    """
    program = jax.jit(sample)
    here, there = checks.meshes_of(parts.experiment)
    if there == here:
        return program
    held, rows, sampled = shapes()
    places = lambda mesh: (shardings(held, mesh), meshes.row_shardings(rows, mesh))  # noqa: E731
    go, narrow = meshes.mover(places(here), places(there)), jax.jit(narrow)
    back = meshes.mover(*(meshes.row_shardings(sampled, mesh) for mesh in (there, here)))

    def on_other_mesh(held: Any, rows: Any, *more: Any) -> Any:
        moved = go((narrow(held), rows))
        with meshes.use(there):
            sampled = program(*moved, *more)
        return back(sampled)

    return on_other_mesh


def evaluator(parts: Any, evaluations: Sequence[AnyEvaluation]) -> Evaluator:
    """What measures these evaluations of an experiment's policy. They sample where rollouts do, and as they do: their
    rows are split over the devices, and filled up with copies of the last one until they divide.
    """
    def compiled(sample: SampleFn, rows: Any) -> SampleFn:
        split = _split(parts, sample)

        def shapes() -> tuple[Any, Any, Any]:
            policy = _narrowed(parts, lora.policy(abstract_state(parts)))
            with meshes.use(checks.meshes_of(parts.experiment)[1]):
                return policy, rows, jax.eval_shape(split, policy, rows)

        narrow = functools.partial(_narrowed, parts)
        return _on_mesh_of_rollouts(parts, split, narrow, meshes.parameter_shardings, shapes)

    experiment = parts.experiment
    return evaluation.evaluator(evaluations, parts.model, experiment.rollout_fn, parts.reference_model, compiled)


def evaluations(parts: Any) -> dict[str, Program]:
    """The programs by which the evaluations of an experiment sample, each under a name of its own."""
    experiment, state, found = parts.experiment, abstract_state(parts), {}

    def noted(task: str, sample: SampleFn, rows: Any) -> SampleFn:
        split, shapes = _split(parts, sample), jax.eval_shape(lambda: rows)
        of_state = lambda parts, state, rows: split(lora.policy(state), rows)  # noqa: E731
        name = f"{work.EVALUATION} of {task}, {jax.tree.leaves(rows)[0].shape[0]} rows"
        again = sum(one.startswith(name) for one in found)
        found[name + (f" ({again + 1})" if again else "")] = sampling(parts, of_state, state, shapes)
        return sample

    for one in experiment.evaluations:
        one.measure(evaluation.Measured(parts.model, experiment.rollout_fn, parts.reference_model,
                                        functools.partial(noted, one.task.name)))  # fmt: skip
    return found


def _split(parts: Any, sample: SampleFn) -> SampleFn:
    """`sample`, whose rows are split over the devices of rollouts."""
    shards = meshes.row_shards(checks.meshes_of(parts.experiment)[1])

    def split(params: Params, rows: Any) -> Any:
        count = jax.tree.leaves(rows)[0].shape[0]
        more = -count % shards
        filled = jax.tree.map(lambda x: jnp.concatenate([x, x[-1:].repeat(more, axis=0)]), rows)
        return jax.tree.map(lambda x: x[:count], meshes.split_rows(sample(params, meshes.split_rows(filled))))

    return sample if shards == 1 else split


def _narrowed(parts: Any, params: Params) -> Params:
    """Parameters, or their shapes, in the dtype of products."""
    narrow = functools.partial(as_multiplied, dtype=jnp.dtype(parts.model.config.dtype))
    abstract = isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct)
    return jax.eval_shape(narrow, params) if abstract else narrow(params)


def acting(parts: Any, state: TrainState) -> TrainState:
    """What a rollout on another mesh needs of the state."""
    state = state.replace(opt_state=(), reference=(), reward_models=())
    return state.replace(**_narrowed(parts, {"params": state.params, "frozen": state.frozen}))


def sampling(parts: Any, sample: Callable[..., Rollout], state: TrainState, *rows: Any) -> Program:
    """The program that `sampler` compiles for sample(parts, state, *rows)."""
    program, there = jax.jit(functools.partial(sample, parts)), checks.meshes_of(parts.experiment)[1]
    if one_mesh(parts):
        return Program(program, (state, *rows), there)
    return Program(program, (acting(parts, state), *rows), there, beside=state)


def one_program(parts: Any) -> bool:
    """Whether a whole step is one program: nothing of it is on the host, or on another mesh, or of another step."""
    return parts.reward.in_graph and one_mesh(parts) and not parts.experiment.steps_ahead


def one_mesh(parts: Parts) -> bool:
    """Whether rollouts are on the mesh of the update."""
    here, there = checks.meshes_of(parts.experiment)
    return there == here


def reward_rows(parts: Any, state: TrainState, rollout: Rollout, prompts: Prompts) -> tuple[Rewards, Any]:
    """What the rows earned, and the reward's next state."""
    rows = prompts_lib.repeat(prompts, parts.experiment.group_size)
    bound = models(parts, state)
    rewards, reward_state = parts.reward.update(state.reward, rollout, rows, parts.experiment.task, bound)
    return rewards.check(), reward_state


def bound(parts: Parts, states: dict[str, Array]) -> tuple[tuple[LossFn, ...], AdvantageFn]:
    """The losses and the advantage function, with knobs and memories as the state has them."""
    losses = tuple(controllers.bound(loss_fn, states) for loss_fn in parts.experiment.losses)
    return losses, controllers.bound(parts.experiment.advantage_fn, states)


def score(parts: Parts, prompt_columns: int, model: Transformer, params: Params, rollout: Rollout,
          **more: Any) -> Scores:  # fmt: skip
    """The learner's forward pass, at the sampler's temperature; the prompts' columns are not scored."""
    return scoring.score(model, params, rollout, first_column=prompt_columns, **_settings(parts.experiment), **more)


def _settings(experiment: Any) -> dict[str, Any]:
    """What every score of an experiment is made with."""
    return {"temperature": experiment.sampling.temperature, "chunk_columns": experiment.score_chunk_columns,
            "chunk_vocabulary": experiment.score_chunk_vocabulary}  # fmt: skip


def forward(parts: Any, prompts: Prompts) -> scoring.Forward:
    """The online loop's forward pass of rows of these prompts: prepare(model, params),
    score(model, params, rollout, *prepared), readable(rollout).
    """
    experiment, settings = parts.experiment, _settings(parts.experiment)
    return scoring.Forward(
        lambda model, params: experiment.forward.prepare(model, params, prompts),
        lambda model, params, rollout, *prepared, **more: experiment.forward.score(
            model, params, prompts, rollout, *prepared, **settings, **more),
        lambda rollout: experiment.forward.readable(prompts, rollout),
    )  # fmt: skip


def annotate(parts: Parts, state: TrainState, batch: Batch, score: ScoreFn) -> Batch:
    """Adds what models say of the rows before the update, as far as anything reads it."""
    current = lambda rollout: score(parts.model, lora.policy(state), rollout)  # noqa: E731
    if "Batch.old_log_probs" in parts.reads:
        batch = batch.replace(old_log_probs=parts.experiment.old_log_probs(batch.rollout, current))
    if "Batch.values" in parts.reads:
        batch = batch.replace(values=current(batch.rollout).values)
    if reads_reference(parts):
        tokens = parts.experiment.reference_tokens
        asked = {"top_tokens": tokens} if tokens else {"with_logits": True}
        asked = asked if reads_distribution(parts) else {}
        said = score(parts.reference_model, lora.reference(state), batch.rollout, **asked)
        batch = batch.replace(reference_log_probs=said.log_probs)
        if asked:
            batch = batch.replace(reference_distribution=said.top if tokens else every_token(said.logits))
    return jax.lax.stop_gradient(batch)


def asks_models(parts: Parts) -> bool:
    """Whether `annotate` runs a model."""
    recomputes = "Batch.old_log_probs" in parts.reads and not scoring.recorded(parts.experiment.old_log_probs)
    return recomputes or "Batch.values" in parts.reads or reads_reference(parts)


def reads_distribution(parts: Parts) -> bool:
    """Whether a loss compares whole distributions with the reference's."""
    return any(name.startswith("Batch.reference_distribution") for name in parts.reads)


def every_token(logits: Array) -> Distribution:
    """The log-probs of the whole vocabulary, in its order."""
    ids = jnp.broadcast_to(jnp.arange(logits.shape[-1]), logits.shape)
    return Distribution(ids, jax.nn.log_softmax(logits, axis=-1))


def models(parts: Parts, state: TrainState) -> Models:
    """Models bound to their weights, for rewards that ask them."""
    experiment = parts.experiment

    def asked(model: Any, params: Any, rollout: Rollout) -> Scores:  # of any rows: a judge's prompts have another width
        return scoring.score(model, params, rollout, **_settings(experiment))

    def generated(model: Any, params: Any, prompts: Prompts, key: Array, *, sampling: Sampling = experiment.sampling,
                  rollout_fn: RolloutFn = experiment.rollout_fn, group_size: int = 1) -> Rollout:  # fmt: skip
        return rollout_fn(model, params, prompts, key, vocabulary=experiment.task.vocabulary, sampling=sampling,
                          group_size=group_size, policy_version=state.step)  # fmt: skip

    def require_reference() -> None:
        if state.reference == ():
            raise Refused("a reward asks the reference beside a reward on the host, where it is kept only if a loss "
                          "reads it: add regularizers.kl_penalty, or keep to rewards in the graph")  # fmt: skip

    def reference(rollout: Rollout) -> Scores:
        require_reference()
        return asked(parts.reference_model, lora.reference(state), rollout)

    def generate_reference(prompts: Prompts, key: Array, **how: Any) -> Rollout:
        require_reference()
        return generated(parts.reference_model, lora.reference(state), prompts, key, **how)

    return Models(
        generate=functools.partial(generated, parts.model, lora.policy(state)),
        score=lambda rollout: asked(parts.model, lora.policy(state), rollout),
        reference=reference, generate_reference=generate_reference,
        reward_models=tuple(functools.partial(values_of, model, params)
                            for (_, model), params in zip(parts.reward_models, state.reward_models, strict=True)),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def values_of(model: Transformer, params: Params, rollout: Rollout) -> Array:
    """Scores.values [B,L] of a model, by a program in which no logits are made; one also where rewards are on the host.
    """
    return scoring.score(model, params, rollout).values


def abstract_rows(parts: Any) -> tuple[Prompts, Rollout, Rewards]:
    """Shapes and dtypes of `prompts_per_step` prompts, of the rows sampled for them, and of their rewards."""
    if parts.rows:
        return parts.rows
    experiment = parts.experiment
    weights = jnp.asarray(experiment.task.rates, jnp.float32)
    draw = lambda: prompts_lib.draw(experiment.task, jax.random.key(0), 0, experiment.prompts_per_step, weights)  # noqa: E731
    prompts = jax.eval_shape(draw) if experiment.task.in_graph else draw()
    sample = functools.partial(sample_rows, parts)
    given = (abstract_state(parts), prompts)
    with meshes.use(checks.meshes_of(experiment)[1]):  # a sampler may refuse what the mesh cannot split
        rollout = jax.eval_shape(lambda state, prompts: sample(state, prompts, state.key), *given)
    b, length = rollout.tokens.shape
    number = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    rewards = Rewards(tokens=number(b, length), outcome=number(b), scored=jax.ShapeDtypeStruct((b,), bool),
                      parts={name: number(b) for name in parts.reward.names})  # fmt: skip
    return prompts, rollout, rewards


def asked_of_models(parts: Any, prompts: Prompts, rollout: Rollout) -> set[str]:
    """What the reward asks of models that the state must keep for it: "TrainState.reference", or one of the
    reward models as "TrainState.reward_models[0]".
    """
    asked = set()

    def judge(state: TrainState, prompts: Prompts, rollout: Rollout) -> Rewards:
        bound_ = models(parts, state.replace(reference=state.params))

        def noted(name: str, answer: Callable, *given: Any, **how: Any) -> Any:
            asked.add(f"TrainState.{name}")
            return answer(*given, **how)

        bound_ = bound_._replace(
            reference=functools.partial(noted, "reference", bound_.score),
            generate_reference=functools.partial(noted, "reference", bound_.generate),
            reward_models=[functools.partial(noted, f"reward_models[{i}]", judge)
                           for i, judge in enumerate(bound_.reward_models)],
        )  # fmt: skip
        rows = prompts_lib.repeat(prompts, parts.experiment.group_size)
        update = parts.reward.update
        return update(state.reward, rollout, rows, parts.experiment.task, bound_)[0].check()

    if parts.reward.in_graph:
        jax.eval_shape(judge, abstract_state(parts), prompts, rollout)
    return asked
