"""Environments in plain Python, over text: the compiled rollout asks the host between two turns."""

from __future__ import annotations

import collections
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlrl.environments.nouns import Environment
from mlrl.types import Array, Prompts, Refused, Task, require_whole

_KEPT = 2**16  # states of episodes that go on; older ones are played again if they are asked for


def on_host(
    *,
    task: Task,
    reset: Callable[[Mapping[str, Any]], Any],
    step: Callable[[Any, str], tuple[Any, str, float, bool]],
    observation_tokens: int,
    max_turns: int = 4,
    max_turn_tokens: int = 64,
) -> Environment:
    """An Environment whose answers come from two Python functions.

        state = reset(example)
        state, observation, reward, done = step(state, completion)

    `completion` is the text of one turn, without special tokens. Only what is new is tokenized: the observation; what
    the policy wrote stays as it was sampled. What the compiled program carries is what was said so far. So both
    functions must depend on their arguments alone: an episode may be played again from its start. Usually it is not,
    since the states of episodes that go on are kept on the host, each for one use; so `step` may change its state.

    The functions run in this process, one row after the other, while the device waits; there is no time limit. They
    must not call JAX. For one process.

    Args:
      task: that of the experiment. `reset` gets its example(source, index). The examples of a task in the graph are
        computed by JAX: of these it gets "prompt" (str), and what is in `Prompts.example`, as numpy arrays.
      reset, step: see above. The observation is cut to its first `observation_tokens` tokens.
      observation_tokens: O.
      max_turns, max_turn_tokens: those of `multi_turn`.
    Raises: Refused, at once or as the cause of the run's end, if a function raises, or returns something else than it
      should, or the vocabulary cannot spell an observation.
    """
    for name, value in (("observation_tokens", observation_tokens), ("max_turns", max_turns),
                        ("max_turn_tokens", max_turn_tokens)):  # fmt: skip
        require_whole("on_host", name, value, 1)
    if jax.process_count() > 1:
        raise Refused("on_host: an environment on the host is for runs of one process: write one in the graph")
    episodes, vocabulary = _Episodes(task, reset, step), task.vocabulary
    answer = functools.partial(_answers, episodes, observation_tokens)

    def first(key: Array, given: dict[str, Array]) -> dict[str, Array]:
        said = jnp.full((max_turns, max_turn_tokens), vocabulary.pad_id, jnp.int32)
        return {**given, "number": jax.random.bits(key, (), jnp.uint32), "said": said,
                "lengths": jnp.zeros((max_turns,), jnp.int32), "turn": jnp.int32(0)}  # fmt: skip

    def further(state: dict[str, Array], tokens: Array, length: Array) -> tuple[Any, Array, Array, Array, Array]:
        if tokens.shape != (max_turn_tokens,):
            raise Refused(f"on_host.max_turn_tokens is {max_turn_tokens}, and that of the rollout {tokens.shape[0]}: "
                          "make them, and max_turns, the same")  # fmt: skip
        at = state["turn"]
        state = state | {"said": state["said"].at[at].set(tokens), "lengths": state["lengths"].at[at].set(length),
                         "turn": at + 1}  # fmt: skip
        shapes = [jax.ShapeDtypeStruct((observation_tokens,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32),
                  jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.bool_)]  # fmt: skip
        return state, *jax.pure_callback(answer, shapes, state, vmap_method="broadcast_all")

    def given(prompts: Prompts) -> dict[str, Array]:
        found = {"source": prompts.source, "index": prompts.index}
        if task.in_graph:
            found |= {"prompt": prompts.tokens, "valid": prompts.valid, "example": prompts.example}
        return jax.tree.map(jnp.asarray, found)

    return Environment(first, further, observation_tokens, given)


class _Episodes:
    """Episodes that go on, by their prompt and what was said so far, each state for one use."""

    def __init__(self, task: Task, reset: Callable, step: Callable):
        self._task, self._reset, self._step = task, reset, step
        self._kept: collections.OrderedDict[tuple, Any] = collections.OrderedDict()
        self.vocabulary = task.vocabulary

    def played(self, row: dict[str, Any], said: list[list[int]]) -> tuple[str, float, bool]:
        """The answer to the last of an episode's turns, from its state before or else from its beginning."""
        spoken, episode = tuple(map(tuple, said)), tuple(int(row[name]) for name in ("source", "index", "number"))
        key, example = (*episode, spoken[:-1]), self._example(row)
        if key in self._kept:
            state, turns = self._kept.pop(key), said[-1:]
        else:
            state, turns = _asked("reset", self._reset, example, example), said
        for tokens in turns:
            state, *answer = _answered(self._step, state, self.vocabulary.decode(tokens), example)
        if not answer[-1]:
            self._kept[(*episode, spoken)] = state
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return tuple(answer)

    def _example(self, row: dict[str, Any]) -> Mapping[str, Any]:
        if not self._task.in_graph:
            return self._task.example(int(row["source"]), int(row["index"]))
        return {"prompt": self.vocabulary.decode(row["prompt"][row["valid"]]), **row["example"]}


def _answers(episodes: _Episodes, observation_tokens: int, state: dict[str, Any]) -> tuple[np.ndarray, ...]:
    """What every episode of a batch of states is answered: observations, their lengths, rewards, whether it is over."""
    state = jax.tree.map(np.asarray, state)
    shape, vocabulary = state["turn"].shape, episodes.vocabulary
    told = np.full((*shape, observation_tokens), vocabulary.pad_id, np.int32)
    count, reward, done = np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.ones(shape, bool)
    for at in np.ndindex(shape):
        row = jax.tree.map(operator.itemgetter(at), state)
        spoken = [row["said"][k, : row["lengths"][k]].tolist() for k in range(int(row["turn"]))]
        if not spoken[-1]:
            continue  # an episode that is over: nothing was said
        text, reward[at], done[at] = episodes.played(row, spoken)
        ids = vocabulary.encode(text)[:observation_tokens]
        told[at][: len(ids)], count[at] = ids, len(ids)
    return told, count, reward, done


def _asked(name: str, f: Callable, example: Mapping[str, Any], *arguments: Any) -> Any:
    try:
        return f(*arguments)
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "")
        raise Refused(f"the environment's {name} raised {type(error).__name__}: {first_line}; the prompt is "
                      f"{str(example.get('prompt', ''))[:80]!r}") from error  # fmt: skip


def _answered(step: Callable, state: Any, completion: str, example: Mapping[str, Any]) -> tuple[Any, str, float, bool]:
    answer = _asked("step", step, example, state, completion)
    if not (isinstance(answer, tuple) and len(answer) == 4 and isinstance(answer[1], str)):
        raise Refused("the environment's step must return (state, observation text, reward, done), got "
                      f"{type(answer).__name__}")  # fmt: skip
    state, text, reward, done = answer
    return state, text, float(reward), bool(done)
