"""Programming tasks that are read from files: MBPP (write a function) and CRUXEval (what does a function return?).

Their answers are judged by running them in the sandbox: see mlrl.rewards.programs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlrl.tasks.tables import numbered_jsonl, table
from mlrl.types import Refused, Task, Vocabulary

# Of task_id, both ends included. The rest (1 to 10) are meant to be shown as examples.
_MBPP_SPLITS = {"train": (601, 974), "validation": (511, 600), "test": (11, 510)}


def ask_for_a_function(text: str, tests: Sequence[str]) -> str:
    """The task in a docstring with its tests, as MBPP's paper and most evaluations show them."""
    return '"""\n' + "\n".join([text.strip(), *tests]) + '\n"""\n'


def ask_for_the_output(code: str, given: str) -> str:
    """A program, and a call to complete with what it returns."""
    return f"{code}\nassert f({given}) =="


def ask_for_an_input(code: str, output: str) -> str:
    """A program and what it returned: the completion is an input that makes it so."""
    return f"{code}\n# f(input) == {output}\ninput ="


def mbpp(
    path: str, vocabulary: Vocabulary, *, split: str = "train",
    template: Callable[[str, Sequence[str]], str] = ask_for_a_function, name: str = "mbpp", **limits: Any,
) -> Task:  # fmt: skip
    """MBPP (Austin et al. 2021): short Python functions, described in a sentence and by three tests.

    Judge with mlrl.rewards.programs.tests_passed. Demonstrations are the data set's own programs.

    Args:
      path: mbpp.jsonl or mbpp.jsonl.gz, with "text", "code", "task_id", "test_setup_code" and "test_list".
      split: "train" (task_id 601 to 974), "validation" (511 to 600) or "test" (11 to 510), as in the paper.
      template: (text, tests) -> prompt.
      name: in the logs; other splits' get "_test" or "_validation".
      **limits: see tables.table.
    Returns: a Task whose examples hold "tests", a tuple of assert statements, and "setup", a program that is run
      between the completion and the tests.
    Raises: Refused, naming the file and row.
    """
    if split not in _MBPP_SPLITS:
        raise Refused(f"mbpp: split must be one of {tuple(_MBPP_SPLITS)}, got {split!r}")
    first, last = _MBPP_SPLITS[split]
    examples = []
    for number, row in numbered_jsonl(path, ("text", "code", "task_id", "test_setup_code", "test_list")):
        if not (isinstance(row["task_id"], int) and isinstance(row["test_list"], list) and row["test_list"]):
            raise Refused(f"{path}, row {number}: needs a number 'task_id' and a list 'test_list'")
        if first <= row["task_id"] <= last:
            code, tests = _lines(row["code"]), tuple(row["test_list"])
            examples.append({"prompt": template(row["text"], tests), "answer": code, "tests": tests,
                             "setup": _lines(row["test_setup_code"])})  # fmt: skip
    return table(examples, vocabulary, name=name if split == "train" else f"{name}_{split}", **limits)


def cruxeval(
    path: str, vocabulary: Vocabulary, *, ask_for: str = "output", template: Callable[[str, str], str] | None = None,
    name: str = "", **limits: Any,
) -> Task:  # fmt: skip
    """CRUXEval (Gu et al. 2024): 800 short functions f, each with an input and its output. A test set: no splits.

    Judge with mlrl.rewards.programs.output_found or input_found.

    Args:
      path: cruxeval.jsonl, with "code", "input" and "output".
      ask_for: "output", given the input (deduction), or "input", given the output (abduction).
      template: (code, what is given) -> prompt; by default ask_for_the_output or ask_for_an_input.
      name: in the logs; by default cruxeval_output or cruxeval_input.
      **limits: see tables.table.
    Returns: a Task whose examples hold "code", "input" and "output", as Python.
    Raises: Refused, naming the file and row.
    """
    if ask_for not in ("output", "input"):
        raise Refused(f"cruxeval: ask_for must be 'output' or 'input', got {ask_for!r}")
    template = template or {"output": ask_for_the_output, "input": ask_for_an_input}[ask_for]
    given = "input" if ask_for == "output" else "output"

    def example(row: Mapping[str, Any]) -> dict[str, Any]:
        facts = {key: row[key] for key in ("code", "input", "output")}
        target = f" {row[ask_for]}"
        return {"prompt": template(row["code"], row[given]), "answer": row[ask_for], "target": target, **facts}

    rows = numbered_jsonl(path, ("code", "input", "output"))
    return table([example(row) for _, row in rows], vocabulary, name=name or f"cruxeval_{ask_for}", **limits)


def _lines(code: str) -> str:
    return code.replace("\r\n", "\n")
