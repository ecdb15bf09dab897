"""Several games as one: which of them an episode is, is drawn at its start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlrl.environments.games import words as w
from mlrl.environments.nouns import Game, OpponentFn
from mlrl.types import Array, Refused, Vocabulary


def one_of(
    games: Sequence[Game], names: Sequence[str], *, vocabulary: Vocabulary = w.VOCABULARY, rates: Sequence[float] = ()
) -> Game:
    """A game that is one of `games`, and says which.

    A game does not see the prompt, so it is not a mixture of prompts that chooses: let the prompt be one for all (such
    as `episodes.one_prompt`). Each player is told the game's name before its first observation. All games are computed
    in every episode, and the episode's own is taken.

    Args:
      games: over the same vocabulary.
      names: one for each, as the PROMPT of its module.
      rates: how often each is drawn, in any scale; () draws all alike.
    Returns: a Game, whose state is {"which" int32; "met" [2] bool: who moved before; "games": a tuple of their states}.
    Raises: Refused, if names or rates are not one for each game, or rates are not weights.
    """
    shares = np.asarray(rates or [1.0] * len(games), np.float64)
    if not games or len(names) != len(games) or shares.shape != (len(games),):
        raise Refused(f"one_of: give a name, and a rate or none, for each of {len(games)} games, got {list(names)} and "
                      f"{list(rates)}")  # fmt: skip
    if not np.isfinite(shares).all() or (shares < 0).any() or not shares.sum():
        raise Refused(f"one_of: rates must be finite, not negative and not all zero, got {list(rates)}")
    log_shares = np.where(shares > 0, np.log(np.maximum(shares, 1e-30)), -np.inf)
    spelled = [list(vocabulary.encode(name)) for name in names]
    longest, observed = max(map(len, spelled)), max(game.observation_tokens for game in games)
    written = np.asarray([ids + [vocabulary.pad_id] * (longest - len(ids)) for ids in spelled], np.int32)
    written = written.reshape(len(games), longest)

    def of_each(name: str, state: Any) -> list[Any]:
        return [getattr(game, name)(own) for game, own in zip(games, state["games"])]

    def ask(name: str) -> Any:
        return lambda state: jnp.stack(of_each(name, state))[state["which"]]

    def reset(key: Array) -> dict[str, Any]:
        first, *keys = jax.random.split(key, 1 + len(games))
        which = jax.random.categorical(first, jnp.asarray(log_shares)).astype(jnp.int32)
        return {"which": which, "met": jnp.zeros(2, bool), "games": tuple(g.reset(k) for g, k in zip(games, keys))}

    def observation(state: Any) -> tuple[Array, Array]:
        said = of_each("observation", state)
        padded = [jnp.pad(tokens, (0, observed - tokens.shape[0])) for tokens, _ in said]
        which, length = state["which"], jnp.stack([length for _, length in said])[state["which"]]
        named = jnp.asarray([len(ids) for ids in spelled])[which] * ~state["met"][ask("player")(state)]
        keep = jnp.concatenate([jnp.arange(longest) < named, jnp.arange(observed) < length])
        return w.packed(jnp.concatenate([jnp.asarray(written)[which], jnp.stack(padded)[which]]), keep,
                        vocabulary.pad_id)  # fmt: skip

    def step(state: Any, tokens: Array, length: Array) -> Any:
        def moved(i: int, game: Game, own: Any) -> Any:
            mine = state["which"] == i
            return jax.tree.map(lambda new, old: jnp.where(mine, new, old), game.step(own, tokens, length), own)

        after = tuple(moved(i, *both) for i, both in enumerate(zip(games, state["games"])))
        return state | {"met": state["met"].at[ask("player")(state)].set(True), "games": after}

    return Game(reset, ask("player"), observation, step, ask("done"), ask("outcome"), ask("invalid"),
                longest + observed)  # fmt: skip


def each_its_own(opponents: Sequence[OpponentFn]) -> OpponentFn:
    """The opponent in a game `one_of`: that of the game which is played, in the order of its games."""

    def move(key: Array, state: Any) -> tuple[Array, Array]:
        answers = [opponent(key, own) for opponent, own in zip(opponents, state["games"], strict=True)]
        return tuple(jnp.stack(parts)[state["which"]] for parts in zip(*answers))

    return move
