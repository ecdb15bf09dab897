"""A task of one prompt, for environments and games that make the rest of an episode themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlrl.types import Array, Prompts, Refused, Task, Vocabulary, require_whole


def one_prompt(*, prompt: str, vocabulary: Vocabulary, name: str = "episodes", episodes: int = 2**20) -> Task:
    """The same prompt again and again: the rules of a game, or the first words of an environment.

    Args:
      prompt: of at least one token.
      vocabulary: its tokens are also those of the environment or game.
      name: in the logs.
      episodes: how many there are in an epoch.
    Returns: a Task in the graph. `Prompts.example` holds number [N] int32, which episode it is, for environments that
      make their problem of it. Nothing is demonstrated but the EOS.
    Raises: Refused, if the prompt is empty, or the vocabulary cannot spell it.
    """
    require_whole("one_prompt", "episodes", episodes, 1)
    ids = np.asarray(vocabulary.encode(prompt), np.int32)
    if not ids.size:
        raise Refused("one_prompt: the prompt is empty: it needs at least one token, from which the first turn begins")

    def at(source: Array, index: Array) -> Prompts:
        index = jnp.asarray(index, jnp.int32)
        tokens = jnp.broadcast_to(jnp.asarray(ids), (index.shape[0], ids.size))
        return Prompts(tokens, jnp.ones(tokens.shape, bool), jnp.asarray(source, jnp.int32), index, {"number": index})

    def targets(source: Array, index: Array) -> tuple[Array, Array]:
        return jnp.full((len(index), 1), vocabulary.eos_ids[0], jnp.int32), jnp.ones((len(index), 1), bool)

    def example(source: int, index: int) -> Mapping[str, Any]:
        if not (source == 0 and 0 <= index < episodes):
            raise Refused(f"{name} has the examples 0 to {episodes - 1} of source 0, asked for {index} of {source}")
        return {"prompt": prompt, "answer": "", "task": name, "number": index}

    return Task(name, (name,), (episodes,), (1.0,), vocabulary, jax.jit(at), jax.jit(targets), example, in_graph=True)
