"""Verbose demonstrations: every step as often as drawn, the answer once, and the prompts unchanged."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mlrl.tasks import mixtures, puzzles, verbose
from mlrl.types import Refused

SUMS = puzzles.arithmetic(digits=1, operands=4, scratchpad=True)


def texts(task, rows=200):
    source, index = np.arange(rows, dtype=np.int32) % len(task.sources), np.arange(rows, dtype=np.int32)
    tokens, valid = (np.asarray(x) for x in task.targets(source, index))
    return [task.vocabulary.decode(t[v][:-1]) for t, v in zip(tokens, valid)], valid, tokens


def test_steps_are_repeated_by_hand():
    tokens = jnp.asarray([[5, 9, 6, 9, 7, 1], [7, 1, 0, 0, 0, 0]])
    valid = jnp.asarray([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]], bool)
    step = jnp.asarray([[0, 0, 1, 1, 2, 2], [0] * 6])
    times = jnp.asarray([[2, 2, 0, 0, 1, 1], [1] * 6])
    found, there = verbose.repeated(tokens, valid, step, times, 2, 0)
    assert found.tolist() == [[5, 9, 5, 9, 7, 1, 0, 0, 0, 0], [7, 1] + [0] * 8]
    assert there.sum(axis=1).tolist() == [6, 2]


def test_demonstrations_say_each_total_up_to_twice_and_end_in_the_answer():
    plain, *_ = texts(SUMS)
    wordy, valid, tokens = texts(verbose.verbose(SUMS, most=2))
    assert wordy == texts(verbose.verbose(SUMS, most=2))[0] != texts(verbose.verbose(SUMS, most=2, seed=1))[0]
    assert (tokens[np.arange(200), valid.sum(axis=1) - 1] == SUMS.vocabulary.eos_ids[0]).all()
    for short, long in zip(plain, wordy):
        steps, kept = short.split(",")[:-1], long.split(",")
        assert kept[-1] == short.split(",")[-1]
        assert all(kept[:-1].count(step) <= 2 * steps.count(step) for step in kept[:-1])
        assert sorted(set(kept[:-1]), key=steps.index) == list(dict.fromkeys(kept[:-1]))  # in their order
    counts = [len(text.split(",")) for text in wordy]
    assert min(counts) == 1 and max(counts) == 5 and 2.5 < np.mean(counts) < 3.5


def test_prompts_stay_and_a_mixture_may_have_sources_without_steps():
    task = mixtures.mixture([SUMS, puzzles.arithmetic(digits=1)], name="both")
    both = verbose.verbose(task, fewest=2)
    assert both.at is task.at
    wordy, plain = texts(both)[0], texts(task)[0]
    assert wordy[1::2] == plain[1::2] and all(text.count(",") == 4 for text in wordy[0::2])


@pytest.mark.parametrize("task, knobs, words", [
    (puzzles.countdown(), {}, "scratchpad=True"), (SUMS, {"most": 0}, "most >= 1"), (SUMS, {"fewest": 3}, "<= most"),
    (dataclasses.replace(SUMS, in_graph=False), {}, "is on the host"),
])  # fmt: skip
def test_mistakes(task, knobs, words):
    with pytest.raises(Refused, match=words):
        verbose.verbose(task, **knobs)
