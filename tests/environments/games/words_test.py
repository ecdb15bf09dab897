"""Moves as words: what is read as one, what is not, and how they are written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl.environments.games import words
from mlrl.types import Refused
from mlrl.vocabularies import characters

VOCABULARY = characters("ab:")
A, B, COLON = 3, 4, 5
PAD, EOS = VOCABULARY.pad_id, VOCABULARY.eos_ids[0]
KNOWN = words.words(VOCABULARY, ["a", "ab", "b"])


@pytest.mark.parametrize("marker, tokens, length, expected", [
    ("", [A, EOS, PAD], 2, 0), ("", [A, B, EOS], 3, 1), ("", [B, EOS, PAD], 2, 2),
    ("", [A, PAD, PAD], 1, 0),  # full without an EOS
    ("", [A, B, PAD], 1, 0),  # what was not written is not read
    ("", [B, A, EOS], 3, -1), ("", [A, EOS, EOS], 3, -1), ("", [EOS, A, PAD], 2, -1), ("", [EOS, PAD, PAD], 1, -1),
    ("", [PAD, PAD, PAD], 0, -1), ("", [A, PAD, EOS], 3, -1), ("", [COLON, A, EOS], 3, -1),
    (":", [COLON, A, EOS], 3, 0), (":", [B, COLON, A], 3, 0), (":", [A, EOS, PAD], 2, 0), (":", [A, COLON, EOS], 3, -1),
    (":", [COLON, COLON, B], 3, 2), (":", [A, COLON, B], 1, 0),
])  # fmt: skip
def test_reading(marker, tokens, length, expected):
    read = jax.jit(words.reader(VOCABULARY, KNOWN, marker))
    assert int(read(jnp.asarray(tokens), jnp.int32(length))) == expected


def test_a_word_longer_than_the_move_is_not_in_it():
    read = words.reader(VOCABULARY, KNOWN)
    assert int(read(jnp.asarray([A]), jnp.int32(1))) == 0


def test_writing():
    tokens, lengths = words.spelled(VOCABULARY, KNOWN, 2)
    assert tokens.tolist() == [[A, EOS], [A, B], [B, EOS]] and lengths.tolist() == [2, 2, 2]
    tokens, lengths = words.spelled(VOCABULARY, KNOWN, 4)
    assert tokens[1].tolist() == [A, B, EOS, PAD] and lengths.tolist() == [2, 3, 2]
    with pytest.raises(Refused, match="the move 'ab' has 2: raise it"):
        words.spelled(VOCABULARY, KNOWN, 1)


def test_packing():
    tokens, length = words.packed(jnp.asarray([7, 8, 9]), jnp.asarray([False, True, True]), 1)
    assert tokens.tolist() == [8, 9, 1] and int(length) == 2
    assert words.packed(jnp.asarray([7]), jnp.asarray([False]), 1)[0].tolist() == [1]


def test_payoffs_of_broken_rules():
    fine = jnp.asarray([3.0, -3.0])
    for broke, expected in ((-1, [3, -3]), (0, [-3, 1]), (1, [1, -3])):
        np.testing.assert_allclose(words.when_broken(jnp.int32(broke), (-1.5, 0.5), 2.0, fine), expected)
