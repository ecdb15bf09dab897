"""Shipped rewards of text: pure functions of (completion, example) that import nothing heavy.

Each is 1.0 or 0.0 unless it says otherwise, and lifted by `per_completion`. The answer of a completion is
what stands in its last <answer>...</answer>; without such tags, the whole completion.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from mlrl.tasks.answers import (
    extract_tagged,
    gsm8k_lenient,
    gsm8k_score,
    gsm8k_strict,
    knights_and_knaves_score,
    reasoning_gym_score,
)

__all__ = [
    "exact", "format_tags", "gsm8k_lenient", "gsm8k_score", "gsm8k_strict", "knights_and_knaves_score", "length",
    "numeric", "reasoning_gym_score", "regular_expression", "symbolic",
]  # fmt: skip

# A sign belongs to the number only where it cannot be an operation; commas only between thousands.
_NUMBER = re.compile(r"(?:(?<![\w.)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_LAYOUT = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")


def exact(completion: str, example: Mapping[str, Any]) -> float:
    """Whether the answer is example["answer"], character for character, but for the space around both."""
    return float(extract_tagged(completion) == str(example["answer"]).strip())


def numeric(completion: str, example: Mapping[str, Any], *, tolerance: float = 1e-6) -> float:
    """Whether the last number of the answer equals that of example["answer"].

    Equal means |a - b| <= tolerance * max(1, |b|). The minus of 5-3 is an operation, so that ends
    in 3. 0.0 if the completion has no number.

    Raises:
      ValueError: the example's answer has no number.
    """
    expected = _last_number(str(example["answer"]))
    if expected is None:
        raise ValueError(f"the example's answer has no number: {example['answer']!r}")
    found = _last_number(extract_tagged(completion))
    return float(found is not None and abs(found - expected) <= tolerance * max(1.0, abs(expected)))


def symbolic(completion: str, example: Mapping[str, Any]) -> float:
    """Whether math-verify finds the answer equal to example["answer"]: fractions, sets, intervals, LaTeX.

    Its own time limits are off: they only work in a main thread, and the worker's limit holds everywhere.

    Raises:
      ValueError: math-verify cannot read the example's answer.
    """
    import math_verify

    text = str(example["answer"])
    # Plain "1/2" is an expression only between dollars; an answer that is LaTeX already has its own.
    gold = math_verify.parse(text, parsing_timeout=None) or math_verify.parse(
        f"${text}$", parsing_timeout=None
    )
    if not gold:
        raise ValueError(f"math-verify cannot read the example's answer {text!r}")
    found = math_verify.parse(extract_tagged(completion), parsing_timeout=None)
    return float(math_verify.verify(gold, found, timeout_seconds=None))


def format_tags(completion: str, example: Mapping[str, Any]) -> float:
    """Whether the completion is <think>...</think> <answer>...</answer>, each once, and nothing else."""
    return float(_LAYOUT.fullmatch(completion) is not None and len(_TAG.findall(completion)) == 4)


def regular_expression(pattern: str) -> Callable[[str, Mapping[str, Any]], float]:
    """A reward that is 1.0 where `pattern` is found in the completion (anchor it with ^ and $ to match all of
    it).

    Raises:
      Refused: the pattern is not a regular expression.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        from mlrl.types import Refused

        raise Refused(f"regular_expression: {pattern!r} is not a regular expression: {error}") from error

    def regular_expression(completion: str, example: Mapping[str, Any]) -> float:
        return float(compiled.search(completion) is not None)

    return regular_expression


def length(completion: str, example: Mapping[str, Any]) -> float:
    """How many characters the completion has. (In tokens: `mlrl.rewards.graph.length_tokens`.)"""
    return float(len(completion))


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
