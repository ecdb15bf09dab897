"""Prompt templates: question -> prompt. A chat template is one too: see vocabularies.as_user_message."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


def plain(question: str) -> str:
    """The question as it is."""
    return question


def question_answer(question: str) -> str:
    """Question: ... / Answer:, on two lines."""
    return f"Question: {question}\nAnswer:"


def answer_after_hashes(question: str) -> str:
    """Asks for GSM8K's form of an answer; for chat models, inside of a chat template."""
    return f'{question}\nThink step by step, and end with "#### " and the number.'


def knights_and_knaves(quiz: str) -> str:
    """The quiz, and the form of the answer that answers.knights_and_knaves_roles reads."""
    return f"{quiz}\nAnswer with one line per inhabitant, such as (1) Zoey is a knight.\n"


def translation(*, source: str = "English", target: str = "German") -> Callable[[str], str]:
    """A template that names both languages, on two lines: English: ... / German:"""
    return lambda text: f"{source}: {text}\n{target}:"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A suggestion for a misspelled name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
