"""Computed pairs: one digit is changed, always the same one, and the labels turn where it is."""

import jax
import numpy as np
import pytest

from mlrl import vocabularies
from mlrl.tasks import mixtures, pairs, puzzles, tables
from mlrl.types import Refused

ROWS = np.arange(64, dtype=np.int32)
ZEROS = np.zeros_like(ROWS)
SUMS = puzzles.arithmetic(digits=2)
CHAINS = puzzles.arithmetic(digits=1, operands=4, scratchpad=True)


def texts(task, found):
    return [[task.vocabulary.decode(t[v]) for t, v in zip(*row)] for row in zip(found.tokens, found.valid)]


def test_the_second_candidate_differs_in_one_digit():
    task = pairs.against_corrupted(SUMS)
    found = jax.device_get(task.candidates(ZEROS, ROWS))
    assert task.name == "plus_2x2_pairs" and task.sources == SUMS.sources
    assert (found.outcome == [1.0, 0.0]).all() and found.outcome.dtype == np.float32
    for index, (right, wrong) in enumerate(texts(task, found)):
        assert right == SUMS.example(0, index)["answer"] if index < 3 else True
        assert len(wrong) == len(right) and wrong.isdigit()
        assert sum(a != b for a, b in zip(right, wrong)) == 1
    changed = (found.tokens[:, 0] != found.tokens[:, 1]).argmax(axis=1)
    assert set(changed.tolist()) == {0, 1, 2}  # every place is hit
    moved = (found.tokens[ROWS, 1, changed] - found.tokens[ROWS, 0, changed]) % 10
    assert set(moved.tolist()) == set(range(1, 10))  # by every distance


def test_the_change_depends_only_on_source_index_and_seed():
    task = pairs.against_corrupted(SUMS)
    whole = jax.device_get(task.candidates(ZEROS, ROWS))
    some = jax.device_get(jax.jit(task.candidates)(ZEROS[:5], ROWS[::-1][:5]))
    jax.tree.map(np.testing.assert_array_equal, some, jax.tree.map(lambda x: x[::-1][:5], whole))
    other = jax.device_get(pairs.against_corrupted(SUMS, seed=1).candidates(ZEROS, ROWS))
    assert (other.tokens[:, 0] == whole.tokens[:, 0]).all() and (other.tokens[:, 1] != whole.tokens[:, 1]).any()


def test_step_labels_are_right_until_the_planted_error():
    found = jax.device_get(pairs.against_corrupted(CHAINS, separator=",").candidates(ZEROS, ROWS))
    firsts = set()
    for right, wrong, labels in zip(*(texts(CHAINS, found) and found.tokens[:, c] for c in (0, 1)), found.labels):
        clean, spoiled = (row[~np.isnan(row)] for row in labels)
        assert clean.tolist() == [1.0] * 3  # two commas and the EOS
        error = (right != wrong).argmax()
        ends = np.flatnonzero(~np.isnan(labels[1]))
        assert spoiled.tolist() == [float(end < error) for end in ends]
        firsts.add(int(spoiled.sum()))
    assert firsts == {0, 1, 2}


def test_without_a_separator_the_end_alone_is_labelled():
    found = jax.device_get(pairs.against_corrupted(SUMS).candidates(ZEROS, ROWS))
    assert (np.nansum(found.labels, axis=2) == [1.0, 0.0]).all()
    assert ((~np.isnan(found.labels)).sum(axis=2) == 1).all()


def test_a_mixture_in_the_graph_pads_the_shorter():
    parts = [pairs.against_corrupted(puzzles.arithmetic(digits=d)) for d in (1, 2)]
    mixed = mixtures.mixture(parts)
    source = np.asarray([0, 1, 0], np.int32)
    found = jax.device_get(mixed.candidates(source, ROWS[:3]))
    alone = [jax.device_get(parts[s].candidates(ZEROS[:1], ROWS[i : i + 1])) for i, s in enumerate(source)]
    assert texts(mixed, found) == [texts(mixed, one)[0] for one in alone]
    assert np.isnan(found.labels[0, :, -1]).all() and (found.outcome == [1.0, 0.0]).all()


def test_a_task_on_the_host_is_refused():
    task = tables.table([{"prompt": "1", "answer": "2"}], vocabularies.byte_level(), name="stored")
    with pytest.raises(Refused, match="needs a task in the graph"):
        pairs.against_corrupted(task)
