"""Plays games of text by hand: what players are told and write, one jitted move after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mlrl.environments.games.words import VOCABULARY

EOS = VOCABULARY.eos_ids[0]


def written(text, width, *, eos=True):
    """A move as a rollout hands it over: (tokens [width], length)."""
    ids = (VOCABULARY.encode(text) + [EOS] * eos)[:width]
    return jnp.asarray(ids + [VOCABULARY.pad_id] * (width - len(ids)), jnp.int32), jnp.int32(len(ids))


@functools.cache
def of(game):
    """The functions of a game, compiled."""
    return game._replace(**{name: jax.jit(getattr(game, name)) for name in (
        "reset", "player", "observation", "step", "done", "outcome", "invalid")})  # fmt: skip


def told(game, state):
    tokens, length = of(game).observation(state)
    assert tokens.shape == (game.observation_tokens,) and (tokens[length:] == VOCABULARY.pad_id).all()
    return VOCABULARY.decode(tokens[: int(length)])


def play(game, moves, *, width=8, state=None, eos=True):
    """(the state after the moves, who made them, what they were told)."""
    state = of(game).reset(jax.random.key(0)) if state is None else state
    players, heard = [], []
    for move in moves:
        assert not of(game).done(state), "the game is over before its moves"
        players.append(int(of(game).player(state)))
        heard.append(told(game, state))
        state = of(game).step(state, *written(move, width, eos=eos))
    return state, players, heard


def end(game, state):
    """(is it over, outcome, who broke the rules)."""
    g = of(game)
    return bool(g.done(state)), np.asarray(g.outcome(state)).tolist(), int(g.invalid(state))
