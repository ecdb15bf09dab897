"""Lists of hyper-parameters from the command line, as settings of an experiment."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from mlrl.types import Refused


def settings(given: Sequence[str]) -> list[dict[str, str]]:
    """["NAME=VALUE,VALUE", ...] -> every combination of the values, as {name: value}; [{}] for none.

    Commas inside brackets or quotes divide nothing. Raises Refused.
    """
    lists = {}
    for text in given:
        name, equals, values = text.partition("=")
        found = [value.strip() for value in _divided(values)]
        if not equals or not name or not all(found):
            raise Refused(f"--sweep {text} is no list of values: write --sweep NAME=VALUE,VALUE")
        if len(set(found)) < max(2, len(found)):
            raise Refused(f"--sweep {text} needs two or more values, no two alike: for one, write "
                          f"--gin.{name}={values}")  # fmt: skip
        if name == "SEED" or name in lists:
            raise Refused("--sweep SEED is what --seeds is for: write --seeds S" if name == "SEED" else
                          f"--sweep gives {name} twice: write its values in one list")  # fmt: skip
        lists[name] = found
    return [dict(zip(lists, values)) for values in itertools.product(*lists.values())]


def name_of(setting: dict[str, str]) -> str:
    """The setting in words, which also name its folder: "LEARNING_RATE=1e-4", "A=1,B=2"."""
    return re.sub(r"[/\\\s]+", "_", ",".join(f"{name}={value}" for name, value in setting.items()))


def _divided(text: str) -> list[str]:
    """The text between commas that stand in no brackets and in no quotes."""
    parts, depth, quote = [""], 0, ""
    for c in text:
        if quote or c in "'\"":
            quote = "" if c == quote else quote or c
        else:
            depth += (c in "([{") - (c in ")]}")
        if c == "," and not quote and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts
