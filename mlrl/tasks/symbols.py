"""Text made in the graph: numbers to symbols, kept symbols packed to one side, symbols to token ids."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mlrl.prompts import shuffled_index
from mlrl.types import Array, Refused, Vocabulary

ALPHABET = "0123456789+-*%=:,()"  # a symbol is a position in it; digits are themselves
MINUS = ALPHABET.index("-")
MOST_PROBLEMS = 2**31 - 1

Cells = tuple[Array, Array]  # symbols [N,W] int32, keep [N,W] bool


def number(value: Array, width: int, *, signed: bool = False, reverse: bool = False) -> Cells:
    """Decimal digits of `value` [N] in `width` cells, without leading zeros; one more cell in front for a sign.

    With `reverse` the least significant digit comes first (after the sign).
    """
    powers = jnp.asarray([10**i for i in reversed(range(width))], jnp.int32)
    size = jnp.abs(value)[:, None]
    digits = (size // powers) % 10
    keep = (size >= powers) | (powers == 1)
    if reverse:
        digits, keep = digits[:, ::-1], keep[:, ::-1]
    if not signed:
        return digits, keep
    sign = jnp.full((value.shape[0], 1), MINUS, jnp.int32)
    return jnp.concatenate([sign, digits], axis=1), jnp.concatenate([value[:, None] < 0, keep], axis=1)


def fixed(text: str, rows: int) -> Cells:
    """The same text in every row."""
    symbols = jnp.asarray([ALPHABET.index(c) for c in text], jnp.int32)
    return jnp.broadcast_to(symbols, (rows, len(text))), jnp.ones((rows, len(text)), bool)


def one_of(text: str, choice: Array) -> Cells:
    """The character of `text` at `choice` [N], in one cell."""
    symbols = jnp.asarray([ALPHABET.index(c) for c in text], jnp.int32)[choice]
    return symbols[:, None], jnp.ones((choice.shape[0], 1), bool)


def line(*cells: Cells) -> Cells:
    """Cells side by side."""
    return jnp.concatenate([c[0] for c in cells], axis=1), jnp.concatenate([c[1] for c in cells], axis=1)


def pack_right(cells: Cells, ids: Array, pad_id: int) -> tuple[Array, Array]:
    """Kept symbols as token ids at the right end of the row -> (tokens [N,W], valid [N,W])."""
    keep = cells[1]
    kept_from_here = jnp.cumsum(keep[:, ::-1], axis=1)[:, ::-1]
    return _pack(cells, keep.shape[1] - kept_from_here, ids, pad_id)


def pack_left(cells: Cells, ids: Array, pad_id: int) -> tuple[Array, Array]:
    """Kept symbols as token ids at the left end of the row -> (tokens [N,W], valid [N,W])."""
    return _pack(cells, jnp.cumsum(cells[1], axis=1) - 1, ids, pad_id)


def append_token(tokens: Array, valid: Array, token: int, pad_id: int) -> tuple[Array, Array]:
    """Adds `token` after the last valid token of rows that are packed to the left; one column wider."""
    tokens = jnp.pad(tokens, ((0, 0), (0, 1)), constant_values=pad_id)
    end = jnp.arange(tokens.shape[1])[None] == valid.sum(axis=1)[:, None]
    return jnp.where(end, token, tokens), jnp.pad(valid, ((0, 0), (0, 1))) | end


def token_ids(vocabulary: Vocabulary, needed: str) -> np.ndarray:
    """Token id of every symbol in ALPHABET that is in `needed`, the padding id for others -> [len(ALPHABET)].

    Raises: Refused, if a needed symbol is not exactly one token.
    """
    ids = np.full(len(ALPHABET), vocabulary.pad_id, np.int32)
    for symbol in sorted(set(needed)):
        try:
            spelled = list(vocabulary.encode(symbol))
        except Refused as refusal:
            raise Refused(f"the vocabulary of a puzzle needs {''.join(sorted(set(needed)))!r}: {refusal}") from refusal
        if len(spelled) != 1:
            raise Refused(f"a puzzle needs a vocabulary that spells {symbol!r} as one token, this one takes {spelled}")
        ids[ALPHABET.index(symbol)] = spelled[0]
    return ids


def held_out(size: int, split: str, test_share: float, name: str) -> tuple[int, int]:
    """(offset, count) of a split in a shuffled range(size): the test share comes first, training gets the rest.

    Raises: Refused, if the split is neither train nor test, or empty, or there are more problems than int32 counts.
    """
    if size > MOST_PROBLEMS:
        raise Refused(f"{name} has {size} problems, more than {MOST_PROBLEMS}: lower digits, operands or numbers")
    if not 0.0 <= test_share < 1.0:
        raise Refused(f"{name}: test_share must lie in [0, 1), got {test_share}")
    tests = round(size * test_share)
    if split not in ("train", "test"):
        raise Refused(f"{name}: split must be 'train' or 'test', got {split!r}")
    offset, count = (0, tests) if split == "test" else (tests, size - tests)
    if count < 1:
        raise Refused(f"{name}: the {split} split is empty with {size} problems and test_share={test_share}")
    return offset, count


def problem_number(index: Array, offset: int, size: int, seed: int) -> Array:
    """Which of range(size) problems is example `index` [N] of the split that starts at `offset`."""
    key = jax.random.key(seed, impl="threefry2x32")
    return shuffled_index(key, jnp.asarray(index) % size + offset, size)


def _pack(cells: Cells, column: Array, ids: Array, pad_id: int) -> tuple[Array, Array]:
    """Moves every kept symbol to its `column` [N,W]: as a one-hot product, which compiles faster than a sort."""
    symbols, keep = cells
    move = keep[:, :, None] & (column[:, :, None] == jnp.arange(keep.shape[1]))
    valid = move.any(axis=1)
    tokens = jnp.where(move, jnp.asarray(ids)[symbols][:, :, None], 0).sum(axis=1)
    return jnp.where(valid, tokens, pad_id).astype(jnp.int32), valid
