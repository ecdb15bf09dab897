"""The work of an experiment's programs: operations, and passes through weights and caches, phase by phase."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mlrl.loops.states import Program, reads_reference
from mlrl.pods import flops
from mlrl.types import Array, Rollout, Scores


class Work(NamedTuple):
    """What one phase of a program asks of all chips together.

    flops            matrix products; see mlrl.pods.flops
    weight_passes    times that every weight is read
    cache_bytes      of keys and values that decoding reads
    optimizer_steps  times that parameters and optimizer state are read and written
    """

    flops: float
    weight_passes: float = 0.0
    cache_bytes: float = 0.0
    optimizer_steps: int = 0


Phases = dict[str, Work]


def runs(parts: Any, programs: Mapping[str, Program]) -> dict[str, int]:
    """How often a step (or a round) runs each program; a round's updates at most, if it selects every row."""
    experiment = parts.experiment
    if "step" in programs:  # the rollout alone is only rehearsed, to be timed
        return {"rollout": 0, "step": 1}
    if "annotate" not in programs:
        return dict.fromkeys(programs, 1)
    chunks = experiment.prompts_per_round // experiment.prompts_per_step
    rows = experiment.prompts_per_round * experiment.group_size
    return {"rollout": chunks, "annotate": chunks, "update": experiment.epochs * -(-rows // experiment.rows_per_step)}


def phases(parts: Any, programs: Mapping[str, Program]) -> dict[str, Phases]:
    """The phases of every program, by the names of the programs.

    What rewards in the graph ask of models is not counted, nor a second draw of prompts (Experiment.max_attempts). A
    rollout is counted as one turn: a prefill, and a completion of all the columns that its rows have.
    """
    found: dict[str, Phases] = {}
    if "rollout" in programs:
        program = programs["rollout"]
        prompts, rollout = program.arguments[1], jax.eval_shape(program.function, *program.arguments)
        found["rollout"] = sampled(parts, prompts.tokens.shape, rollout.tokens.shape)
        columns, first = rollout.tokens.shape[1], prompts.tokens.shape[1]
        rows = rollout.tokens.shape[0]
    else:
        rows, columns = programs["update"].arguments[1].rollout.tokens.shape
        first = 1
    annotate = {"annotate": annotated(parts, rows, columns, columns - first)}
    if "annotate" in programs:
        found["annotate"] = annotate
        rows = parts.experiment.rows_per_step
        return found | {"update": {"update": learned(parts, rows, columns, columns - first, minibatches=1, epochs=1)}}
    experiment = parts.experiment
    update = annotate | {"update": learned(parts, rows, columns, columns - first, minibatches=experiment.minibatches,
                                           epochs=experiment.epochs)}  # fmt: skip
    return found | ({"step": found["rollout"] | update} if "step" in programs else {"update": update})


def sampled(parts: Any, prompts: tuple[int, int], rows: tuple[int, int]) -> Phases:
    """Prefill of prompts [N,P] and decoding of rows [B,L]."""
    c, (n, width), (b, length) = parts.model.config, prompts, rows
    counted = flops.sampling(c, prompts=n, prompt_columns=width, rows=b, completion_columns=length - width)
    steps = length - width - 1
    cache = 2 * c.layers * b * length * c.kv_heads * c.head_width * jnp.dtype(c.dtype).itemsize
    return {"prefill": Work(counted["prefill"], 1), "decode": Work(counted["decode"], steps, float(steps * cache))}


def annotated(parts: Any, rows: int, columns: int, scored: int) -> Work:
    """What models say of the rows before the update: as many forward passes as anything reads."""
    c, size = parts.model.config, {"rows": rows, "columns": columns, "scored": scored}
    with_values = "Batch.values" in parts.reads
    passes = []
    if "Batch.old_log_probs" in parts.reads and _asks(parts, rows, columns):
        passes.append(flops.scoring(c, **size))
    elif with_values and not c.critic_layers:
        passes.append(flops.scoring(c, **size | {"scored": 0}))  # only for the values on it
    if with_values:
        passes.append(flops.values(c, **size))
    if reads_reference(parts):
        passes.append(flops.scoring(parts.reference_model.config, **size))
    return Work(sum(passes), len(passes))


def learned(parts: Any, rows: int, columns: int, scored: int, *, minibatches: int, epochs: int) -> Work:
    """All forward and backward passes, and the optimizer's steps."""
    experiment = parts.experiment
    counted = flops.learning(
        parts.model.config, rows=rows, columns=columns, scored=scored, with_values="Scores.values" in parts.reads,
        chunked=0 < experiment.score_chunk_columns < scored,
    )  # fmt: skip
    each = experiment.micro_batch_rows or rows // minibatches
    return Work(epochs * counted, 3.0 * epochs * (rows // each), 0.0, epochs * minibatches)


def _asks(parts: Any, rows: int, columns: int) -> bool:
    """Whether the experiment's old log-probs are another forward pass, and not the sampler's own."""
    asked = []

    def score(rollout: Rollout) -> Scores:
        asked.append(rollout)
        zeros = jnp.zeros(rollout.tokens.shape)
        return Scores(zeros, zeros, zeros)

    def call(rollout: Rollout) -> Array:
        return parts.experiment.old_log_probs(rollout, score)

    integer, number = (jax.ShapeDtypeStruct((rows, columns), dtype) for dtype in (jnp.int32, jnp.float32))
    yes, row = jax.ShapeDtypeStruct((rows, columns), bool), jax.ShapeDtypeStruct((rows,), jnp.int32)
    jax.eval_shape(call, Rollout(integer, yes, yes, number, integer, row, row, row, row))
    return bool(asked)
