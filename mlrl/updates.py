"""The update: minibatches, epochs and micro-batches with exact global denominators."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.interpreters import partial_eval

from mlrl import home_rows, meshes, reductions
from mlrl.models.lora import join
from mlrl.optimizers import current_learning_rate
from mlrl.types import (
    Array,
    Batch,
    LossFn,
    Metrics,
    Params,
    ReductionFn,
    Refused,
    Scores,
    TrainState,
    require_whole,
)

ScoreFn = Callable[..., Scores]  # (params, rollout, *prepared) -> Scores


def computed_alone(function: Callable[[], Array]) -> Array:
    """The value of one array that `function` returns, computing only what it depends on and compiling next to nothing.
    """
    closed = jax.make_jaxpr(function)()
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True])
    consts = dict(zip(closed.jaxpr.constvars, closed.consts))
    (value,) = jax.core.eval_jaxpr(jaxpr, [consts[v] for v in jaxpr.constvars])
    return value


def fields_read(function: Callable, *args: Any) -> set[str]:
    """Which array fields of `args` (dataclasses) the outputs of `function` depend on, as "Batch.advantages".

    Found by dead-code elimination on the traced function, so nothing needs to declare what it reads: a loss whose
    coefficient is 0.0 reads nothing, and what nobody reads is never computed. Nothing is compiled or run.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(args)
    flat = lambda *xs: jax.tree.leaves(function(*jax.tree.unflatten(structure, xs)))  # noqa: E731
    jaxpr = jax.make_jaxpr(flat)(*[leaf for _, leaf in leaves]).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    name = lambda path: type(args[path[0].idx]).__name__ + jax.tree_util.keystr(path[1:])  # noqa: E731
    return {name(path) for (path, _), is_used in zip(leaves, used) if is_used}


def nothing(params: Params) -> tuple[()]:
    """Nothing is prepared."""
    del params
    return ()


def total_loss(losses: Sequence[LossFn], scores: Scores, batch: Batch) -> tuple[Array, Metrics]:
    """The sum of the losses, and their metrics together."""
    total, metrics = jnp.float32(0.0), {}
    for loss_fn in losses:
        value, more = loss_fn(scores, batch)
        total, metrics = total + value, metrics | more
    return total, metrics


