"""Prompts: exact permutations, a batch as a pure function of (key, step, weights), demonstrations, repetition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl import prompts, vocabularies
from mlrl.tasks.mixtures import mixture
from mlrl.tasks.puzzles import arithmetic
from mlrl.tasks.tables import table, truncate_right
from mlrl.types import Refused

KEY = jax.random.key(7)
VOCABULARY = vocabularies.characters("abcdefgh")


def letters(name, texts, **limits):
    examples = [{"prompt": text, "answer": text[::-1]} for text in texts]
    return table(examples, VOCABULARY, name=name, **limits)


SMALL = letters("small", ["a", "bc", "def", "gh", "abcd"])
MIXED = mixture([SMALL, letters("large", ["h" * n for n in range(1, 9)])], [1, 3], name="mixed")


def ids_of(task, steps, rows, weights, key=KEY):
    drawn = [prompts.draw(task, key, step, rows, weights) for step in steps]
    return np.concatenate([np.asarray(p.source) for p in drawn]), np.concatenate([np.asarray(p.index) for p in drawn])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 90, 1000, 4097])
def test_every_epoch_is_a_permutation(size):
    index = np.asarray(prompts.shuffled_index(KEY, np.arange(12_291), size))[: 3 * size].reshape(3, size)
    assert (np.sort(index, axis=1) == np.arange(size)).all()
    if size >= 16:
        assert (index[0] != index[1]).any() and (index[1] != index[2]).any()


def test_positions_and_numbers_are_unrelated():
    """Over 2000 epochs of 5, each number is at each place 400 times, within five standard deviations (18)."""
    index = np.asarray(prompts.shuffled_index(KEY, np.arange(12_291), 5))[:10_000].reshape(2000, 5)
    counts = np.stack([np.bincount(index[:, place], minlength=5) for place in range(5)])
    assert (abs(counts - 400) < 5 * 17.9).all()
    long = np.asarray(prompts.shuffled_index(KEY, np.arange(12_291), 12_291))
    assert abs(np.corrcoef(long, np.arange(12_291))[0, 1]) < 0.05
    assert abs(np.corrcoef(long[1:], long[:-1])[0, 1]) < 0.05


def test_the_largest_sizes_and_counters_stay_in_range():
    for size in (2**31 - 1, 2**31):
        index = np.asarray(prompts.shuffled_index(KEY, np.arange(2**32 - 50, 2**32, dtype=np.uint32), size))
        assert index.dtype == np.int32 and (index >= 0).all() and len(set(index.tolist())) == 50


def test_size_may_be_traced_and_differ_by_row():
    counter, size = jnp.arange(60), jnp.asarray([3, 10, 50] * 20)
    index = jax.jit(prompts.shuffled_index)(KEY, counter, size)
    alone = np.stack([prompts.shuffled_index(KEY, counter, n) for n in (3, 10, 50)])
    assert index.tolist() == alone[np.arange(60) % 3, np.arange(60)].tolist()


def test_an_epoch_visits_every_example_once_across_batches():
    """Batches of 3 over 5 examples: the epoch's border falls inside a batch."""
    source, index = ids_of(SMALL, range(5), 3, np.ones(1))
    assert (source == 0).all()
    epochs = index.reshape(3, 5)
    assert (np.sort(epochs, axis=1) == np.arange(5)).all()


def test_a_batch_depends_on_nothing_but_its_arguments():
    weights = np.asarray([0.3, 0.7], np.float32)
    again = [prompts.draw(MIXED, KEY, step, 6, weights) for step in (4, 2, 4)]
    assert jax.tree.all(jax.tree.map(np.array_equal, again[0], again[2]))
    assert not np.array_equal(again[0].index, again[1].index)
    other = prompts.draw(MIXED, jax.random.key(8), 4, 6, weights)
    assert not np.array_equal(again[0].index, other.index) or not np.array_equal(again[0].source, other.source)


def test_jit_changes_nothing():
    task = mixture([arithmetic(digits=1), arithmetic(digits=2)], [1, 2], name="sums")
    weights = jnp.asarray([0.25, 0.75])
    plain = prompts.draw(task, KEY, 3, 8, weights).check()
    jitted = jax.jit(lambda key, step, w: prompts.draw(task, key, step, 8, w))(KEY, jnp.int32(3), weights)
    assert jax.tree.all(jax.tree.map(np.array_equal, plain, jitted))
    rows = prompts.demonstrations(task, KEY, 3, 8, weights).check()
    jitted = jax.jit(lambda key, step, w: prompts.demonstrations(task, key, step, 8, w))
    jitted_rows = jitted(KEY, jnp.int32(3), weights)
    same = jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=a.dtype == np.float32), rows, jitted_rows)
    assert jax.tree.all(same)


