"""What an environment or a game promises, looked at before anything is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlrl.environments.nouns import Environment, Game
from mlrl.types import Array, Prompts, Refused, require_whole


def check_environment(environment: Environment, prompts: Prompts, max_tokens: int) -> None:
    """Traces one episode's functions. Raises Refused, naming the one that returns something else than it should.

    Args:
      prompts: arrays or their shapes.
      max_tokens: A.
    """
    if not isinstance(environment, Environment):
        raise Refused(f"multi_turn.environment must be an Environment, got {_shown(environment)}: a function that "
                      "makes one must be called (in Gin: @name())")  # fmt: skip
    observed = environment.observation_tokens
    require_whole("Environment", "observation_tokens", observed, 1)
    given = jax.eval_shape(lambda rows: jax.tree.map(lambda x: x[0], environment.given(rows)), prompts)
    state = _traced("Environment.reset", environment.reset, _key(), given)
    _arrays("Environment.reset", state)
    result = _traced("Environment.step", environment.step, state, *_move(max_tokens))
    if not isinstance(result, tuple) or len(result) != 5:
        raise Refused("Environment.step must return (state, observation, observation length, reward, done), got "
                      f"{_shown(result)}")  # fmt: skip
    _same_state("Environment.step", state, result[0])
    named = (("observation", (observed,), jnp.int32), ("observation length", (), jnp.int32),
             ("reward", (), jnp.float32), ("done", (), jnp.bool_))  # fmt: skip
    for (name, shape, dtype), found in zip(named, result[1:]):
        _is(f"Environment.step's {name}", found, shape, dtype)


def check_game(game: Game, max_tokens: int) -> None:
    """As `check_environment`, of a game whose moves have at most `max_tokens` tokens."""
    if not isinstance(game, Game):
        raise Refused(f"self_play.game must be a Game, got {_shown(game)}: a function that makes one must be called "
                      "(in Gin: @name())")  # fmt: skip
    require_whole("Game", "observation_tokens", game.observation_tokens, 1)
    state = _traced("Game.reset", game.reset, _key())
    _arrays("Game.reset", state)
    _same_state("Game.step", state, _traced("Game.step", game.step, state, *_move(max_tokens)))
    observation = _traced("Game.observation", game.observation, state)
    if not isinstance(observation, tuple) or len(observation) != 2:
        raise Refused(f"Game.observation must return (tokens, length), got {_shown(observation)}")
    _is("Game.observation's tokens", observation[0], (game.observation_tokens,), jnp.int32)
    _is("Game.observation's length", observation[1], (), jnp.int32)
    expected = {"player": ((), jnp.int32), "done": ((), jnp.bool_), "outcome": ((2,), jnp.float32),
                "invalid": ((), jnp.int32)}  # fmt: skip
    for name, (shape, dtype) in expected.items():
        _is(f"Game.{name}", _traced(f"Game.{name}", getattr(game, name), state), shape, dtype)


def check_moves(move: Callable[..., Any], game: Game, max_tokens: int) -> None:
    """Traces an opponent's move(key, state) -> (tokens [A] int32, length int32)."""
    state = jax.eval_shape(game.reset, _key())
    result = _traced("Opponent.move", move, _key(), state)
    if not isinstance(result, tuple) or len(result) != 2:
        raise Refused(f"Opponent.move must return (tokens, length), got {_shown(result)}")
    _is("Opponent.move's tokens", result[0], (max_tokens,), jnp.int32)
    _is("Opponent.move's length", result[1], (), jnp.int32)


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _move(max_tokens: int) -> tuple[Any, Any]:
    return jax.ShapeDtypeStruct((max_tokens,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)


def _traced(name: str, f: Callable, *arguments: Any) -> Any:
    try:
        return jax.eval_shape(lambda *args: jax.tree.map(jnp.asarray, f(*args)), *arguments)
    except Refused:
        raise
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "")
        raise Refused(f"{name} raised {type(error).__name__}: {first_line}") from error


def _arrays(name: str, state: Any) -> None:
    if not jax.tree.leaves(state):
        raise Refused(f"{name} must return a state with at least one array, got {state!r}")


def _same_state(name: str, before: Any, after: Any) -> None:
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise Refused(f"{name} must return a state of the structure that it was given: {jax.tree.structure(before)}, "
                      f"got {jax.tree.structure(after)}")  # fmt: skip
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after))
    for (path, old), new in pairs:
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise Refused(f"{name} must return a state of the shapes and dtypes that it was given: state"
                          f"{jax.tree_util.keystr(path)} was {_shown(old)} and is {_shown(new)}")  # fmt: skip


def _is(name: str, found: Array, shape: tuple[int, ...], dtype: Any) -> None:
    if getattr(found, "shape", None) != shape or found.dtype != dtype:
        raise Refused(f"{name} must be {np.dtype(dtype)}{list(shape)}, got {_shown(found)}")


def _shown(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") and hasattr(x, "dtype") else type(x).__name__
