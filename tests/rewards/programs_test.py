"""Rewards of programs: what passes, what is lost when a program misbehaves, and that forging takes knowing."""

import numpy as np
import pytest
from reward_worlds import EOS, prompts_of, rollout_of, task_of

from mlrl.rewards import programs
from mlrl.rewards.completions import per_completion
from mlrl.rewards.programs import first_line, input_found, output_found, program_of
from mlrl.sandbox.values import is_literal

passed = programs.tests_passed  # not a name that pytest would collect
SQUARE = {"tests": ("assert f(2) == 4", "assert f(-3) == 9", "assert f(0) == 0", "assert f(0.5) == .25")}
RIGHT = "def f(x):\n    return x * x"


@pytest.mark.parametrize(
    "completion, share",
    [
        (RIGHT, 1.0),
        (f"Thus:\n```python\n{RIGHT}\n```\nwhich squares.", 1.0),
        (f"```\ndef f(x): return 0\n```\nNo:\n```py\n{RIGHT}", 1.0),
        ("def f(x): return x + 2", 0.25),
        ("def f(x): return abs(x) * x", 0.75),
        ("def f(x):\n    if x == 0: raise SystemExit\n    return x * x", 0.75),
        ("import os\ndef f(x):\n    return x * x", 0.0),
        ("def f(x): return", 0.0),
        ("this is not Python", 0.0),
        ("", 0.0),
    ],
)
def test_the_share_of_tests_that_pass(completion, share):
    found = passed(completion, SQUARE)
    assert (found["reward"], found["outcome"]) == (share, float(share == 1.0))


def test_what_passed_before_a_program_hangs_is_kept():
    program = "def f(x):\n    while x == 0: pass\n    return x * x"
    assert passed(program, SQUARE, seconds=0.3) == {"reward": 0.5, "outcome": 0.0, "runs": 1.0}


@pytest.mark.parametrize("program", [
    "class Always:\n    def __eq__(self, other): return True\ndef f(x): return Always()",
    "import sys\nsys.exit(0)",
    "import sys\nsys.modules['os']._exit(0)",
    "def f(x): return float('nan')",
    "print('4\\n9\\n0\\n0.25\\nok')",
    "import builtins\ndef f(x): return 4",
])  # fmt: skip
def test_the_tests_cannot_be_passed_without_the_answers(program):
    assert passed(program, SQUARE)["reward"] == 0.0


def test_what_a_test_expects_is_not_in_the_process_of_the_program():
    hunt = """
import sys
def f():
    wanted = ''.join(['7393', '9133'])  # not a constant of this program
    found, frame = [], sys._getframe().f_back
    while frame:
        found += [frame.f_locals, frame.f_code.co_consts]
        frame = frame.f_back
    found += [o for o in sys.modules['gc'].get_objects() if isinstance(o, (list, tuple, dict))]
    return int(wanted) if any(wanted in str(o) for o in found if len(o) < 100 and o is not found) else None
"""
    example = {"tests": ("assert f() == 73939133",)}
    assert passed("def f(): return 73939133", example)["reward"] == 1.0
    assert passed(hunt, example) == {"reward": 0.0, "outcome": 0.0, "runs": 1.0}
    whole = {"tests": ("assert f() in [73939133]",)}  # evaluated whole in that process: the hunt finds it
    assert passed(hunt, whole) == {"reward": 1.0, "outcome": 1.0, "runs": 1.0}


def test_the_forms_of_tests():
    example = {
        "setup": "import math\nlist_of = f(1)", "tests": (
            "assert set(f(3)) == set([1, 2, 3])", "assert math.isclose(sum(f(2)), 3.0)", "assert list_of == [1]",
            "assert f(2) == [1.0, 2.0]", "assert not f(0)", "assert len(f(4)) == math.floor(4.5)",
            "assert f(2) != [1, 2]",
        )}  # fmt: skip
    assert passed("def f(n): return list(range(1, n + 1))", example)["reward"] == pytest.approx(6 / 7)


@pytest.mark.parametrize("tests", [(), ("f(1) == 2",), ("assert f(",), ("assert f(1)\nassert f(2)",)])
def test_an_example_without_usable_tests_is_an_error(tests):
    with pytest.raises(ValueError, match="tests|must be one assert"):
        passed(RIGHT, {"tests": tests})


def test_outputs_are_literals_and_equal_as_values():
    example = {"output": "[(4, 1), 'a']"}
    assert [output_found(text, example) for text in (
        "[(4, 1), 'a']", '\n  [(4,1),"a"] \nand so on', "[(4.0, True), 'a']", "[(4, 2), 'a']", "list([(4, 1), 'a'])",
        "[(2 + 2, 1), 'a']", "", "[" * 5000)] == [1, 1, 1, 0, 0, 0, 0, 0]  # fmt: skip


def test_any_input_with_the_output_is_right():
    example = {"code": "def f(a, b):\n    return a + b", "output": "5"}
    assert [input_found(text, example) for text in (
        "2, 3", "5, 0", "-1, 6", "2.5, 2.5", "b=2, a=3", "1, 2", "2", "", "f(1, 1), 3", "*[2, 3]", "2, 3); (5",
        "'a', 5")] == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]  # fmt: skip


def test_texts_are_read_as_people_write_them():
    assert program_of("a ```python\nx\n``` b ```\ny\n``` c") == "y" and program_of("x = 1") == "x = 1"
    assert first_line("\n \n  4 \n5") == "4" and first_line("") == ""
    assert is_literal("{'a': [-1, (2.5, None)]}") and not is_literal("a") and not is_literal("1 + 1")
    assert not any(map(is_literal, ("-[1]", "-True", "--1", "{[1]}", "{**{}}", "{[]: 1}")))  # not read


def test_it_is_a_reward_of_rows_in_worker_processes():
    """The rows' text is the completion, the tests are the examples'."""
    task = task_of([None] * 3)
    texts = [RIGHT, "def f(x): return 4", "while True: pass"]
    task.vocabulary.decode = lambda ids: texts[ids[0] - EOS - 1]
    task = type(task)(**{**vars(task), "example": lambda source, index: {"prompt": "", "answer": "", **SQUARE}})
    reward = per_completion(passed, workers=1)
    rollout = rollout_of_numbers(3)
    rewards, _ = reward.update((), rollout, prompts_of(3), task, None)
    np.testing.assert_allclose(rewards.parts["tests_passed"], [1.0, 0.25, 0.0])
    np.testing.assert_allclose(rewards.outcome, [1.0, 0.0, 0.0])
    assert rewards.scored.all()


def rollout_of_numbers(rows):
    rollout = rollout_of(["a"] * rows)
    tokens = rollout.tokens.copy()
    tokens[:, 2] = EOS + 1 + np.arange(rows)
    return rollout.replace(tokens=tokens)
