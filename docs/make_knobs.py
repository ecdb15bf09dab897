"""Makes docs/knobs.md from signatures and docstrings: `python docs/make_knobs.py`. A test holds that it is up to date.

A knob is a field of a class that gin configures, or a keyword argument with a plain default (a number, a word, a tuple
of these) of a public function of the modules below. What it does is what its docstring says of it.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

# This working tree, not that of an install.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from mlrl.loops import online  # noqa: E402

CLASSES = (
    "mlrl.loops.online.Experiment", "mlrl.loops.iterated.Experiment", "mlrl.loops.offline.Experiment",
    "mlrl.sampling.Sampling", "mlrl.models.transformer.Config", "mlrl.evaluation.Evaluation", "mlrl.runs.Recording",
)  # fmt: skip
MODULES = (
    "mlrl.optimizers", "mlrl.losses.policy", "mlrl.losses.preference", "mlrl.losses.regularizers",
    "mlrl.losses.supervised", "mlrl.losses.values", "mlrl.losses.distillation", "mlrl.advantages", "mlrl.reductions",
    "mlrl.selection", "mlrl.correction", "mlrl.chunks", "mlrl.controllers", "mlrl.curricula",
    "mlrl.rollouts.single_turn",
    "mlrl.rollouts.multi_turn", "mlrl.rollouts.self_play", "mlrl.refilled", "mlrl.packing", "mlrl.rewards.combinators",
    "mlrl.rewards.completions", "mlrl.rewards.adapters", "mlrl.rewards.lengths", "mlrl.rewards.programs",
    "mlrl.rewards.judges", "mlrl.tasks.tables", "mlrl.vocabularies", "mlrl.loops.configurations",
)  # fmt: skip
GIVEN = {"policy_version", "group_size", "first_column"}  # by the loop, not by gin
HEAD = """# Knobs

Made from the code by `python docs/make_knobs.py`. In gin a knob is `module.name.knob = value`, such as
`online.Experiment.group_size = 16` or `policy.ppo_clip.clip_high = 0.28`. The UPPER_CASE macros of the files in `gin/`
are set by `--gin.NAME=VALUE`; `mlrl check FILE.gin` says what they come to.
"""


def knobs_page() -> str:
    """The whole page."""
    parts = [HEAD]
    for path in CLASSES:
        module, name = path.rsplit(".", 1)
        parts.append(section(f"{path.removeprefix('mlrl.')}", of_class(getattr(importlib.import_module(module), name))))
    for path in MODULES:
        module = importlib.import_module(path)
        rows = [row for name, function in functions(module) for row in of_function(name, function)]
        if rows:
            parts.append(section(path.removeprefix("mlrl."), rows))
    return "\n".join(parts)


def section(title: str, rows: list[tuple[str, str, str]]) -> str:
    """A heading and a table."""
    lines = [f"## {title}", "", "| knob | default | what it does |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {default} | {words} |" for name, default, words in rows), ""])


def of_class(cls: type) -> list[tuple[str, str, str]]:
    """(name, default, words) of each field, the words from the docstring's list of fields."""
    said = listed(cls.__doc__ or "", r"^ {0,4}(\w+(?:, \w+)*),?(?: {2,}|$)(.*)$")
    if cls.__qualname__ == "Experiment" and cls is not online.Experiment:  # "as in the online loop"
        said = {name: words for name, _, words in of_class(online.Experiment)} | said
    rows = []
    for field in dataclasses.fields(cls):
        default = "required" if field.default is dataclasses.MISSING else shown(field.default)
        rows.append((field.name, default, said.get(field.name, "")))
    return rows


def functions(module: Any) -> Iterator[tuple[str, Callable]]:
    """Public functions that the module defines, or that it shows as its own."""
    own = module.__name__
    for name, value in vars(module).items():
        if inspect.isfunction(value) and not name.startswith("_") and value.__module__.startswith(own):
            yield name, value


def of_function(name: str, function: Callable) -> list[tuple[str, str, str]]:
    """Rows of the arguments that have a plain default."""
    doc = inspect.getdoc(function) or ""
    said, first = listed(doc, r"^ {1,4}(\w+(?:, \w+)*):(?: +|$)(.*)$"), doc.split("\n\n")[0].replace("\n", " ")
    return [(f"{name}.{p.name}", shown(p.default), said.get(p.name) or f"of: {first}".replace("|", "\\|"))
            for p in inspect.signature(function).parameters.values()
            if p.kind is p.KEYWORD_ONLY and p.name not in GIVEN and plain(p.default)]  # fmt: skip


def plain(value: Any) -> bool:
    """Whether a default is a number, a word, or a tuple of these."""
    return isinstance(value, bool | int | float | str) or (isinstance(value, tuple) and all(map(plain, value)))


def listed(doc: str, pattern: str) -> dict[str, str]:
    """Name -> words, of a docstring's list; lines that are further in go on with the last one."""
    found: dict[str, str] = {}
    names: list[str] = []
    depth = 0
    for line in inspect.cleandoc(doc).splitlines():
        indent = len(line) - len(line.lstrip())
        match = re.match(pattern, line)
        if match and (not names or indent <= depth):
            names, depth = match[1].split(", "), indent
            found |= dict.fromkeys(names, match[2].strip())
        elif names and line.strip() and indent > depth:
            found |= {name: f"{found[name]} {line.strip()}".strip() for name in names}
        else:
            names = []
    return {name: words.replace("|", "\\|") for name, words in found.items()}


def shown(value: Any) -> str:
    """A default in a cell."""
    if plain(value):
        return f"`{value!r}`" if value != "" else "`''`"
    if dataclasses.is_dataclass(value):
        return f"`{type(value).__name__}()`"
    return f"`{name}`" if (name := getattr(value, "__qualname__", "").split(".<locals>")[0]) else type(value).__name__


if __name__ == "__main__":
    path = pathlib.Path(__file__).resolve().parent / "knobs.md"
    path.write_text(knobs_page())
    print(f"{path} has {path.read_text().count(chr(10))} lines")
