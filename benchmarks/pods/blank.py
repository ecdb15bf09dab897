"""A task of nothing but its shape, and a reward on the host: for programs that are compiled and never run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from mlrl.types import Array, Models, Prompts, RewardFn, Rewards, Rollout, Task


@dataclasses.dataclass(frozen=True)
class Ids:
    """A vocabulary of ids without text."""

    size: int
    pad_id: int = 0
    eos_ids: tuple[int, ...] = (1,)

    def encode(self, text: str) -> list[int]:
        """Every text is one token."""
        return [2] if text else []

    def decode(self, ids: Any) -> str:
        """Every id is an x."""
        return "x" * len(ids)


def prompts(*, prompt_tokens: int, ids: int) -> Task:
    """A task whose prompts have `prompt_tokens` equal tokens, over a vocabulary of so many ids."""

    def at(source: Array, index: Array) -> Prompts:
        n = source.shape[0]
        tokens = jnp.full((n, prompt_tokens), 2, jnp.int32)
        return Prompts(tokens, jnp.ones((n, prompt_tokens), bool), source, index, {})

    def targets(source: Array, index: Array) -> tuple[Array, Array]:
        tokens = jnp.full((source.shape[0], 1), 1, jnp.int32)
        return tokens, tokens == 1

    def example(source: int, index: int) -> Mapping[str, Any]:
        return {"prompt": "x" * prompt_tokens, "answer": "x", "task": "blank"}

    return Task("blank", ("blank",), (1_000_000,), (1.0,), Ids(ids), at, targets, example, in_graph=True)


def nothing() -> RewardFn:
    """A reward of 0 that is computed on the host, as rewards of text are: so rollout and update are two programs."""

    def update(state: tuple, rollout: Rollout, prompts: Prompts, task: Task, models: Models) -> tuple[Rewards, tuple]:
        zeros = jnp.zeros(rollout.group.shape, jnp.float32)
        return Rewards(jnp.zeros(rollout.tokens.shape, jnp.float32), zeros, zeros == 0, {"reward": zeros}), state

    return RewardFn(tuple, update, in_graph=False, names=("reward",))
