"""Rewards of programs that a model wrote: tests passed, outputs told, inputs found. All run in mlrl.sandbox.

Functions of (completion, example), lifted by `per_completion`. Each worker process keeps a sandbox of its own warm. A
call takes at most about `seconds` per program it runs: per_completion.timeout_seconds must be longer than that.

What a test expects does not enter the process of the model's program. Of `assert f(2) == 4` that process evaluates
f(2), and its value is compared here; so a program that forges its result must know the answer to forge. A test of
another form, such as `assert math.isclose(f(2), 4)`, is evaluated there whole: a program that means to can forge it.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Mapping
from typing import Any

from mlrl.sandbox.pool import Pool
from mlrl.sandbox.results import Job, Limits, Result
from mlrl.sandbox.values import is_literal

_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n?```|\Z)", re.DOTALL)


def tests_passed(
    completion: str, example: Mapping[str, Any], *, seconds: float = 2.0, memory_bytes: int = 256 << 20
) -> dict[str, float]:
    """The share of example["tests"] that the completion's program passes.

        reward = passed / tests,   outcome = 1 if all are passed, else 0

    A program that ends, hangs or prints too much in the middle of its tests keeps those that came before. One limit
    holds for program and tests together. Values are equal as in Python: 1 == 1.0, and lists in their order.

    Args:
      completion: a program: the last ```python block, or the whole text where there is none.
      example: "tests", assert statements; "setup" (optional), a program that is run between program and tests.
      seconds, memory_bytes: limits of the sandbox.
    Returns:
      {"reward", "outcome", "runs"}: runs is 1.0 where any test came as far as a value.
    Raises:
      ValueError: there is no test, or one is not an assert statement.
    """
    limits = Limits(seconds=seconds, memory_bytes=memory_bytes)
    halves = [_halves(test) for test in example["tests"]]
    if not halves:
        raise ValueError("the example has no tests")
    program = f"{program_of(completion)}\n{example.get('setup', '')}"
    result = _run(program, tuple(asked for asked, _ in halves), limits)
    passed = sum(a.status == "ok" and a.value == wanted for a, (_, wanted) in zip(result.answers, halves))
    runs = any(answer.status in ("ok", "not_a_value") for answer in result.answers)
    return {"reward": passed / len(halves), "outcome": float(passed == len(halves)), "runs": float(runs)}


def output_found(completion: str, example: Mapping[str, Any]) -> float:
    """1.0 iff the first line of the completion is a literal equal to example["output"] (deduction).

    The program is not run: both are read as literals.
    """
    said, limits = first_line(completion), Limits()
    if not is_literal(said):
        return 0.0
    (answer,) = _run("", (said,), limits).answers
    return float(answer.status == "ok" and (True, answer.value) == _value(str(example["output"])))


def input_found(
    completion: str, example: Mapping[str, Any], *, seconds: float = 2.0, memory_bytes: int = 256 << 20
) -> float:
    """1.0 iff f of the first line of the completion is example["output"] (abduction): any such input is right.

    Literals alone, so that an input cannot change what f does. (13 of CRUXEval's 800 own inputs are calls.)

    Args:
      completion: the arguments of f, as literals between commas.
      example: "code", which defines f, and "output".
      seconds, memory_bytes: limits of the sandbox.
    """
    limits, given = Limits(seconds=seconds, memory_bytes=memory_bytes), first_line(completion)
    if not is_literal(f"[{given}]"):
        return 0.0
    (answer,) = _run(example["code"], (f"f({given})",), limits).answers
    return float(answer.status == "ok" and (True, answer.value) == _value(str(example["output"])))


def program_of(completion: str) -> str:
    """The last fenced block of a completion, or the whole of it; a block may be cut off at the end of the text."""
    found = _FENCED.findall(completion)
    return found[-1] if found else completion


def first_line(completion: str) -> str:
    """The first line with anything on it, without the spaces around it."""
    return next((line.strip() for line in completion.splitlines() if line.strip()), "")


@functools.lru_cache(maxsize=1 << 14)
def _halves(test: str) -> tuple[str, Any]:
    """(what the program is asked, what it should say): `assert a == b` is (a, value of b), where b has one without the
    program; any other assert is (bool(test), True).
    """
    try:
        (statement,) = ast.parse(test.strip()).body
    except (SyntaxError, ValueError):
        statement = None
    if not isinstance(statement, ast.Assert):
        raise ValueError(f"a test must be one assert statement, got {test!r}")
    match statement.test:
        case ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]):
            has_one, value = _value(ast.unparse(right))
            if has_one:
                return ast.unparse(left), value
    return f"bool({ast.unparse(statement.test)})", True


@functools.lru_cache(maxsize=1 << 14)
def _value(expression: str) -> tuple[bool, Any]:
    """(whether it has one, the value) of an expression, without the program of any model."""
    (answer,) = _run("", (expression,), Limits()).answers
    return answer.status == "ok", answer.value


def _run(program: str, expressions: tuple[str, ...], limits: Limits) -> Result:
    return _sandbox(limits).run([Job(program, expressions)])[0]


@functools.lru_cache(maxsize=4)
def _sandbox(limits: Limits) -> Pool:
    return Pool(limits, workers=1)
