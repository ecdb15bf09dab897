"""The sizes that an experiment learns with: its own, or those that its search finds by timing its update."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mlrl import chunks, meshes, processes
from mlrl.chunks import Sizes, Whole
from mlrl.loops.states import Program, random_state
from mlrl.types import Array, Batch, Prompts, Rewards, Rollout


def settled(parts: Any, folder: pathlib.Path, whole: Whole, updating: Callable[[Any], Program]) -> Any:
    """The parts with the micro-batch and chunk sizes that the run in `folder` has, or finds now.

    To be called on the mesh of the update.

    Args:
      updating: parts -> the program that annotates rows and learns from them; the state is its first argument, and the
        first, or all, of what it returns.
    """
    experiment = parts.experiment
    candidates = experiment.sizes.candidates(whole)
    if not candidates:
        return parts
    own = Sizes(**{name: getattr(experiment, name) for name in Sizes._fields})
    with_ = lambda sizes: dataclasses.replace(  # noqa: E731
        parts, experiment=dataclasses.replace(experiment, **sizes._asdict()))  # fmt: skip
    about = about_update(parts, candidates, whole, updating) | {"as set": own._asdict()}

    def measure() -> chunks.Choice:
        turn_of = lambda sizes: _turn(with_(sizes), updating(with_(sizes)), whole.unit_rows)  # noqa: E731
        return chunks.search(own, candidates, turn_of, experiment.sizes.turns)

    return with_(chunks.kept(folder, experiment.sizes, about, measure))


def about_update(parts: Any, candidates: chunks.Candidates, whole: Whole,
                 updating: Callable[[Any], Program]) -> dict[str, Any]:  # fmt: skip
    """What a choice of sizes holds for: the shapes and numbers that an update's time depends on, as JSON has them."""
    program = updating(parts)
    return {
        "candidates": candidates, "whole": whole._asdict(), "mesh": dict(program.mesh.shape),
        "arguments": [f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(program.arguments)],
        "model": _numbers(parts.model.config), "learns": _numbers(parts.experiment), "reads": sorted(parts.reads),
    }  # fmt: skip


def _numbers(noun: Any) -> dict[str, Any]:
    """The numbers, words and tuples of a dataclass, but those that leave its programs as they are."""
    named = {field.name: getattr(noun, field.name) for field in dataclasses.fields(noun)}
    passing = ("seed", "num_steps", "num_rounds", *Sizes._fields)
    plain = lambda x: isinstance(x, int | float | str) or (isinstance(x, tuple) and all(map(plain, x)))  # noqa: E731
    return {name: value for name, value in named.items() if plain(value) and name not in passing}


def _turn(parts: Any, program: Program, unit_rows: int) -> Callable[[], float]:
    """A function that learns once more from the same full rows and returns the seconds of the slowest process."""
    function, (_, *rows) = program.function, program.arguments
    vocabulary = parts.model.config.vocabulary_size
    held = [random_state(parts), full_rows(tuple(rows), unit_rows, vocabulary)]

    def turn() -> float:
        start = time.perf_counter()
        try:
            out = jax.block_until_ready(function(held[0], *held[1]))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            seconds = float("inf")
        else:
            seconds, held[0] = time.perf_counter() - start, out[0]
        seconds = max(processes.exchanged(seconds))
        if seconds == float("inf"):
            raise MemoryError
        return seconds

    turn()  # compiles
    return turn


def full_rows(rows: tuple[Any, ...], unit_rows: int, vocabulary: int) -> tuple[Any, ...]:
    """Rows of these shapes, none of them padded: what takes longest to learn from.

    Args:
      rows: shapes and dtypes of what a program takes besides the state: Prompts, Rollout, Rewards, Batch.
      unit_rows: rows of a group, where there are no prompts that say it.
    """
    prompts = next((x for x in rows if isinstance(x, Prompts)), None)
    count, width = prompts.tokens.shape if prompts else (0, 1)

    def tokens(group: Array, columns: int) -> Array:
        return (31 * group[:, None] + 17 * jnp.arange(columns)) % vocabulary

    def full(noun: Any) -> Any:
        blank = lambda x: jnp.zeros(x.shape, x.dtype)  # noqa: E731
        made = jax.tree.map(blank, noun)
        if isinstance(noun, Batch):
            rollout = full(noun.rollout)
            return made.replace(rollout=rollout, rewards=full(noun.rewards), mask=rollout.action_mask)
        if isinstance(noun, Prompts):
            return made.replace(tokens=tokens(jnp.arange(count), width), valid=jnp.ones_like(made.valid))
        if isinstance(noun, Rewards):
            return made.replace(scored=jnp.ones_like(made.scored))
        if isinstance(noun, Rollout):
            b, length = noun.tokens.shape
            group = jnp.arange(b) * count // b if count else jnp.arange(b) // unit_rows
            acts = jnp.broadcast_to(jnp.arange(length) >= width, (b, length))
            return made.replace(tokens=tokens(group, length), valid=jnp.ones_like(made.valid), action_mask=acts,
                                group=group, behavior_log_probs=jnp.where(acts, -1.0, 0.0))  # fmt: skip
        return made

    places = meshes.row_shardings(rows, jax.sharding.get_mesh())
    return jax.jit(lambda: tuple(map(full, rows)), out_shardings=places)()
