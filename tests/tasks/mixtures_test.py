"""Mixtures: in the graph, in tables and of both; widths, examples, rates, and what is refused."""

import jax
import numpy as np
import pytest

from mlrl import vocabularies
from mlrl.prompts import draw, first
from mlrl.tasks.mixtures import mixture
from mlrl.tasks.puzzles import VOCABULARY, arithmetic, countdown
from mlrl.tasks.tables import table
from mlrl.types import Refused


def stored(name, texts=("1", "22", "333"), vocabulary=VOCABULARY):
    return table([{"prompt": text, "answer": text} for text in texts], vocabulary, name=name)


SUMS, GAMES = arithmetic(digits=1), countdown(numbers=2)


def texts_of(task, batch):
    return [task.vocabulary.decode(np.asarray(t)[np.asarray(v)]) for t, v in zip(batch.tokens, batch.valid)]


def test_sources_in_the_graph_keep_their_prompts_and_examples():
    task = mixture([SUMS, GAMES], name="both")
    batch = first(task, 8).check()
    assert task.in_graph and batch.source.tolist() == [0, 1] * 4
    assert texts_of(task, batch) == [task.example(int(s), int(i))["prompt"] for s, i in zip(batch.source, batch.index)]
    for part, own in ((0, SUMS), (1, GAMES)):
        alone = first(own, 4)
        for key, leaf in alone.example.items():
            mixed = np.asarray(batch.example[key])[part::2]
            inside = tuple(slice(0, n) for n in leaf.shape)
            np.testing.assert_array_equal(mixed[inside], leaf)
    assert set(batch.example) == set(first(SUMS, 1).example) | set(first(GAMES, 1).example)
    assert (np.asarray(batch.example["target"])[::2] == 0).all()  # sums have none
    tokens, valid = task.targets(batch.source, batch.index)
    answers = [task.vocabulary.decode(t[v]) for t, v in zip(np.asarray(tokens), np.asarray(valid))]
    assert answers == [task.example(int(s), int(i))["answer"] for s, i in zip(batch.source, batch.index)]


def test_tables_and_puzzles_mix_on_the_host():
    task = mixture([stored("texts"), SUMS], [1, 1], name="both")
    batch = first(task, 6).check()
    assert not task.in_graph and isinstance(batch.tokens, np.ndarray)
    assert texts_of(task, batch) == [task.example(int(s), int(i))["prompt"] for s, i in zip(batch.source, batch.index)]
    assert batch.tokens.shape[1] == 4 and not batch.example["answer_valid"][::2].any()
    only_one = draw(task, jax.random.key(0), 0, 4, np.asarray([1.0, 0.0])).check()
    assert only_one.tokens.shape == (4, 4)  # the width does not depend on what was drawn


def test_rates_are_normalized_and_nested():
    inner = mixture([stored("a"), stored("b")], [1, 3], name="inner")
    outer = mixture([inner, stored("c")], [3, 1], name="outer")
    assert outer.sources == ("a", "b", "c") and outer.sizes == (3, 3, 3)
    np.testing.assert_allclose(outer.rates, [0.1875, 0.5625, 0.25])
    assert outer.example(1, 2)["task"] == "b" and outer.example(2, 0)["task"] == "c"
    assert mixture([stored("a"), stored("b")]).rates == (0.5, 0.5)


def test_one_task_is_its_own_mixture():
    task = stored("a")
    assert mixture([task]) is task
    named = mixture([task], name="m")
    assert (named.name, named.sources) == ("m", ("a",))


@pytest.mark.parametrize(
    "tasks, rates, words",
    [
        ([], (), "at least one task"),
        ([stored("a"), stored("a")], (), "two sources are called 'a'"),
        ([stored("a"), stored("b", vocabulary=vocabularies.characters("123"))], (), "a and b must have the same"),
        ([stored("a"), stored("b")], (1,), "has 2 tasks, but 1 rates"),
        ([stored("a"), stored("b")], (1, -1), "not negative"),
        ([stored("a"), stored("b")], (0, 0), "not all zero"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tasks, rates, words):
    with pytest.raises(Refused, match=words):
        mixture(tasks, rates, name="m")
