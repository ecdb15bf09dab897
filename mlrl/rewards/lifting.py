"""Liftings: a plain function becomes a RewardFn, judged in the graph, in worker processes, or with models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mlrl.rewards.completions import name_of, per_completion
from mlrl.types import Array, Prompts, Refused, RewardFn, Rewards, Rollout


def lift(reward: RewardFn | Callable | Sequence[Callable]) -> RewardFn:
    """A RewardFn from whatever a person hands over; a RewardFn passes through unchanged.

    The name of a function's first parameter says how it is lifted: `completion` by `per_completion`,
    `rollout` by `in_graph`, `models` by `with_models`. A list or tuple of functions is lifted by
    `per_completion`, and summed.

    Args:
      reward: a RewardFn, a function, or several functions of (completion, example).
    Returns:
      A RewardFn.
    Raises:
      Refused: the first parameter has another name.
    """
    if isinstance(reward, RewardFn):
        return reward
    if isinstance(reward, (list, tuple)):
        for one in reward:
            if _first_parameter(one) != "completion":
                raise Refused(f"a list of rewards holds functions of (completion, example), and {name_of(one)!r} is "
                              "another: adapt it first, or add them up by combinators.weighted_sum")  # fmt: skip
        return per_completion(reward)
    first = _first_parameter(reward)
    if first == "completion":
        return per_completion(reward)
    if first == "rollout":
        return in_graph(reward)
    if first == "models":
        return with_models(reward)
    if first in ("prompts", "completions"):
        raise Refused(f"reward {name_of(reward)!r} takes {first!r}, as TRL's do: wrap it in adapters.from_trl")
    raise Refused(
        f"reward {name_of(reward)!r} must take (completion, example), (rollout, prompts) or (models, "
        f"rollout, prompts): the first parameter's name says how it is run, and here it is {first!r}"
        " (a function that makes a reward must be called; in Gin: @name())"
    )


def in_graph(f: Callable[[Rollout, Prompts], Array], *, name: str = "") -> RewardFn:
    """Lifts f(rollout, prompts) -> [B] or [B,L], a jittable function.

    [B] is an outcome: it sits on the last action token of each row. [B,L] is a reward per token; what it says
    outside of the action mask is ignored, and the row's outcome is its sum. Numbers of any dtype become
    float32. A mapping is allowed too: its entry "reward" (or its only entry) is the reward, "outcome" [B] the
    unshaped score if that differs, and all entries [B] are logged as parts. A row whose reward is not finite
    is unscored.

    Args:
      f: gets a rollout of B rows and prompts repeated to B rows; `prompts.example` holds what it needs to
        judge.
      name: of the part in the logs; the function's own if empty.
    Returns:
      A RewardFn with parts `name` (the row's reward, 0 where unscored) and `unscored/name` (1 where
      unscored).
    Raises:
      Refused: when traced, if f raises or returns another shape or type.
    """
    name = name or name_of(f)

    def judge(rollout: Rollout, prompts: Prompts) -> Rewards:
        return as_rewards(_attempt(f, name, rollout, prompts), rollout, name)

    judge_jitted = jax.jit(judge)

    def update(state, rollout, prompts, task, models):
        return judge_jitted(rollout, prompts), state

    return RewardFn(tuple, update, True, (name, f"unscored/{name}"))


def with_models(f: Callable[..., Array], *, name: str = "") -> RewardFn:
    """Lifts f(models, rollout, prompts) -> [B] or [B,L]: a jittable function that asks models.

    `models.generate(prompts, key)`, `models.score(rollout)` and `models.reference(rollout)` are bound to the
    current policy and the frozen reference (types.Models). No gradient flows through a reward. Otherwise like
    `in_graph`.
    """
    name = name or name_of(f)

    def update(state, rollout, prompts, task, models):
        return as_rewards(_attempt(f, name, models, rollout, prompts), rollout, name), state

    return RewardFn(tuple, update, True, (name, f"unscored/{name}"))


def stateful(
    init: Callable[[], Any], update: Callable[..., tuple[Array, Any]], *, name: str = ""
) -> RewardFn:
    """Lifts a pair, as in optax: init() -> state, update(state, rollout, prompts) -> ([B] or [B,L], state).

    The state is a pytree of arrays that keeps its structure, shapes and dtypes. It rides in
    TrainState.reward, so it is checkpointed and resumes. Otherwise like `in_graph`.
    """
    name = name or name_of(update)

    def lifted(state, rollout, prompts, task, models):
        result = _attempt(update, name, state, rollout, prompts)
        if not isinstance(result, tuple) or len(result) != 2:
            raise Refused(f"reward {name!r} must return (rewards, state), got {type(result).__name__}")
        value, new_state = result
        if jax.eval_shape(_arrays, state) != jax.eval_shape(_arrays, new_state):
            raise Refused(
                f"reward {name!r} must return a state with the structure, shapes and dtypes it was given"
            )
        return as_rewards(value, rollout, name), new_state

    return RewardFn(init, lifted, True, (name, f"unscored/{name}"))


def at_last_action(values: Array, action_mask: Array) -> Array:
    """Puts values [B] on the last action token of each row -> [B,L]; a row without actions gets zeros."""
    length = action_mask.shape[1]
    last = length - 1 - jnp.argmax(action_mask[:, ::-1], axis=1)
    here = (jnp.arange(length)[None] == last[:, None]) & action_mask
    return jnp.where(here, values[:, None], 0.0).astype(jnp.float32)


def _arrays(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


def _first_parameter(f: Any) -> str:
    try:
        return next(iter(inspect.signature(f).parameters), "")
    except (TypeError, ValueError):
        raise Refused(f"a reward must be a function or a RewardFn, got {type(f).__name__} {f!r}") from None


def _attempt(f: Callable, name: str, *arguments: Any) -> Any:
    try:
        return f(*arguments)
    except Refused:
        raise
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "")
        raise Refused(f"reward {name!r} raised {type(error).__name__}: {first_line}") from error


def _numbers(value: Any, name: str) -> Array:
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError):
        raise Refused(f"reward {name!r} must return an array, got {type(value).__name__}") from None
    if jnp.issubdtype(array.dtype, jnp.complexfloating) or not (
        jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool
    ):
        raise Refused(f"reward {name!r} must return numbers, got dtype {array.dtype}")
    return jax.lax.stop_gradient(array.astype(jnp.float32))


def as_rewards(value: Any, rollout: Rollout, name: str) -> Rewards:
    """Rewards from what an in-graph function returned: [B], [B,L], or a mapping with entry "reward"; see `in_graph`.

    Raises: Refused, with the reward's name, if it is none of these.
    """
    mask = rollout.action_mask
    rows, length = mask.shape
    entries = dict(value) if isinstance(value, Mapping) else {"reward": value}
    if len(entries) == 1:
        entries = {"reward": next(iter(entries.values()))}
    if "reward" not in entries:
        raise Refused(f'reward {name!r} must return an entry "reward", got the entries {sorted(entries)}')
    entries = {entry: _numbers(array, name) for entry, array in entries.items()}
    reward = entries.pop("reward")
    if reward.shape not in ((rows,), (rows, length)):
        raise Refused(f"reward {name!r} must return shape [B]=[{rows}] or [B,L]=[{rows},{length}], "
                      f"got {list(reward.shape)}")  # fmt: skip
    tokens = at_last_action(reward, mask) if reward.ndim == 1 else jnp.where(mask, reward, 0.0)
    total = reward if reward.ndim == 1 else tokens.sum(axis=1)
    scored = jnp.isfinite(total)
    for entry, array in entries.items():
        if array.shape != (rows,):
            shape = list(array.shape)
            raise Refused(f"reward {name!r}: entry {entry!r} must have shape [B]=[{rows}], got {shape}")
        scored &= jnp.isfinite(array)
    clean = {entry: jnp.where(scored, array, 0.0) for entry, array in entries.items()}
    total = jnp.where(scored, total, 0.0)
    parts = {name: total} | {f"{name}/{entry}": array for entry, array in clean.items()}
    parts[f"unscored/{name}"] = 1.0 - scored.astype(jnp.float32)
    return Rewards(
        tokens=jnp.where(scored[:, None], tokens, 0.0),
        outcome=clean.get("outcome", total),
        scored=scored,
        parts=parts,
    )
