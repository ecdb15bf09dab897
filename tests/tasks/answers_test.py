"""Answers read out of completions, on texts written by hand; and that reading them needs neither jax nor TensorFlow."""

import subprocess
import sys

import pytest

from mlrl.tasks import answers


@pytest.mark.parametrize(
    "text, strict, lenient",
    [
        ("so 5+6=11\n#### 11", "11", "11"),
        ("#### 1,234", "1234", "1234"),
        ("#### $-5", None, "-5"),
        ("#### -5", "-5", "-5"),
        ("####72.50 dollars", "72.50", "72.50"),
        ("#### 7\n#### 8", "7", "8"),
        ("the answer is 42.", None, "42"),
        ("it costs $1,000.", None, "1000"),
        ("48-24", None, "24"),
        ("(3)-4", None, "4"),
        ("x = -3", None, "-3"),
        ("between 2 and .5", None, ".5"),
        ("#### none", None, None),
        ("", None, None),
    ],
)
def test_strict_and_lenient_extraction(text, strict, lenient):
    assert (answers.extract_strict(text), answers.extract_lenient(text)) == (strict, lenient)


@pytest.mark.parametrize(
    "a, b, same",
    [("72", "72.00", True), ("1,000", "1000", True), ("-0", "0", True), ("7", "8", False), (None, "1", False),
     ("x", "1", False), ("0.1", "0.10", True)],
)  # fmt: skip
def test_numbers_are_compared_as_decimals(a, b, same):
    assert answers.same_number(a, b) is same


def test_gsm8k_is_judged_strictly_and_leniently():
    example = {"answer": "1234"}
    assert answers.gsm8k_score("#### 1,234.0", example) == {"reward": 1.0, "strict": 1.0, "lenient": 1.0}
    assert answers.gsm8k_score("it is 1234", example) == {"reward": 0.0, "strict": 0.0, "lenient": 1.0}
    assert answers.gsm8k_score("#### 1234, not 5", example) == {"reward": 1.0, "strict": 1.0, "lenient": 0.0}
    assert answers.gsm8k_score("", example) == {"reward": 0.0, "strict": 0.0, "lenient": 0.0}


def test_calculator_annotations_are_removed():
    assert answers.without_annotations("48/2 = <<48/2=24>>24 clips") == "48/2 = 24 clips"


@pytest.mark.parametrize(
    "completion, score",
    [
        ("(1) Ann is a knight\n(2) Bo is a knave", 1.0),
        ("Ann is a knight and Bo is a knave.", 1.0),
        ("If Bo is a knight then no. <answer>Ann is a knight, Bo is a knave</answer>", 1.0),
        ("Suppose Bo is a knight. So Bo is a knave, and Ann is a knight", 1.0),
        ("Ann is a knight", 0.0),
        ("Ann is not a knave, Bo is a knave", 0.0),
        ("Ann is a knight, Bo is a knight", 0.0),
        ("Ann is a knight, Bo is a knave <answer>Bo is a knave</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_knights_and_knaves_wants_every_role(completion, score):
    assert answers.knights_and_knaves_score(completion, {"names": ["Ann", "Bo"], "solution": [True, False]}) == score


def test_statements_hold_for_the_solution_alone():
    statements = (("not", ("telling-truth", 2)), ("or", ("telling-truth", 1), ("lying", 2)),
                  ("<=>", ("telling-truth", 1), ("lying", 1)))  # fmt: skip
    roles = [[bool(n & 4), bool(n & 2), bool(n & 1)] for n in range(8)]
    assert [r for r in roles if answers.statements_hold(statements, r)] == [[True, True, False]]
    assert answers.statements_hold((("->", ("lying", 1), ("telling-truth", 1)), ("lying", 0)), [False, True]) is False
    with pytest.raises(ValueError, match="not a statement"):
        answers.statements_hold((("maybe", 0),), [True])


def test_reasoning_gym_is_judged_by_its_own_verifier():
    entry = {"question": "?", "answer": "12", "metadata": {"source_dataset": "chain_sum", "source_index": 0}}
    example = {"generator": "chain_sum", "config": {"min_terms": 2, "max_terms": 2}, "entry": entry}
    assert answers.reasoning_gym_score("Thus <answer> 12 </answer>", example) == 1.0
    assert answers.reasoning_gym_score("12", example) == 1.0
    assert answers.reasoning_gym_score("13", example) < 0.5


def test_workers_can_judge_without_jax():
    code = "import sys, mlrl.tasks.answers; print({'jax', 'tensorflow', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