def gradients(params: Params, batch: Batch, *, score_fn: ScoreFn, losses: Sequence[LossFn],
              prepare: Callable[[Params], tuple] = nothing, micro_batch_rows: int = 0,
              bucket_columns: Sequence[int] = (), unit_rows: int = 1) -> tuple[Params, Metrics]:  # fmt: skip
    """Gradient of the loss over a minibatch, accumulated over micro-batches.

    Losses and metrics are plain sums of weighted terms, and the weights were made over the whole minibatch; so the
    sum over micro-batches *is* the minibatch's value, whatever their number and the order of the rows. fp32
    accumulation.

    Args:
      batch: rows of one minibatch, with weights.
      score_fn: (params, rollout, *prepare(params)) -> Scores.
      prepare: done once for all micro-batches, and differentiated once, at the sum of their gradients.
      micro_batch_rows: rows of a forward and backward pass; 0: all of them.
      bucket_columns: the widths to which rows may be cut, ascending; the last is at least L. With micro-batches, rows
        are sorted by length, and each micro-batch is cut to the least width that holds it. (): never cut.
      unit_rows: consecutive rows that stay together; see `update`.
    """

    def loss(params: Params, prepared: tuple, rows: Batch) -> tuple[Array, Metrics]:
        scores = score_fn(params, rows.rollout, *prepared).check()
        value, metrics = total_loss(losses, scores, rows)
        entropy = jnp.sum(rows.token_weights * jnp.where(rows.mask, jax.lax.stop_gradient(scores.entropy), 0.0))
        # A loss may lose a NaN on its way: compiled for a CPU, PPO's clipped ratio did.
        shown = jnp.where(jnp.isfinite(entropy), value, jnp.nan)
        return value, metrics | {"loss": shown, "entropy": entropy}

    prepared, back_to_params = jax.vjp(prepare, params)
    both = lambda grads: jax.tree.map(jnp.add, grads[0], *back_to_params(grads[1]))  # noqa: E731
    grad_fn = jax.grad(loss, argnums=(0, 1), has_aux=True)
    grad_fn = in_buckets(functools.partial(grad_fn, params, prepared), bucket_columns)
    rows = batch.mask.shape[0]
    if micro_batch_rows in (0, rows):
        grads, metrics = grad_fn(batch)
        return both(grads), metrics
    # A micro-batch takes as many rows from each device: they stay where they are, and where their prompts are read.
    parts = home_rows.parts_of(micro_batch_rows)
    parts = parts if (micro_batch_rows // parts) % unit_rows == 0 else 1
    if len(bucket_columns) > 1:
        longest = jnp.max(columns_needed(batch).reshape(parts, -1, unit_rows), axis=2)
        batch = _in_order(batch, jnp.argsort(longest), unit_rows)
    pieces = _split(batch, rows // micro_batch_rows, parts)
    shape = jax.eval_shape(grad_fn, jax.tree.map(lambda x: x[0], pieces))

    def add(total: Any, piece: Batch) -> tuple[Any, None]:
        grads, metrics = jax.tree.map(jnp.add, total, grad_fn(meshes.split_rows(piece)))
        # Without this each device may sum the gradients of the whole model.
        return ((meshes.split_parameters(grads[0]), grads[1]), metrics), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
    grads, metrics = jax.lax.scan(add, zeros, pieces)[0]
    return both(grads), metrics


def columns_needed(batch: Batch) -> Array:
    """One more than the last column of a row that holds a token, [B] int32."""
    valid = batch.rollout.valid
    return jnp.max(jnp.where(valid, jnp.arange(1, valid.shape[1] + 1), 0), axis=1)


def in_buckets(function: Callable[[Batch], Any], bucket_columns: Sequence[int]) -> Callable[[Batch], Any]:
    """`function` of the rows cut on the right to the least of `bucket_columns` that holds all their tokens.

    One program for each width, of which one runs (`lax.switch`): shapes stay static. What is cut off is padding, so the
    result is the same to rounding.
    """
    if len(bucket_columns) < 2:
        return function

    def cut(batch: Batch, columns: int) -> Batch:
        return jax.tree.map(lambda x: x[:, :columns] if x.ndim > 1 else x, batch)

    def call(batch: Batch) -> Any:
        bucket = jnp.searchsorted(jnp.asarray(bucket_columns), jnp.max(columns_needed(batch)))
        branches = [lambda rows, columns=columns: function(cut(rows, columns)) for columns in bucket_columns]
        return jax.lax.switch(bucket, branches, batch)

    return call


def update(
    state: TrainState,
    batch: Batch,
    key: Array,
    *,
    score_fn: ScoreFn,
    losses: Sequence[LossFn],
    reduction: ReductionFn,
    optimizer: optax.GradientTransformation,
    minibatches: int = 1,
    epochs: int = 1,
    prepare: Callable[[Params], tuple] = nothing,
    micro_batch_rows: int = 0,
    bucket_columns: Sequence[int] = (),
    unit_rows: int = 1,
) -> tuple[TrainState, Metrics]:
    """`epochs` passes over the batch in `minibatches` optimizer steps each.

    Rows are shuffled once an epoch, unless there is one minibatch. A step whose loss or gradient is not finite is
    skipped: parameters and optimizer stay, `bad_updates` counts up; a good step sets it to 0.

    Args:
      batch: B rows; `mask` is final, `weights` and `token_weights` are made here, over each whole minibatch.
      key: for the shuffles.
      score_fn: (params, rollout, *prepare(params)) -> Scores, the learner's forward pass; its params are the trained
        ones together with those in state.frozen, of which no gradient is taken.
      prepare, micro_batch_rows, bucket_columns: see `gradients`.
      unit_rows: consecutive rows that stay together in every shuffle and split: the rows of a group, for a loss that
        compares them; 1 for any other.
    Returns: the state after the last optimizer step, and metrics averaged over the optimizer steps.
    Raises: Refused when the rows do not divide.
    """
    rows = batch.check().mask.shape[0]
    check_division(rows, minibatches, micro_batch_rows, unit_rows)
    frozen, state = state.frozen, state.replace(frozen=())  # what never changes is not carried from step to step
    score_whole = lambda params, *more: score_fn(join(frozen, params), *more)  # noqa: E731
    prepare_whole = lambda params: prepare(join(frozen, params))  # noqa: E731

    def optimizer_step(state: TrainState, rows: Batch) -> tuple[TrainState, Metrics]:
        rows = meshes.split_rows(rows)
        rows = rows.replace(weights=reduction(rows.mask), token_weights=reductions.token_mean(rows.mask))
        grads, metrics = gradients(state.params, rows, score_fn=score_whole, losses=losses, prepare=prepare_whole,
                                   micro_batch_rows=micro_batch_rows, bucket_columns=bucket_columns,
                                   unit_rows=unit_rows)  # fmt: skip
        return apply_gradients(state, grads, metrics, optimizer)

    def epoch(state: TrainState, key: Array) -> tuple[TrainState, Metrics]:
        if minibatches == 1:
            state, metrics = optimizer_step(state, batch)
            return state, jax.tree.map(lambda x: x[None], metrics)
        shuffled = _in_order(batch, jax.random.permutation(key, rows // unit_rows)[None], unit_rows)
        return jax.lax.scan(optimizer_step, state, _split(shuffled, minibatches))

    if epochs == 1:
        state, metrics = epoch(state, key)
    else:
        state, metrics = jax.lax.scan(epoch, state, jax.random.split(key, epochs))
    metrics = jax.tree.map(jnp.mean, metrics)
    return state.replace(frozen=frozen), metrics | {"lr": current_learning_rate(state.opt_state)}


def apply_gradients(state: TrainState, grads: Params, metrics: Metrics,
                    optimizer: optax.GradientTransformation) -> tuple[TrainState, Metrics]:  # fmt: skip
    """One optimizer step, or none at all if the loss or a gradient is NaN or infinite."""
    grads = meshes.split_parameters(grads)  # as the parameters, so that each device sums and keeps only its part
    norm = optax.global_norm(grads)
    good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    steps, opt_state = optimizer.update(grads, state.opt_state, state.params)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)  # noqa: E731
    state = state.replace(
        params=keep(optax.apply_updates(state.params, steps), state.params),
        opt_state=keep(opt_state, state.opt_state),
        bad_updates=jnp.where(good, 0, state.bad_updates + 1),
    )
    state = meshes.split_state(state)
    return state, metrics | {"grad_norm": norm, "skipped_updates": 1.0 - good.astype(jnp.float32)}


def check_division(rows: int, minibatches: int, micro_batch_rows: int, unit_rows: int = 1) -> None:
    """Raises Refused, in words, when rows do not divide into minibatches, these into micro-batches, or all in groups.
    """
    require_whole("Experiment", "micro_batch_rows", micro_batch_rows, 0)
    if rows % minibatches:
        raise Refused(f"{rows} rows do not divide into minibatches = {minibatches}: take {_divisors(rows)}")
    if micro_batch_rows and (rows // minibatches) % micro_batch_rows:
        raise Refused(
            f"a minibatch of {rows // minibatches} rows does not divide into micro_batch_rows = {micro_batch_rows}: "
            f"take {_divisors(rows // minibatches)}"
        )
    for name, count in (("minibatch", rows // minibatches), ("micro-batch", micro_batch_rows)):
        if count % unit_rows:
            raise Refused(f"a loss compares the {unit_rows} rows of a group, and a {name} of {count} rows does not "
                          f"hold whole groups: change minibatches or micro_batch_rows to get a multiple of {unit_rows}")


def _divisors(rows: int) -> str:
    numbers = [str(n) for n in range(1, rows + 1) if rows % n == 0]
    return f"{', '.join(numbers[:-1])} or {numbers[-1]}" if len(numbers) > 1 else numbers[0]


def _in_order(batch: Batch, units: Array, unit_rows: int) -> Batch:
    """The batch with the units of consecutive rows of each of its parts in another order; units [parts, *] int32."""
    order = (units[..., None] * unit_rows + jnp.arange(unit_rows)).reshape(units.shape[0], -1)
    return jax.tree.map(lambda x: home_rows.take_own(x, order), batch)


def _split(tree: Any, pieces: int, parts: int = 1) -> Any:
    """Leaves [pieces, rows, ...]; a piece has the next rows of each of the `parts` into which rows are divided."""

    def split(x: Array) -> Array:
        each = x.shape[0] // (parts * pieces)
        x = jnp.moveaxis(x.reshape(parts, pieces, each, *x.shape[1:]), 0, 1)
        return x.reshape(pieces, parts * each, *x.shape[3:])

    return jax.tree.map(split, tree)
