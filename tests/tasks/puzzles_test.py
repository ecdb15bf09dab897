"""Puzzles: every answer against Python's arithmetic, no problem in both splits, demonstrations that verify."""

import jax
import numpy as np
import pytest

from mlrl import vocabularies
from mlrl.prompts import demonstrations, draw
from mlrl.tasks import puzzles, verifiers
from mlrl.types import Refused


def every_row(task):
    """(prompts, targets) of every example, as texts."""
    rows = np.arange(task.sizes[0], dtype=np.int32)
    batch = jax.device_get(task.at(np.zeros_like(rows), rows).check())
    tokens, valid = jax.device_get(task.targets(np.zeros_like(rows), rows))
    decode = task.vocabulary.decode
    return [decode(t[v]) for t, v in zip(batch.tokens, batch.valid)], [decode(t[v]) for t, v in zip(tokens, valid)]


@pytest.mark.parametrize(
    "settings",
    [
        {"operations": "+", "digits": 2},
        {"operations": "+-*", "digits": 1, "operands": 3},
        {"operations": "-", "digits": 1, "operands": 3, "modulus": 7},
    ],
)
def test_answers_are_those_of_python(settings):
    questions, answers = every_row(puzzles.arithmetic(split="test", **settings))
    assert all(question.endswith("=") for question in questions)
    assert [str(eval(question[:-1])) for question in questions] == answers


def test_an_answer_may_be_reversed_or_led_up_to():
    questions, answers = every_row(puzzles.arithmetic(digits=1, operands=3, reverse_answer=True, split="test"))
    assert [str(eval(q[:-1]))[::-1] for q in questions] == answers
    task = puzzles.arithmetic(operations="+-", digits=1, operands=3, scratchpad=True, split="test")
    for question, answer in zip(*every_row(task)):
        first, last = answer.split(",")
        assert (int(first), int(last)) == (eval(question[:3]), eval(question[:-1]))


@pytest.mark.parametrize("make", [
    lambda split: puzzles.arithmetic(operations="+-", digits=1, split=split),
    lambda split: puzzles.countdown(numbers=2, max_number=9, split=split),
])  # fmt: skip
def test_no_problem_is_in_both_splits_and_none_is_lost(make):
    train, test = make("train"), make("test")
    train_questions, test_questions = set(every_row(train)[0]), set(every_row(test)[0])
    assert not train_questions & test_questions
    if train.name.startswith("countdown"):
        numbers = lambda questions: {q.split(":")[0] for q in questions}  # noqa: E731
        assert not numbers(train_questions) & numbers(test_questions)
        assert len(numbers(train_questions) | numbers(test_questions)) == 81
    else:
        assert (len(train_questions), len(test_questions)) == (180, 20) == (train.sizes[0], test.sizes[0])


def test_levels_share_no_problem():
    parts = [set(every_row(puzzles.arithmetic(digits=d, split=s))[0]) for d in (1, 2) for s in ("train", "test")]
    assert len(set().union(*parts)) == sum(map(len, parts)) == 100 + 8100


def test_countdown_demonstrations_reach_the_target_with_every_number_once():
    task = puzzles.countdown(numbers=3, max_number=5, test_share=0.2, split="test")
    for question, expression in zip(*every_row(task)):
        shown, target = question[:-1].split(":")
        assert eval(expression) == int(target)
        used = expression.replace("+", ",").replace("-", ",").replace("*", ",").split(",")
        assert sorted(used) == sorted(shown.split(","))


def test_demonstrations_verify_and_other_answers_do_not():
    key, weights = jax.random.key(0), np.ones(1)
    task = puzzles.arithmetic(operations="+-", digits=2)
    batch, rows = draw(task, key, 0, 32, weights), demonstrations(task, key, 0, 32, weights)
    assert verifiers.arithmetic_verifier(rows, batch).tolist() == [1.0] * 32
    assert verifiers.arithmetic_verifier(rows, jax.tree.map(lambda x: np.roll(x, 1, axis=0), batch)).sum() < 4


def test_examples_hold_what_host_rewards_read():
    task = puzzles.countdown(numbers=3, use_all=False)
    example = task.example(0, 5)
    assert example["task"] == task.name and not example["use_all"]
    assert example["prompt"] == ",".join(map(str, example["numbers"])) + f":{example['target']}="
    assert eval(example["answer"]) == example["target"]
    assert set(puzzles.arithmetic().example(0, 0)) == {"prompt", "answer", "task"}
    with pytest.raises(Refused, match="plus_2x2 has the examples 0 to 7289"):
        puzzles.arithmetic().example(0, 7290)


def test_another_vocabulary_must_spell_each_symbol_as_one_token():
    numbers = vocabularies.characters("=+9876543210")
    task = puzzles.arithmetic(digits=1, vocabulary=numbers)
    assert task.example(0, 0) == puzzles.arithmetic(digits=1).example(0, 0)
    with pytest.raises(Refused, match="needs '.*': the alphabet '=.9876543210' lacks '-'"):
        puzzles.arithmetic(operations="-", vocabulary=numbers)
    assert puzzles.arithmetic(digits=1, vocabulary=vocabularies.byte_level()).example(0, 0)["answer"]


def test_names_say_the_settings():
    names = [puzzles.arithmetic(**settings).name for settings in (
        {}, {"operations": "+-", "modulus": 97}, {"operands": 3, "scratchpad": True, "split": "test"})]  # fmt: skip
    assert names == ["plus_2x2", "plus_minus_2x2_mod97", "plus_3x2_scratchpad_test"]
    levels = puzzles.arithmetic_levels(digits=(1, 2), rates=(1, 3), operations="*")
    assert levels.sources == ("times_2x1", "times_2x2") and levels.rates == (0.25, 0.75)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"operations": ""}, "operations must be some of"),
        ({"operations": "+/"}, "operations must be some of"),
        ({"operations": "++"}, "each once"),
        ({"digits": 0}, "digits must be at least 1, got 0"),
        ({"operands": 1}, "operands must be at least 2, got 1"),
        ({"modulus": 1}, "modulus must be 0"),
        ({"modulus": -3}, "modulus must be 0"),
        ({"digits": 5}, "has 8100000000 problems"),
        ({"operations": "*", "digits": 2, "operands": 5}, "answers up to"),
        ({"operations": "+*", "operands": 3, "scratchpad": True}, "running totals"),
        ({"split": "dev"}, "split must be 'train' or 'test', got 'dev'"),
        ({"split": "test", "test_share": 0.0}, "the test split is empty"),
        ({"test_share": 1.0}, "test_share must lie in"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(Refused, match=words):
        puzzles.arithmetic(**settings)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"numbers": 1}, "numbers must be at least 2"),
        ({"max_number": 1}, "max_number must be at least 2"),
        ({"numbers": 8, "max_number": 9}, "more than 2147483647"),
        ({"operations": "/"}, "operations must be some of"),
        ({"split": "x"}, "split must be"),
    ],
)
def test_countdown_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(Refused, match=words):
        puzzles.countdown(**settings)
