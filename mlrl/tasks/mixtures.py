"""Mixtures: several tasks as the sources of one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlrl.types import Array, Candidates, Prompts, Refused, Task, no_candidates


def mixture(tasks: Sequence[Task], rates: Sequence[float] = (), *, name: str = "") -> Task:
    """One task with the sources of several, which must share a vocabulary.

    Prompts and targets are padded to the widest; the examples have the keys of all, with zeros where a source lacks
    one. In the graph if all its parts are: then every part is computed for every row, and the rows' own is selected.

    Args:
      tasks: the parts. A part with several sources keeps them, and its rate is split by its own rates.
      rates: one per part, in any scale; () samples all parts alike.
      name: in the logs; by default the parts' names, joined.
    Raises: Refused, if vocabularies differ, names repeat, rates do not fit, or an example is not a dict of arrays.
    """
    tasks, name = tuple(tasks), name or "_and_".join(task.name for task in tasks)
    shares = _shares(tasks, rates, name)
    sources = [source for task in tasks for source in task.sources]
    twice = next((s for s in sources if sources.count(s) > 1), None)
    if twice is not None:
        raise Refused(f"mixture {name}: two sources are called {twice!r}: give one of the tasks another name")
    different = next((task for task in tasks if task.vocabulary != tasks[0].vocabulary), None)
    if different is not None:
        raise Refused(f"mixture {name}: {tasks[0].name} and {different.name} must have the same vocabulary")
    if len(tasks) == 1:
        return tasks[0] if name == tasks[0].name else dataclasses.replace(tasks[0], name=name)
    in_graph = all(task.in_graph for task in tasks)
    part_of = np.repeat(np.arange(len(tasks), dtype=np.int32), [len(task.sources) for task in tasks])
    within = np.concatenate([np.arange(len(task.sources), dtype=np.int32) for task in tasks])
    sizes = np.concatenate([task.sizes for task in tasks]).astype(np.int32)
    pad_id = tasks[0].vocabulary.pad_id
    rows = [_one_row(task) for task in tasks]
    prompt_width = max(prompts.tokens.shape[1] for prompts, _ in rows)
    target_width = max(tokens.shape[1] for _, (tokens, _) in rows)
    leaves = _union([_leaves(prompts.example, task, name) for task, (prompts, _) in zip(tasks, rows)], name)
    select = _select_all if in_graph else _select_own

    def at(source: Array, index: Array) -> Prompts:
        def part(task: Task, own_source: Array, own_index: Array) -> dict[str, Array]:
            found = task.at(own_source, own_index)
            return _row(found.tokens, found.valid, prompt_width, pad_id, left=True) | {
                f"example/{key}": _widened(found.example.get(key), shape, dtype, len(own_index))
                for key, (shape, dtype) in leaves.items()
            }

        rows = select(tasks, part, part_of, within, sizes, source, index)
        example = {key: rows[f"example/{key}"] for key in leaves}
        return Prompts(rows["tokens"], rows["valid"], source, index, example)

    def targets(source: Array, index: Array) -> tuple[Array, Array]:
        def part(task: Task, own_source: Array, own_index: Array) -> dict[str, Array]:
            return _row(*task.targets(own_source, own_index), target_width, pad_id, left=False)

        rows = select(tasks, part, part_of, within, sizes, source, index)
        return rows["tokens"], rows["valid"]

    if in_graph:
        at, targets = jax.jit(at), jax.jit(targets)
    return Task(
        name=name,
        sources=tuple(sources),
        sizes=tuple(int(size) for size in sizes),
        rates=shares,
        vocabulary=tasks[0].vocabulary,
        at=at,
        targets=targets,
        example=lambda source, index: tasks[part_of[source]].example(int(within[source]), index),
        in_graph=in_graph,
        candidates=_candidates(tasks, functools.partial(select, tasks), part_of, within, sizes, name, in_graph),
    )


def _candidates(tasks, select, part_of, within, sizes, name, in_graph) -> Callable[[Array, Array], Candidates]:
    """The parts' candidates, padded to the most and the longest; it refuses if only some parts have any."""
    without = [task.name for task in tasks if task.candidates is no_candidates]
    if len(without) == len(tasks):
        return no_candidates
    if without:

        def refuse(source: Array, index: Array) -> Candidates:
            raise Refused(f"mixture {name}: {without[0]} has no stored completions, and the others have: give it some, "
                          "or leave it out")  # fmt: skip

        return refuse
    row = np.zeros(1, np.int32)
    shapes = [(jax.eval_shape(t.candidates, row, row) if t.in_graph else t.candidates(row, row)).labels.shape[1:]
              for t in tasks]  # fmt: skip
    most, width = (max(sizes_) for sizes_ in zip(*shapes))
    fill = {"tokens": tasks[0].vocabulary.pad_id, "valid": False, "outcome": np.nan, "labels": np.nan}

    def part(task: Task, own_source: Array, own_index: Array) -> dict[str, Array]:
        found = task.candidates(own_source, own_index)
        xp = np if isinstance(found.tokens, np.ndarray) else jnp
        each, long = found.labels.shape[1:]
        pads = ((0, 0), (0, most - each), (0, width - long))
        return {field: xp.pad(leaf, pads[: leaf.ndim], constant_values=fill[field])
                for field, leaf in found._asdict().items()}  # fmt: skip

    def candidates(source: Array, index: Array) -> Candidates:
        return Candidates(**select(part, part_of, within, sizes, source, index))

    return jax.jit(candidates) if in_graph else candidates


