"""Moves as words: the tokens that a player wrote, read strictly, and the words of players who do not learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlrl.types import Array, Refused, Vocabulary, require_whole
from mlrl.vocabularies import characters

VOCABULARY = characters("0123456789XOJQKxbcf+-WGAD>:=TPN")  # of all games here, so that tasks of them mix

ZERO_SUM = (-1.0, 1.0)


class Words(NamedTuple):
    """The moves of a game, legal or not in a given state, as tokens: W words of at most C tokens, without EOS.

    texts    W texts
    tokens   [W,C] int32, padded on the right with -1
    lengths  [W] int32
    """

    texts: tuple[str, ...]
    tokens: np.ndarray
    lengths: np.ndarray


def symbol_ids(vocabulary: Vocabulary, text: str) -> np.ndarray:
    """One token id for each character of `text`, [len(text)] int32.

    Raises: Refused, if the vocabulary lacks a character, or does not spell it as one token.
    """
    ids = []
    for symbol in text:
        try:
            spelled = list(vocabulary.encode(symbol))
        except Refused as refusal:
            raise Refused(f"a game needs the symbols {text!r}: {refusal}") from refusal
        if len(spelled) != 1:
            raise Refused(f"a game needs a vocabulary that spells {symbol!r} as one token, this one takes {spelled}")
        ids += spelled
    return np.asarray(ids, np.int32)


def words(vocabulary: Vocabulary, texts: Sequence[str]) -> Words:
    """The words `texts`, one token for each character."""
    alphabet = "".join(dict.fromkeys("".join(texts)))
    ids = dict(zip(alphabet, symbol_ids(vocabulary, alphabet).tolist()))
    width = max(map(len, texts))
    tokens = np.asarray([[ids[c] for c in text] + [-1] * (width - len(text)) for text in texts], np.int32)
    return Words(tuple(texts), tokens, np.asarray([len(text) for text in texts], np.int32))


def reader(vocabulary: Vocabulary, known: Words, marker: str = "") -> Callable[[Array, Array], Array]:
    """(tokens [A] int32, length int32) -> which of the W words was written, -1 if it is none of them.

    What was written must be exactly a word. An EOS may end it; without one it must fill what was written.

    Args:
      marker: one character; what stands before the last one is free (a scratchpad) and not read. "": all is read.
    Raises: Refused, if the marker is part of a word, or not one character.
    """
    if len(marker) > 1 or any(marker and marker in text for text in known.texts):
        raise Refused(f"marker must be one character that no move has, or '' for none, got {marker!r}")
    mark = int(symbol_ids(vocabulary, marker)[0]) if marker else -1
    ends = np.asarray(vocabulary.eos_ids, np.int32)
    width = known.tokens.shape[1]

    def read(tokens: Array, length: Array) -> Array:
        column = jnp.arange(tokens.shape[0])
        ended = jnp.any((column == length - 1) & jnp.isin(tokens, ends))
        stop = length - ended
        start = jnp.max(jnp.where((tokens == mark) & (column < stop), column + 1, 0))
        written = jnp.pad(tokens, (0, width), constant_values=-1)
        written = jax.lax.dynamic_slice(written, (start,), (width,))
        same = (written[None] == known.tokens) | (jnp.arange(width)[None] >= known.lengths[:, None])
        found = jnp.all(same, axis=1) & (known.lengths == stop - start)
        return jnp.where(jnp.any(found), jnp.argmax(found), -1).astype(jnp.int32)

    return read


def spelled(vocabulary: Vocabulary, known: Words, max_move_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Each word as a player writes it: (tokens [W,A] int32, lengths [W]), with the first EOS where there is room.

    Raises: Refused, if the longest word has more than A = `max_move_tokens` tokens.
    """
    require_whole("games", "max_move_tokens", max_move_tokens, 1)
    (count, width), a = known.tokens.shape, max_move_tokens
    if width > a:
        longest = known.texts[int(np.argmax(known.lengths))]
        raise Refused(f"max_move_tokens is {a}, but the move {longest!r} has {width}: raise it")
    tokens = np.full((count, a), vocabulary.pad_id, np.int32)
    tokens[:, :width] = np.where(known.tokens < 0, vocabulary.pad_id, known.tokens)
    room = known.lengths < a
    tokens[np.flatnonzero(room), known.lengths[room]] = vocabulary.eos_ids[0]
    return tokens, (known.lengths + room).astype(np.int32)


def packed(tokens: Array, keep: Array, pad_id: int) -> tuple[Array, Array]:
    """The kept tokens at the left end: (tokens [O] int32, length int32)."""
    place = jnp.cumsum(keep) - 1
    move = keep[:, None] & (place[:, None] == jnp.arange(keep.shape[0])[None])  # one-hot compiles faster than a sort
    moved = jnp.sum(jnp.where(move, tokens[:, None], 0), axis=0)
    length = jnp.sum(keep, dtype=jnp.int32)
    return jnp.where(jnp.arange(keep.shape[0]) < length, moved, pad_id).astype(jnp.int32), length


def uniform(key: Array, allowed: Array) -> Array:
    """One of the places where `allowed` [W] is True, each as likely as the others."""
    return jax.random.categorical(key, jnp.where(allowed, 0.0, -jnp.inf)).astype(jnp.int32)


def when_broken(broke: Array, broken: tuple[float, float], most: float, outcome: Array) -> Array:
    """`outcome` [2], or `most` times `broken`, (the offender's, the opponent's), where player `broke` broke rules."""
    offender, opponent = broken
    paid = most * jnp.where(jnp.arange(2) == broke, offender, opponent)
    return jnp.where(broke >= 0, paid, outcome).astype(jnp.float32)


def check_broken(game: str, broken: Sequence[float]) -> tuple[float, float]:
    """`broken` as a pair. Raises Refused unless it is one, and the offender gets less than nothing."""
    if len(tuple(broken)) != 2 or not broken[0] < 0:
        raise Refused(f"{game}.broken must be (what a player gets who breaks the rules, what the other one gets), the "
                      f"first below 0, got {broken!r}")  # fmt: skip
    return tuple(map(float, broken))
