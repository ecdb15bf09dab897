"""Answers read out of completions, and judges of text: plain Python, importable without jax.

Judges are functions of (completion, example) -> a float, or a mapping of floats with an entry "reward".
"""

from __future__ import annotations

import decimal
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

_STRICT = re.compile(r"####\s*(-?\$?[0-9][0-9,]*(?:\.[0-9]+)?)")
_NUMBER = re.compile(r"(?<![\w.)])-?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)|(?<=[\w.)])[0-9][0-9,]*(?:\.[0-9]+)?")
_ANNOTATION = re.compile(r"<<[^<>]*>>")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ROLE = re.compile(r"([A-Z][\w'-]*)\s+is\s+(?:a\s+)?(knight|knave)\b")


def extract_strict(completion: str) -> str | None:
    """The number after the first "####", as GSM8K's solutions end: without commas and dollar signs; None if absent."""
    found = _STRICT.search(completion)
    return _bare(found.group(1)) if found else None


def extract_lenient(completion: str) -> str | None:
    """The last number anywhere, without commas and dollar signs; None if there is none.

    A minus belongs to the number only where it cannot be a subtraction: "5-3" ends in 3, "is -3" in -3.
    """
    found = _NUMBER.findall(completion)
    return _bare(found[-1]) if found else None


def extract_tagged(completion: str) -> str:
    """The text inside the last <answer>...</answer>; without one, the whole completion; spaces around it removed."""
    found = _TAGGED.findall(completion)
    return (found[-1] if found else completion).strip()


def without_annotations(solution: str) -> str:
    """A GSM8K solution without its calculator annotations <<48/2=24>>."""
    return _ANNOTATION.sub("", solution)


def same_number(a: str | None, b: str | None) -> bool:
    """Whether two texts are the same decimal number: "72" and "72.00" are. False if one is no number."""
    try:
        return a is not None and b is not None and decimal.Decimal(_bare(a)) == decimal.Decimal(_bare(b))
    except decimal.InvalidOperation:
        return False


def gsm8k_strict(completion: str, example: Mapping[str, Any]) -> float:
    """1.0 iff the number after "####" is the answer."""
    return float(same_number(extract_strict(completion), example["answer"]))


def gsm8k_lenient(completion: str, example: Mapping[str, Any]) -> float:
    """1.0 iff the last number is the answer."""
    return float(same_number(extract_lenient(completion), example["answer"]))


def gsm8k_score(completion: str, example: Mapping[str, Any]) -> dict[str, float]:
    """The strict judgement as the reward, and both judgements as parts, so that the logs report them apart."""
    strict = gsm8k_strict(completion, example)
    return {"reward": strict, "strict": strict, "lenient": gsm8k_lenient(completion, example)}


def knights_and_knaves_roles(completion: str) -> dict[str, bool]:
    """{name: is a knight} as the completion says, inside <answer> tags where there are any; the last word counts."""
    return {name: role == "knight" for name, role in _ROLE.findall(extract_tagged(completion))}


def knights_and_knaves_score(completion: str, example: Mapping[str, Any]) -> float:
    """1.0 iff every inhabitant's role is told, and right. Reads example["names"] and example["solution"]."""
    roles = knights_and_knaves_roles(completion)
    return float(all(roles.get(name) == knight for name, knight in zip(example["names"], example["solution"])))


def statements_hold(statements: Sequence[Any], roles: Sequence[bool]) -> bool:
    """Whether everyone's statement is true iff they are a knight: inhabitant i says the formula statements[i].

    Formulas are nested tuples: ("telling-truth", i), ("lying", i), and "not", "and", "or", "->", "<=>" over formulas.

    Raises: ValueError, for anything else.
    """

    def holds(formula: Any) -> bool:
        match formula:
            case ("telling-truth", int(i)):
                return roles[i]
            case ("lying", int(i)):
                return not roles[i]
            case ("not", part):
                return not holds(part)
            case ("and", *parts):
                return all([holds(part) for part in parts])
            case ("or", *parts):
                return any([holds(part) for part in parts])
            case ("->", left, right):
                return not holds(left) or holds(right)
            case ("<=>", left, right):
                return holds(left) == holds(right)
        raise ValueError(f"not a statement: {formula!r}")

    return len(statements) == len(roles) and all(holds(s) == role for s, role in zip(statements, roles))


def reasoning_gym_score(completion: str, example: Mapping[str, Any]) -> float:
    """The score of the generator's own verifier, between 0 and 1, for the text in <answer> tags or the completion.

    Reads example["generator"], example["config"] and example["entry"], as the reasoning_gym task provides them.
    """
    judge = _reasoning_gym_judge(example["generator"], tuple(sorted(example["config"].items())))
    return float(judge(extract_tagged(completion), example["entry"]))


@functools.lru_cache(maxsize=128)
def _reasoning_gym_judge(generator: str, config: tuple[tuple[str, Any], ...]) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(generator, size=1, seed=0, **dict(config)).score_answer


def _bare(number: str) -> str:
    return number.replace(",", "").replace("$", "").strip()