def _select_all(tasks, part, part_of, within, sizes, source, index) -> dict[str, Array]:
    """Every part for every row, in the graph; a row takes its own."""
    which, own = jnp.asarray(part_of)[source], jnp.asarray(within)[source]
    result: dict[str, Array] = {}
    for k, task in enumerate(tasks):
        own_source = jnp.where(which == k, own, 0)
        own_index = jnp.where(which == k, index, 0)
        for name, leaf in part(task, own_source, own_index).items():
            mine = (which == k).reshape((-1,) + (1,) * (leaf.ndim - 1))
            result[name] = jnp.where(mine, leaf, result[name]) if name in result else leaf
    return result


def _select_own(tasks, part, part_of, within, sizes, source, index) -> dict[str, np.ndarray]:
    """Every part for its own rows, with numpy."""
    source, index = np.asarray(source), np.asarray(index)
    result: dict[str, np.ndarray] = {}
    for k, task in enumerate(tasks):
        mine = np.flatnonzero(part_of[source] == k)
        if not len(mine):
            continue
        for name, leaf in part(task, within[source[mine]], index[mine]).items():
            leaf = np.asarray(leaf)
            result.setdefault(name, np.zeros((len(source), *leaf.shape[1:]), leaf.dtype))[mine] = leaf
    return result


def _one_row(task: Task) -> tuple[Prompts, tuple[Array, Array]]:
    """Shapes of one row of a task; of a task in the graph, without computing it."""
    row = np.zeros(1, np.int32)
    run = lambda: (task.at(row, row), task.targets(row, row))  # noqa: E731
    return jax.eval_shape(run) if task.in_graph else run()


def _row(tokens: Array, valid: Array, width: int, pad_id: int, *, left: bool) -> dict[str, Array]:
    """Tokens and their validity, padded to a common width."""
    missing = width - tokens.shape[1]
    pads = ((0, 0), (missing, 0) if left else (0, missing))
    xp = np if isinstance(tokens, np.ndarray) else jnp
    return {"tokens": xp.pad(tokens, pads, constant_values=pad_id), "valid": xp.pad(valid, pads)}


def _widened(leaf: Array | None, shape: tuple[int, ...], dtype: Any, rows: int) -> Array:
    """A leaf of an example, padded with zeros at the end of every axis; all zeros if the source lacks it."""
    if leaf is None:
        return np.zeros((rows, *shape), dtype)
    xp = np if isinstance(leaf, np.ndarray) else jnp
    return xp.pad(leaf, ((0, 0), *((0, want - got) for want, got in zip(shape, leaf.shape[1:]))))


def _leaves(example: Any, task: Task, name: str) -> dict[str, Array]:
    if not isinstance(example, Mapping) or not all(hasattr(leaf, "shape") for leaf in example.values()):
        raise Refused(f"mixture {name}: Prompts.example of {task.name} must be a flat dict of arrays")
    return dict(example)


def _union(examples: Sequence[Mapping[str, Array]], name: str) -> dict[str, tuple[tuple[int, ...], Any]]:
    """{key: (shape without rows, dtype)} that holds every source's examples."""
    found: dict[str, tuple[tuple[int, ...], Any]] = {}
    for example in examples:
        for key, leaf in example.items():
            shape, dtype = found.get(key, (leaf.shape[1:], leaf.dtype))
            if len(shape) != leaf.ndim - 1 or dtype != leaf.dtype:
                raise Refused(f"mixture {name}: example[{key!r}] has another rank or dtype in another source")
            found[key] = (tuple(max(a, b) for a, b in zip(shape, leaf.shape[1:])), dtype)
    return found


def _shares(tasks: Sequence[Task], rates: Sequence[float], name: str) -> tuple[float, ...]:
    """Sampling weights of all sources, summing to 1."""
    if not tasks:
        raise Refused("a mixture needs at least one task")
    values = np.asarray(rates or [1.0] * len(tasks), np.float64)
    if values.shape != (len(tasks),):
        raise Refused(f"mixture {name} has {len(tasks)} tasks, but {values.size} rates: give one for each")
    if not np.isfinite(values).all() or (values < 0).any() or values.sum() == 0:
        raise Refused(f"mixture {name}: rates must be finite, not negative and not all zero, got {list(rates)}")
    return tuple(float(r * own) for r, task in zip(values / values.sum(), tasks) for own in task.rates)
