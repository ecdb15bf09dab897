"""Turns of mlrl and of bare JAX: decode, prefill, scoring, update, whole step, from the same weights.

    python -m benchmarks.cases SIDE CASE MODEL ROWS FOLDER MICRO_BATCH_ROWS DEVICES     as a worker; see peers.protocol
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import decode_baseline, step_baseline, update_baseline
from benchmarks.peers import protocol, shapes
from benchmarks.pods import blank
from benchmarks.weights import config_of
from mlrl import meshes, optimizers, runs, scoring
from mlrl.costs.work import of_step
from mlrl.generation import generate
from mlrl.loops import online, stages
from mlrl.loops.start import random_parameters
from mlrl.losses.policy import ppo_clip
from mlrl.models import pretrained
from mlrl.models.transformer import Transformer
from mlrl.refilled import refilled
from mlrl.rollouts.single_turn import single_turn
from mlrl.types import Params, Prompts, Task

Turn = Callable[[int], object]  # number -> what it computed, or nothing
# How mlrl is set where rows end early: gin/rollouts/refilled.gin, and micro-batches that are cut to their longest row.
SLOTS, BUCKETS = 64, (16, 32, 64, 128)


def bare(params: Params) -> dict:
    """The weights of an mlrl Transformer in the dict that the baselines read."""
    layers = [
        {
            "attention_norm": params[f"attention_norms_{i}"]["scale"],
            "qkv": params[f"attentions_{i}"]["qkv"]["kernel"],
            "out": params[f"attentions_{i}"]["out"]["kernel"],
            "mlp_norm": params[f"mlp_norms_{i}"]["scale"],
            "gate_up": params[f"mlps_{i}"]["gate_up"]["kernel"],
            "down": params[f"mlps_{i}"]["down"]["kernel"],
        }
        for i in range(sum(name.startswith("mlps_") for name in params))
    ]
    return {"embedding": params["embedding"]["embedding"], "norm": params["final_norm"]["scale"], "layers": layers}


def even(rollout, prompts):
    """The share of even ids among a row's tokens, as the other sides reward it."""
    return jnp.sum((rollout.tokens % 2 == 0) & rollout.action_mask, 1) / jnp.maximum(1, rollout.action_mask.sum(1))


def task(model: shapes.Model, rows: shapes.Rows) -> Task:
    """Prompts as `shapes.prompt_ids` has them, in the graph."""
    empty, span = blank.prompts(prompt_tokens=rows.prompt_tokens, ids=model.vocabulary), model.vocabulary - shapes.FIRST

    def at(source, index):
        row, column = index[:, None], jnp.arange(rows.prompt_tokens)
        tokens = shapes.FIRST + (31 * row + 13 * column + row * column) % span
        return Prompts(tokens.astype(jnp.int32), jnp.ones(tokens.shape, bool), source, index, {})

    return dataclasses.replace(empty, at=at)


def mesh_of(settings: shapes.Settings) -> Callable:
    """The first devices, which share the rows."""
    return functools.partial(meshes.mesh, devices=settings.devices)


def experiment(model: shapes.Model, rows: shapes.Rows, folder: str, settings: shapes.Settings) -> online.Experiment:
    """The online experiment whose steps and parts are timed; without a folder, from weights as they are initialized."""
    early = rows.ending > 0 and rows.count > SLOTS
    sampler = functools.partial(refilled, slots=SLOTS) if early else generate
    return online.Experiment(
        task=task(model, rows), reward_fn=even, losses=(ppo_clip,), num_steps=10**6, model=config_of(model),
        prompts_per_step=rows.prompts, group_size=rows.group, micro_batch_rows=settings.micro_batch_rows,
        mesh=mesh_of(settings),
        rollout_fn=functools.partial(single_turn, max_completion_tokens=rows.new_tokens, sampler=sampler),
        length_buckets=tuple(b for b in BUCKETS if b < rows.new_tokens) + (rows.new_tokens,) if early else (),
        optimizer=optimizers.adamw(learning_rate=shapes.LEARNING_RATE),
        start=pretrained.start(path=folder) if folder else random_parameters,
    )  # fmt: skip


