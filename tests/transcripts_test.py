"""Transcripts of two attempts: their text, their shares, and what of them is learned."""

import functools

import jax
import numpy as np
import pytest

from mlrl import vocabularies
from mlrl.tasks import puzzles, tables
from mlrl.transcripts import two_attempts
from mlrl.types import Refused

TASK = puzzles.arithmetic(digits=2)
WORDS, B = TASK.vocabulary, 512


@functools.cache
def rows(**shares):
    make = jax.jit(lambda key: two_attempts(TASK, key, 3, B, np.ones(1, np.float32), told="*:", **shares))
    return jax.device_get(make(jax.random.key(0)))


def attempts(batch, b):
    """(prompt, first, what is told, second) as text, each as the mask and the turns say."""
    row = jax.tree.map(lambda x: x[b], batch.rollout)
    text = lambda where: WORDS.decode(row.tokens[where])
    new = row.valid & ((row.turn == 1) | row.action_mask)
    return (text(row.valid & ~new), text(row.action_mask & (row.turn == 0)), text(new & ~row.action_mask),
            text(row.action_mask & (row.turn == 1)))  # fmt: skip


def test_rows_are_transcripts_without_holes():
    batch = rows()
    batch.rollout.check()
    kinds = {"right": 0, "copied": 0, "mended": 0, "edited": 0}
    for b in range(B):
        prompt, first, told, second = attempts(batch, b)
        answer = str(sum(map(int, prompt[:-1].split("+"))))
        differ = lambda x, y: sum(p != q for p, q in zip(x, y, strict=True))
        assert told == "*:" and differ(first, answer) <= 1 and differ(first, second) <= 1
        kinds["right"] += first == answer
        kinds["copied" if first == second else "mended" if second == answer else "edited"] += 1
        real = np.flatnonzero(batch.rollout.valid[b])
        assert (np.diff(real) == 1).all() and (np.diff(batch.rollout.turn[b]) >= 0).all()
        assert [WORDS.eos_ids[0]] * 2 == [t for t in batch.rollout.tokens[b][batch.rollout.action_mask[b]]
                                          if t in WORDS.eos_ids]  # fmt: skip
        learned = batch.mask[b] & (batch.rollout.turn[b] == 0)
        assert learned.any() == (first == answer), "a wrong first attempt is read, and not learned"
    # copies are those meant (0.5), and the right answer said again (0.2 of those right at first)
    for kind, share in {"right": 0.5, "copied": 0.6, "mended": 0.1, "edited": 0.3}.items():
        assert kinds[kind] / B == pytest.approx(share, abs=0.07), kind


def test_pairs_of_a_wrong_and_the_right_answer():
    batch = rows(first_right=0.0, copied=0.0, mended=1.0, learn_first=False)
    for b in range(32):
        prompt, first, _, second = attempts(batch, b)
        assert second == str(sum(map(int, prompt[:-1].split("+")))) != first
    np.testing.assert_array_equal(batch.mask, batch.rollout.action_mask & (batch.rollout.turn == 1))


def test_steps_differ_and_repeat():
    make = lambda step: two_attempts(TASK, jax.random.key(0), step, 8, np.ones(1, np.float32)).rollout.tokens
    assert (make(0) == make(0)).all() and (make(0) != make(1)).any()


def test_mistakes_are_refused():
    give = functools.partial(two_attempts, TASK, jax.random.key(0), 0, 8, np.ones(1, np.float32))
    with pytest.raises(Refused, match=r"copied \+ mended must lie in \[0, 1\], got 1.2"):
        give(copied=0.6, mended=0.6)
    stored = tables.table([{"prompt": "1", "answer": "2"}], vocabularies.characters("12"), name="stored")
    with pytest.raises(Refused, match="needs a task in the graph"):
        two_attempts(stored, jax.random.key(0), 0, 8, np.ones(1, np.float32))
