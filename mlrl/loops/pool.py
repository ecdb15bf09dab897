"""The pool of a round: the rows sampled in it, on the host, and the batches of fixed shape that are drawn from it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mlrl import meshes, metrics, processes, runs
from mlrl import prompts as prompts_lib
from mlrl.batches import unannotated
from mlrl.loops import stages
from mlrl.types import Array, Batch, Metrics, Prompts, Rewards, Rollout, TrainState


class Collector(NamedTuple):
    """What asks the policy, in chunks of prompts.

    collect(state) -> the prompts and rows of its round, on the host, and the reward's next state
    explore(state) -> other rows for the prompts of the round's first chunk, on the host; nothing remembers them
    """

    collect: Callable[[TrainState], tuple[Prompts, Batch, Any]]
    explore: Callable[[TrainState], Batch]


def collector(parts: Any, run: runs.Run, compiled: dict[str, Callable]) -> Collector:
    """Binds the programs of a round.

    Args:
      compiled: `sample_chunk` as "rollout" and `annotate_chunk` as "annotate", jitted.
    """
    experiment = parts.experiment
    chunks = experiment.prompts_per_round // experiment.prompts_per_step
    in_graph = lambda function, inside=True: jax.jit(function) if inside else function  # noqa: E731
    draw = in_graph(functools.partial(draw_chunk, parts), experiment.task.in_graph)
    judge = in_graph(functools.partial(stages.reward_rows, parts), parts.reward.in_graph)
    sample, annotate = compiled["rollout"], compiled["annotate"]

    def ask(state: TrainState, chunk: int, key_number: int) -> tuple[Prompts, Batch, Any]:
        prompts = draw(state, int(state.step) * chunks + chunk).check()
        prompts = prompts if experiment.task.in_graph else meshes.rows_from_host(prompts)
        with run.phase("rollout"):
            rollout = jax.block_until_ready(sample(state, prompts, key_number))
        with run.phase("reward"):
            given = (rollout, prompts) if parts.reward.in_graph else processes.on_host((rollout, prompts))
            rewards, reward_state = judge(state, *given)
            state = state.replace(reward=reward_state)
        with run.phase("annotate"):
            rows = processes.on_host(annotate(state, prompts, rollout, meshes.rows_from_host(rewards)))
        return processes.on_host(prompts), rows, reward_state

    def collect(state: TrainState) -> tuple[Prompts, Batch, Any]:
        asked, answered = [], []
        for chunk in range(chunks):
            prompts, rows, reward_state = ask(state, chunk, chunk)
            state = state.replace(reward=reward_state)
            asked.append(prompts)
            answered.append(rows)
        return stacked(asked), joined(answered), state.reward

    return Collector(collect, lambda state: ask(state, 0, chunks)[1])


def draw_chunk(parts: Any, state: TrainState, chunk: Array | int) -> Prompts:
    """The prompts of a chunk; chunks are counted over the whole run."""
    experiment = parts.experiment
    weights = experiment.curriculum.weights(state.curriculum)
    return prompts_lib.draw(experiment.task, state.key, chunk, experiment.prompts_per_step, weights)


def sample_chunk(parts: Any, state: TrainState, prompts: Prompts, chunk: Array | int) -> Rollout:
    """The policy's completions of a chunk of prompts; `chunk` counts within the round."""
    return stages.sample_rows(parts, state, prompts, jax.random.fold_in(stages.step_key(state, 0), chunk))


def annotate_chunk(parts: Any, state: TrainState, prompts: Prompts, rollout: Rollout, rewards: Rewards) -> Batch:
    """What models say of the rows: the policy that sampled them, and the reference of the round."""
    score = functools.partial(stages.score, parts, prompts.tokens.shape[1])
    return stages.annotate(parts, state, meshes.split_rows(unannotated(rollout, rewards)), score)


def joined(chunks: Sequence[Batch]) -> Batch:
    """One batch of all rows, in order; group ids, which are unique in a chunk, are made unique in the pool."""
    first, sizes = 0, []
    for chunk in chunks:
        sizes.append(first)
        first += chunk.mask.shape[0]
    chunks = [chunk.replace(rollout=chunk.rollout.replace(group=chunk.rollout.group + np.int32(before)))
              for chunk, before in zip(chunks, sizes)]  # fmt: skip
    return stacked(chunks)