def test_sources_get_their_share_of_every_batch():
    """Systematic sampling: of 8 rows, a source of weight w gets floor(8 w) or ceil(8 w)."""
    weights = np.asarray([0.3, 0.7], np.float32)
    counts = [np.bincount(ids_of(MIXED, [step], 8, weights)[0], minlength=2) for step in range(60)]
    assert {tuple(c) for c in counts} == {(2, 6), (3, 5)}
    share = np.sum(counts, axis=0)[0] / (60 * 8)
    assert abs(share - 0.3) < 0.02


@pytest.mark.parametrize("weights, only", [([0.0, 1.0], 1), ([1.0, 0.0], 0), ([5.0, 0.0], 0)])
def test_a_source_without_weight_is_never_drawn(weights, only):
    source, _ = ids_of(MIXED, range(20), 7, np.asarray(weights, np.float32))
    assert (source == only).all()


def test_prompts_of_unequal_length_are_padded_on_the_left():
    batch = prompts.draw(SMALL, KEY, 0, 5, np.ones(1)).check()
    assert batch.tokens.shape == (5, 4)
    for tokens, valid, index in zip(batch.tokens, batch.valid, batch.index):
        text = SMALL.example(0, int(index))["prompt"]
        assert valid.tolist() == [False] * (4 - len(text)) + [True] * len(text)
        assert tokens[valid].tolist() == VOCABULARY.encode(text)


def test_demonstrations_are_the_prompts_and_their_targets():
    batch = prompts.draw(SMALL, KEY, 2, 5, np.ones(1))
    rows = prompts.demonstrations(SMALL, KEY, 2, 5, np.ones(1)).check()
    for row in range(5):
        text = SMALL.example(0, int(batch.index[row]))
        act = rows.action_mask[row]
        assert rows.tokens[row][act].tolist() == [*VOCABULARY.encode(text["answer"]), VOCABULARY.eos_ids[0]]
        seen = rows.valid[row] & ~act
        assert rows.tokens[row][seen].tolist() == VOCABULARY.encode(text["prompt"])
        assert np.isnan(rows.behavior_log_probs[row][act]).all()
        assert (rows.behavior_log_probs[row][~act] == 0).all()
    assert not rows.truncated.any() and rows.group.tolist() == [0, 1, 2, 3, 4]


def test_a_cut_demonstration_is_truncated_and_a_missing_one_has_no_actions():
    cut = letters("cut", ["abcd", "a"], max_target_tokens=3, on_long_target=truncate_right)
    rows = prompts.demonstrations(cut, KEY, 0, 2, np.ones(1))
    index = prompts.draw(cut, KEY, 0, 2, np.ones(1)).index
    assert rows.truncated.tolist() == [i == 0 for i in index]
    silent = table([{"prompt": "a", "answer": "b", "target": None}], VOCABULARY, name="silent")
    rows = prompts.demonstrations(silent, KEY, 0, 1, np.ones(1)).check()
    assert not rows.action_mask.any() and not rows.truncated.any()


def test_repeat_keeps_groups_together():
    batch = prompts.draw(MIXED, KEY, 0, 4, np.ones(2))
    rows = prompts.repeat(batch, 3).check()
    assert rows.index.tolist() == np.repeat(batch.index, 3).tolist()
    assert isinstance(rows.tokens, np.ndarray)
    sums = prompts.repeat(prompts.first(arithmetic(digits=1), 4), 2).check()
    assert sums.example["answer_tokens"].shape[0] == 8


def test_the_first_prompts_take_turns_over_the_sources():
    batch = prompts.first(MIXED, 12)
    assert list(zip(batch.source.tolist(), batch.index.tolist())) == [
        (0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (1, 3), (0, 4), (1, 4), (1, 5), (1, 6)
    ]  # fmt: skip
    assert prompts.first(MIXED, 13).index.tolist()[-1] == 7
    assert prompts.first(MIXED, 1).index.tolist() == [0]


@pytest.mark.parametrize("count", [0, 14])
def test_more_prompts_than_there_are_is_refused(count):
    with pytest.raises(Refused, match=f"{count} prompts of mixed were asked for, it has 13"):
        prompts.first(MIXED, count)


def test_one_weight_per_source_is_needed():
    with pytest.raises(Refused, match="mixed has 2 sources .small, large.*got shape .3."):
        prompts.draw(MIXED, KEY, 0, 4, np.ones(3))
