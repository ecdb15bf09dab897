"""Mistakes made at random: in lines of a text, in values of JSON, in bytes; all by a given random.Random."""

from __future__ import annotations

import copy
import json
import random
import re
from typing import Any

WORDS = "0123456789.-+_=@%#\\'\"()[]{},:/ \tabcxyzABC\n\0é\u2028\ud800"
STRANGE = (None, True, False, 0, 1, -1, 3, 7.5, -0.5, 1e-9, 1e308, 2**40, "", "x", "3", "\ud800", [], [1], {},
           {"a": 1}, [[]], float("nan"), float("inf"), -float("inf"))  # fmt: skip
LITERALS = ("0", "1", "-1", "3", "2.5", "-0.5", "1e-9", "1e308", "10**6", "1099511627776", "None", "True", "False",
            "''", "'x'", "'3'", "()", "(1,)", "(1, 2)", "[]", "{}", "{'a': 1}", "@nothing", "@nothing.here()",
            "%NOTHING", "%STEPS", "@puzzles.arithmetic", "@puzzles.arithmetic()", "(@policy.ppo_clip,)",
            "1e400")  # fmt: skip


def text(chance: random.Random, lines: str) -> str:
    """A text of lines with one to three mistakes."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        lines = chance.choice(_OF_TEXT)(chance, lines)
    return lines


def json_value(chance: random.Random, value: Any) -> Any:
    """A copy of a value of JSON with one or two mistakes, anywhere inside."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 2))):
        value = _changed(chance, value, depth=0)
    return value


def json_text(chance: random.Random, stored: str) -> str:
    """A JSON text of which a value is another, or which is broken as any text is."""
    if chance.random() < 0.2:
        return text(chance, stored)
    return json.dumps(json_value(chance, json.loads(stored)), indent=chance.choice((None, 1)))


def data(chance: random.Random, stored: bytes) -> bytes:
    """Bytes with a flipped bit, a part that is missing, repeated or strange, or an early end."""
    if not stored:
        return bytes([chance.randrange(256)])
    first = chance.randrange(len(stored))
    last = min(len(stored), first + chance.choice((1, 4, 64, 4096)))
    kind = chance.choice(("flip", "flip", "flip", "cut", "missing", "repeated", "strange", "empty"))
    return {
        "flip": lambda: stored[:first] + bytes([stored[first] ^ (1 << chance.randrange(8))]) + stored[first + 1 :],
        "cut": lambda: stored[:first],
        "missing": lambda: stored[:first] + stored[last:],
        "repeated": lambda: stored[:last] + stored[first:],
        "strange": lambda: stored[:first] + chance.randbytes(last - first) + stored[last:],
        "empty": lambda: b"",
    }[kind]()


def _changed(chance: random.Random, value: Any, depth: int) -> Any:
    inner = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not inner or (depth and chance.random() < 0.3):
        return chance.choice(STRANGE)
    key, kind = chance.choice(inner), chance.choice(("change", "change", "change", "remove", "add", "rename"))
    if kind == "change" or (kind == "rename" and isinstance(value, list)):
        value[key] = _changed(chance, value[key], depth + 1)
    elif kind == "remove":
        del value[key]
    elif isinstance(value, list):
        value.insert(key, chance.choice((copy.deepcopy(value[key]), chance.choice(STRANGE))))
    elif kind == "rename":
        value[_misspelled(chance, str(key))] = value.pop(key)
    else:
        value[_misspelled(chance, str(key))] = chance.choice(STRANGE)
    return value


def _misspelled(chance: random.Random, word: str) -> str:
    at = chance.randrange(len(word) + 1)
    return word[:at] + chance.choice(WORDS[:29]) + word[at + chance.randrange(2) :]


def _remove(chance: random.Random, lines: str) -> str:
    parts = lines.splitlines(True)
    if parts:
        del parts[chance.randrange(len(parts))]
    return "".join(parts)


def _repeat(chance: random.Random, lines: str) -> str:
    parts = lines.splitlines(True)
    if parts:
        parts.insert(chance.randrange(len(parts) + 1), chance.choice(parts))
    return "".join(parts)


def _swap(chance: random.Random, lines: str) -> str:
    parts = lines.splitlines(True)
    if len(parts) > 1:
        a, b = chance.sample(range(len(parts)), 2)
        parts[a], parts[b] = parts[b], parts[a]
    return "".join(parts)


def _misspell(chance: random.Random, lines: str) -> str:
    names = list(re.finditer(r"[A-Za-z_]{3,}", lines))
    if not names:
        return lines
    found = chance.choice(names)
    return lines[: found.start()] + _misspelled(chance, found.group()) + lines[found.end() :]


def _another_value(chance: random.Random, lines: str) -> str:
    values = list(re.finditer(r"(?m)(?<==) .*$", lines))
    if not values:
        return lines
    found = chance.choice(values)
    return f"{lines[: found.start()]} {chance.choice(LITERALS)}{lines[found.end() :]}"


def _strange_characters(chance: random.Random, lines: str) -> str:
    at = chance.randrange(len(lines) + 1)
    return lines[:at] + "".join(chance.choices(WORDS, k=chance.choice((1, 2, 8)))) + lines[at + chance.randrange(3) :]


def _cut(chance: random.Random, lines: str) -> str:
    return lines[: chance.randrange(len(lines) + 1)]


def _comment(chance: random.Random, lines: str) -> str:
    parts = lines.splitlines(True)
    parts.insert(chance.randrange(len(parts) + 1), chance.choice(("# a comment\n", "\n", "   \n", "#\n")))
    return "".join(parts)


_OF_TEXT = (_remove, _repeat, _swap, _misspell, _misspell, _another_value, _another_value, _another_value,
            _strange_characters, _cut, _comment)  # fmt: skip
