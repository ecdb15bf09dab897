"""Plays games of text by hand: what players are told and write, one compiled move after the other."""

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
def compiled(game):
    """(key -> state; state -> all that is asked about it; a move)."""
    asked = lambda s: (game.player(s), *game.observation(s), game.done(s), game.outcome(s), game.invalid(s))  # noqa: E731
    return jax.jit(game.reset), jax.jit(asked), jax.jit(game.step)


def begun(game, seed=0):
    return compiled(game)[0](jax.random.key(seed))


def told(game, state):
    _, tokens, length, *_ = compiled(game)[1](state)
    assert tokens.shape == (game.observation_tokens,) and (tokens[length:] == VOCABULARY.pad_id).all()
    return VOCABULARY.decode(tokens[: int(length)])


def play(game, moves, *, width=8, state=None, eos=True):
    """(the state after the moves, who made them, what they were told before)."""
    state = begun(game) if state is None else state
    players, heard = [], []
    for move in moves:
        assert not end(game, state)[0], f"the game was over before {move!r}"
        players.append(int(compiled(game)[1](state)[0]))
        heard.append(told(game, state))
        state = compiled(game)[2](state, *written(move, width, eos=eos))
    return state, players, heard


def end(game, state):
    """(is it over, outcome, who broke the rules)."""
    *_, done, outcome, broke = compiled(game)[1](state)
    return bool(done), np.asarray(outcome).tolist(), int(broke)


def sampled(opponent, state, times=512):
    """What an opponent writes in a state, as texts, and how often."""
    tokens, lengths = jax.jit(jax.vmap(opponent, (0, None)))(jax.random.split(jax.random.key(1), times), state)
    return [VOCABULARY.decode(t[:n]) + "!" * bool(t[n - 1] == EOS) for t, n in zip(np.asarray(tokens), lengths)]