def stacked(trees: Sequence[Any]) -> Any:
    """The leaves of several trees of host arrays, one after the other along the rows."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *trees)


def abstract(batch: Batch, rows: int) -> Batch:
    """The shapes and dtypes of a batch of so many rows."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)


def batches(pool: Batch, keep: np.ndarray, order: np.ndarray, *, rows: int, unit: int) -> Iterator[Batch]:
    """One pass over the selected rows, in batches of `rows` rows.

    A batch's shape is fixed, so that one program learns from all: the last one is filled up by rows that are masked
    out. Group ids are made anew, since they must lie below the number of rows.

    Args:
      pool: rows on the host; `unit` rows in a row are drawn together.
      keep: [B] bool. A unit is drawn if it has a kept row; its other rows come along, masked out.
      order: [B / unit] a permutation of the units.
      rows: a multiple of `unit`.
      unit: 1, or the group size for losses that compare the rows of a group.
    """
    chosen = order[keep.reshape(-1, unit).any(axis=1)[order]]
    present = keep & pool.rewards.scored
    for start in range(0, len(chosen), rows // unit):
        some = chosen[start : start + rows // unit]
        index = (some[:, None] * unit + np.arange(unit)).reshape(-1)
        real = np.arange(rows) < len(index)
        index = np.pad(index, (0, rows - len(index)))
        batch = jax.tree.map(operator.itemgetter(index), pool)
        stays = real & present[index]
        yield batch.replace(
            mask=batch.mask & stays[:, None],
            rewards=batch.rewards.replace(scored=batch.rewards.scored & real),
            rollout=batch.rollout.replace(group=np.arange(rows, dtype=np.int32) // unit),
        )


def selection_metrics(pool: Batch, keep: np.ndarray, group_size: int) -> Metrics:
    """What was selected: rows, the share of prompts that have any, how many different completions each has, and the
    share of the rows that are right.

    The share of scored rows that were selected is `kept_share`, among the metrics of the step.
    """
    grouped = keep.reshape(-1, group_size).any(axis=1)
    said = np.where(pool.rollout.action_mask, pool.rollout.tokens, -1)[keep]
    prompts = np.repeat(np.arange(len(grouped)), group_size)[keep]
    different = len(np.unique(np.concatenate([prompts[:, None], said], axis=1), axis=0)) if keep.any() else 0
    return {
        "selection/rows": np.float32(keep.sum()),
        "selection/prompts_share": np.float32(grouped.mean()),
        "selection/distinct_per_prompt": np.float32(different / max(grouped.sum(), 1)),
        "selection/right_share": np.float32((pool.rewards.outcome[keep] > 0.5).mean() if keep.any() else 0.0),
    }


def exploration_metrics(pool: Batch, group_size: int) -> Metrics:
    """How many different right answers a round has, and how well the reward finds a right one; of all its rows.

    "explore/unique_right_per_prompt"  different completions of a prompt that are right
    "explore/unique_share"             different completions of a prompt, as a share of all of them
    "explore/pass@k"                   chance that one of k completions is right, for k in powers of two
    "exploit/best_of_G"                share of prompts whose completion with the highest reward is right

    Prompts with a row that has no reward are in none of them; they are NaN if there is no other.
    """
    whole = np.flatnonzero(pool.rewards.scored.reshape(-1, group_size).all(axis=1))
    by_prompt = lambda x: x.reshape(-1, group_size, *x.shape[1:])[whole]  # noqa: E731
    mask = pool.rollout.action_mask
    said, reward = np.where(mask, pool.rollout.tokens, -1), np.where(mask, pool.rewards.tokens, 0.0).sum(axis=1)
    said, right, reward = map(by_prompt, (said, pool.rewards.outcome > 0.5, reward))
    number = lambda some: np.float32(len(np.unique(some, axis=0)))  # noqa: E731
    best = np.take_along_axis(right, reward.argmax(axis=1)[:, None], axis=1)
    mean = lambda x: np.float32(np.mean(x)) if len(whole) else np.float32(np.nan)  # noqa: E731
    chances = {f"explore/pass@{2**i}": mean(metrics.pass_at_k(group_size, right.sum(axis=1), 2**i))
               for i in range(group_size.bit_length())}  # fmt: skip
    return chances | {
        "explore/unique_right_per_prompt": mean([number(a[r]) for a, r in zip(said, right)]),
        "explore/unique_share": mean([number(a) / group_size for a in said]),
        f"exploit/best_of_{group_size}": mean(best),
    }
