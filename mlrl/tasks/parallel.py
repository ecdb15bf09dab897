"""Parallel text: two files whose lines are each other's translations, as a task."""

from __future__ import annotations

import gzip
import pathlib
from collections.abc import Callable
from typing import Any

from mlrl.tasks import prompt_templates
from mlrl.tasks.tables import table
from mlrl.types import Refused, Task, Vocabulary


def parallel(
    source: str,
    reference: str,
    vocabulary: Vocabulary,
    *,
    folder: str = "",
    split: str = "train",
    test_share: float = 0.1,
    template: Callable[[str], str] = prompt_templates.plain,
    name: str = "parallel",
    **limits: Any,
) -> Task:
    """Translate lines of one file; the answers are those of the other. Judge with chrf.chrf, or by a model.

    Args:
      source, reference: files of UTF-8 text with as many lines, gzipped if their names end in .gz.
      folder: where the two are.
      split: "train", or "test": the last lines. Lines near each other may be of one document, so the split is one cut.
      test_share: of the lines.
      template: line -> prompt, such as prompt_templates.translation().
      name: in the logs; the test split's gets "_test".
      **limits: max_prompt_tokens, max_target_tokens, on_long_prompt, on_long_target: see tables.table.
    Raises: Refused, if a file is missing or cannot be read, a line is empty, or the numbers of lines differ.
    """
    theirs, ours = (_lines(pathlib.Path(folder, file)) for file in (source, reference))
    if len(theirs) != len(ours):
        raise Refused(f"{source} has {len(theirs)} lines and {reference} has {len(ours)}: they must be translations "
                      "line by line")  # fmt: skip
    if split not in ("train", "test") or not 0.0 < test_share < 1.0:
        raise Refused(f"{name}: split must be 'train' or 'test' and test_share lie in (0, 1), got {split!r} and "
                      f"{test_share}")  # fmt: skip
    cut = len(ours) - round(test_share * len(ours))
    own = slice(cut) if split == "train" else slice(cut, None)
    examples = [{"prompt": template(text), "answer": answer} for text, answer in zip(theirs[own], ours[own])]
    return table(examples, vocabulary, name=name + "_test" * (split == "test"), **limits)


def _lines(file: pathlib.Path) -> list[str]:
    if not file.is_file():
        raise Refused(f"there is no file {file}")
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as text:
            lines = [line.strip() for line in text]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise Refused(f"{file} cannot be read: {error}") from error
    empty = next((number for number, line in enumerate(lines, 1) if not line), 0)
    if empty or not lines:
        raise Refused(f"{file}, line {empty or 1} is empty: every line must have a translation")
    return lines
