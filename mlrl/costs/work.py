"""The work of an experiment's programs: products, and passes through weights and caches, phase by phase."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mlrl import meshes
from mlrl.costs.flops import Products, products
from mlrl.models.transformer import CRITIC, cache_bytes
from mlrl.types import Prompts


class Work(NamedTuple):
    """What one phase of a program asks of all chips together.

    flops            matrix products; see mlrl.costs.flops
    weight_passes    times that every weight is read, at least
    cache_bytes      of keys and values that decoding reads
    optimizer_steps  times that parameters and optimizer state are read and written
    """

    flops: float
    weight_passes: float = 0.0
    cache_bytes: float = 0.0
    optimizer_steps: int = 0


Phases = dict[str, Work]
EVALUATION = "evaluation"  # what the names of programs that only measure begin with


class Cost(NamedTuple):
    """What a step asks of all devices together.

    flops         matrix products that are made whatever rows say
    decode_flops  those of decoding, if every row went on to its last column
    decode_turns  turns of decoding, if every row did
    devices       how many they are
    decode_bytes  of weights and caches that decoding reads, if every row went on to its last column; 0: not known
    rollout_devices  how many decode
    """

    flops: float
    decode_flops: float = 0.0
    decode_turns: int = 0
    devices: int = 1
    decode_bytes: float = 0.0
    rollout_devices: int = 1


def of_step(parts: Any, programs: Mapping[str, Any]) -> Cost:
    """The cost of a step, of the loop's `programs`, which are traced for it."""
    counts, total = runs(parts, programs), Cost(0.0)
    for name, program in programs.items():
        if counts[name]:
            with meshes.use(program.mesh):
                found = products(program.function.trace(*program.arguments).jaxpr)
            total = Cost(total.flops + counts[name] * found.outside, total.decode_flops + counts[name] * found.inside,
                         total.decode_turns + found.turns)  # fmt: skip
    devices = len({device for one in programs.values() for device in one.mesh.devices.flat})
    read, rollout_devices = _decoding(parts, programs, total.decode_turns)
    return total._replace(devices=devices, decode_bytes=read, rollout_devices=rollout_devices)


def _decoding(parts: Any, programs: Mapping[str, Any], turns: int) -> tuple[float, int]:
    """Bytes that decoding reads on all devices together, and how many these are:

        turns * (weights * copies + caches)

    weights are those of the policy in the dtype of products, without an embedding that is not also the head; every
    device that splits rows, and not weights, reads a copy. Caches are those of all rows, at their full length: where
    they grow it is too much. 0.0 where the formula does not hold, as in slots, in turns, or a step ahead.
    """
    if "rollout" not in programs or parts.experiment.steps_ahead or parts.experiment.max_attempts > 1:
        return 0.0, 1
    program, config = programs["rollout"], parts.model.config
    state, prompts, *_ = program.arguments
    with meshes.use(program.mesh):
        rows, columns = jax.eval_shape(program.function, *program.arguments).tokens.shape
    if turns != columns - prompts.tokens.shape[1] - 1:
        return 0.0, 1
    unread = {*CRITIC, *(() if config.tied_head else ("embedding",))}
    kernels = jax.tree.leaves([{k: v for k, v in tree.items() if k not in unread}
                               for tree in (state.params, state.frozen) if tree])  # fmt: skip
    weights = sum(x.size * min(x.dtype.itemsize, jnp.dtype(config.dtype).itemsize) for x in kernels)
    caches = cache_bytes(config, rows, columns)
    return float(turns * (weights * meshes.row_shards(program.mesh) + caches)), program.mesh.size


def runs(parts: Any, programs: Iterable[str]) -> dict[str, int]:
    """How often a step (or a round) runs each program; a round's updates at most, if it selects every row."""
    experiment = parts.experiment
    if "step" in programs:  # the rollout alone is only rehearsed, to be timed
        return {"rollout": 0, "step": 1}
    if not hasattr(experiment, "num_rounds"):
        return dict.fromkeys(programs, 1)
    chunks = experiment.prompts_per_round // experiment.prompts_per_step
    rows = experiment.prompts_per_round * experiment.group_size
    return {"rollout": chunks, "annotate": chunks, "update": experiment.epochs * -(-rows // experiment.rows_per_step)}


def phases(parts: Any, name: str, products: Products, arguments: tuple[Any, ...]) -> Phases:
    """The phases of the program `name`: "decode", which are its loops that may end early, and the rest.

    A turn of decoding passes through the weights and through the keys and values of every row, to the rows' full
    length; a rollout passes through the weights once before (the prefill), and an update three times a micro-batch.
    """
    found: Phases = {}
    measures = name.startswith(EVALUATION)
    passes, steps = (1, 0) if measures or name in ("rollout", "annotate") else _of_update(parts, name)
    rest = "prefill" if measures else {"rollout": "prefill", "step": "the rest"}.get(name, name)
    found[rest] = Work(products.outside, passes, 0.0, steps)
    if products.turns and isinstance(arguments[1], Prompts):
        n, width = arguments[1].tokens.shape
        rows, columns = n * (1 if measures else parts.experiment.group_size), width + products.turns + 1
        caches = cache_bytes(parts.model.config, rows, columns)
        found["decode"] = Work(products.inside, products.turns, float(products.turns * caches))
    return found


def _of_update(parts: Any, name: str) -> tuple[float, int]:
    """Passes through the weights, and the optimizer's steps, of a program that learns."""
    experiment = parts.experiment
    rounds = hasattr(experiment, "num_rounds")  # whose programs learn from one minibatch
    minibatches, epochs = (1, 1) if rounds else (experiment.minibatches, experiment.epochs)
    rows = getattr(experiment, "rows_per_step", 0) or experiment.prompts_per_step * experiment.group_size
    each = experiment.micro_batch_rows or rows // minibatches
    return 3.0 * epochs * (rows // each) + (name == "step"), epochs * minibatches