def mlrl(case: str, model: shapes.Model, rows: shapes.Rows, folder: str, settings: shapes.Settings) -> Turn:
    """A turn of mlrl: the online loop's step, or the function that it calls for one of its parts."""
    parts = online.prepare(experiment(model, rows, folder, settings))
    if case == "step":
        return whole_steps(parts)
    compiled, draw = online.jitted(parts), online.prompt_source(parts)
    state, key = online.first_state(parts, compiled), jax.random.key(1)
    if case == "decode":
        return lambda number: compiled["rollout"](state.replace(step=jnp.int32(number)), draw(state, number))
    if case == "prefill":
        read = jax.jit(functools.partial(scoring.prefill, parts.model))
        every = lambda number: jax.tree.map(lambda x: jnp.repeat(x, rows.group, 0), draw(state, number))
        return lambda number: read(state.params, every(number))
    prompts = draw(state, 0)
    rollout = compiled["rollout"](state, prompts)
    if case == "scoring":
        score = jax.jit(functools.partial(stages.score, parts, rows.prompt_tokens, parts.model))
        return lambda number: score(state.params, rollout)
    rewards, _ = stages.reward_rows(parts, state, rollout, prompts)
    learn = jax.jit(functools.partial(online.learn, parts))
    return lambda number: learn(state.replace(key=jax.random.fold_in(key, number)), prompts, rollout, rewards)


def whole_steps(parts: online.Parts) -> Turn:
    """The loop's own step function; the state goes on from turn to turn."""
    run, compiled = runs.Run(tempfile.mkdtemp(), parts.experiment.recording), online.jitted(parts)
    draw, held = online.prompt_source(parts), [online.first_state(parts, compiled)]
    take = online.step_function(parts, run, compiled)

    def turn(number: int):
        state = held.pop()
        state, metrics, _ = take(state, draw(state, number))
        held.append(state)
        return state, metrics

    return turn


def baseline(case: str, model: shapes.Model, rows: shapes.Rows, folder: str, settings: shapes.Settings) -> Turn:
    """A turn of bare JAX."""
    weights = bare(pretrained.start(path=folder)(Transformer(config_of(model)), jax.random.key(0)))
    adam = optax.adam(shapes.LEARNING_RATE)
    by_rows = NamedSharding(mesh_of(settings)(), PartitionSpec("data"))
    given = lambda number: jax.device_put(jnp.asarray(shapes.prompt_ids(rows, model, number), jnp.int32), by_rows)
    every = lambda number: jnp.repeat(given(number), rows.group, axis=0)
    decode = jax.jit(functools.partial(decode_baseline.decode, new_tokens=rows.new_tokens, eos=shapes.EOS))
    if case == "step":
        step = jax.jit(functools.partial(
            step_baseline.step, group=rows.group, new_tokens=rows.new_tokens, eos=shapes.EOS, optimizer=adam,
            micro_batch_rows=settings.micro_batch_rows))  # fmt: skip
        held = [(weights, adam.init(weights))]

        def turn(number: int):
            *kept, loss, lengths = step(*held.pop(), given(number), jax.random.key(number))
            held.append(tuple(kept))
            return kept, loss, lengths

        return turn
    if case == "decode":
        return lambda number: decode(weights, every(number), jax.random.key(number))
    if case == "prefill":
        read = jax.jit(functools.partial(decode_baseline.prefill, new_tokens=0))
        return lambda number: read(weights, every(number))
    tokens = jnp.concatenate([every(0), decode(weights, every(0), jax.random.key(0))], axis=1)
    if case == "scoring":
        score = jax.jit(functools.partial(update_baseline.log_probs, prompt_tokens=rows.prompt_tokens))
        return lambda number: score(weights, tokens)
    advantages = jax.random.normal(jax.random.key(1), (rows.count, rows.new_tokens))
    step = jax.jit(functools.partial(update_baseline.step, optimizer=adam, prompt_tokens=rows.prompt_tokens,
                                     micro_batch_rows=settings.micro_batch_rows))  # fmt: skip
    first = adam.init(weights)
    return lambda number: step(weights, first, tokens, None, advantages)


SIDES = {"mlrl": mlrl, "bare JAX": baseline}


def step_flops(model: shapes.Model, rows: shapes.Rows, folder: str, settings: shapes.Settings) -> float:
    """The matrix products of mlrl's whole step by formula (mlrl.costs), of rows that all go on to their last column."""
    parts = online.prepare(experiment(model, rows, folder, settings))
    cost = of_step(parts, online.programs(parts))
    return cost.flops + cost.decode_flops


def main(side: str, case: str, model: str, rows: str, folder: str, micro_batch_rows: str, devices: str) -> None:
    turns = protocol.Turns()
    settings = shapes.Settings(int(micro_batch_rows), int(devices))
    given = (shapes.MODELS[model], shapes.ROWS[rows], str(pathlib.Path(folder)), settings)
    with meshes.use(mesh_of(settings)()):
        turn, about = SIDES[side](case, *given), {"jax": jax.__version__}
        if (side, case) == ("mlrl", "step") and not shapes.ROWS[rows].ending:
            about["flops"] = step_flops(*given)

        def work(number: int) -> None:
            jax.block_until_ready(turn(number))

        work(0)  # and `serve` once more: the first state may be placed otherwise than those that steps return
        turns.serve(work, **about)


if __name__ == "__main__":
    main(*sys.argv[1:])
