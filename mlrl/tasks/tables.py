"""Tables: examples that were read once, encoded, and kept in memory as the rows of a task."""

from __future__ import annotations

import gzip
import json
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mlrl import vocabularies
from mlrl.types import Array, Prompts, Refused, Task, Vocabulary

LongFn = Callable[[list[int], int, str], list[int] | None]  # (ids, limit, where) -> ids that fit, or None: drop the row


def refuse_long(ids: list[int], limit: int, where: str) -> None:
    """Raises Refused: nothing may be longer than its limit."""
    raise Refused(f"{where} has {len(ids)} tokens, more than the limit of {limit}: raise the limit, or choose "
                  "tables.drop_long, tables.truncate_left or tables.truncate_right")  # fmt: skip


def drop_long(ids: list[int], limit: int, where: str) -> None:
    """Leaves the example out; how many were left out is logged."""
    return None


def truncate_left(ids: list[int], limit: int, where: str) -> list[int]:
    """Keeps the last `limit` tokens."""
    return ids[len(ids) - limit :]


def truncate_right(ids: list[int], limit: int, where: str) -> list[int]:
    """Keeps the first `limit` tokens; a demonstration that is cut so does not end in an EOS."""
    return ids[:limit]


def table(
    examples: Sequence[Mapping[str, Any]],
    vocabulary: Vocabulary,
    *,
    name: str,
    max_prompt_tokens: int = 0,
    max_target_tokens: int = 0,
    on_long_prompt: LongFn = refuse_long,
    on_long_target: LongFn = refuse_long,
) -> Task:
    """A task whose examples are given: one source, prompts padded to the longest.

    Args:
      examples: each has "prompt" and "answer" (texts). "target" is the demonstration, by default the answer; None
        is no demonstration, a row without anything to learn from. Other keys are kept for rewards.
      vocabulary: encodes prompts and targets; its first EOS is appended to targets.
      name: in logs and messages.
      max_prompt_tokens, max_target_tokens: limits, EOS included; 0 sets none.
      on_long_prompt, on_long_target: what to do with longer ones: refuse_long, drop_long, truncate_left (of prompts),
        truncate_right (of targets), or a function like them.
    Returns: a Task outside of the graph, with numpy arrays.
    Raises: Refused, naming the example, if a text is missing or too long, or no example is left.
    """
    kept, prompts, targets = [], [], []
    for row, example in enumerate(examples):
        where = f"{name}, example {row}"
        prompt_text, target_text = _texts(example, where)
        ids = encode(vocabulary, prompt_text, where)
        prompt = fit(ids, max_prompt_tokens, on_long_prompt, f"{where}: the prompt")
        if target_text is None:
            target: list[int] | None = []
        else:
            target = [*encode(vocabulary, target_text, where), vocabulary.eos_ids[0]]
            target = fit(target, max_target_tokens, on_long_target, f"{where}: the target")
        if prompt is not None and not prompt:
            raise Refused(f"{where}: the prompt is empty")
        if prompt is not None and target is not None:
            kept.append({**example, "task": name})
            prompts.append(prompt)
            targets.append(target)
    return from_ids(kept, prompts, targets, vocabulary, name=name, read=len(examples), limits=(
        max_prompt_tokens, max_target_tokens))  # fmt: skip


def from_ids(
    kept: Sequence[Mapping[str, Any]], prompts: Sequence[list[int]], targets: Sequence[list[int]],
    vocabulary: Vocabulary, *, name: str, read: int, limits: tuple[int, int],
) -> Task:  # fmt: skip
    """A task of examples whose prompts and targets are encoded already; see `table`.

    Args:
      kept: the examples.
      prompts, targets: token ids of each.
      read: how many examples there were before some were dropped.
      limits: (max_prompt_tokens, max_target_tokens), for the message that says so.
    """
    dropped = f"{read - len(kept)} of {read} examples are longer than the limits"
    if not kept:
        raise Refused(f"{name} has no examples" + f": {dropped}" * bool(read))
    if len(kept) < read:
        logging.getLogger("mlrl").warning("%s: dropped, %s (max_prompt_tokens=%d, max_target_tokens=%d)",
                                          name, dropped, *limits)  # fmt: skip
    prompt_tokens, prompt_valid = padded(prompts, vocabulary.pad_id, left=True)
    target_tokens, target_valid = padded(targets, vocabulary.pad_id, left=False)

    def at(source: Array, index: Array) -> Prompts:
        source, index = np.asarray(source, np.int32), np.asarray(index, np.int32)
        return Prompts(prompt_tokens[index], prompt_valid[index], source, index, {})

    def targets_at(source: Array, index: Array) -> tuple[np.ndarray, np.ndarray]:
        index = np.asarray(index)
        return target_tokens[index], target_valid[index]

    def example(source: int, index: int) -> Mapping[str, Any]:
        if not (source == 0 and 0 <= index < len(kept)):
            raise Refused(f"{name} has the examples 0 to {len(kept) - 1} of source 0, asked for {index} of {source}")
        return kept[index]

    return Task(name, (name,), (len(kept),), (1.0,), vocabulary, at, targets_at, example, in_graph=False)


def jsonl(path: str, vocabulary: Vocabulary, *, prompt: str = "prompt", answer: str = "answer",
          template: Callable[[str], str] = str, name: str = "", max_prompt_tokens: int = 0, max_target_tokens: int = 0,
          on_long_prompt: LongFn = refuse_long, on_long_target: LongFn = refuse_long) -> Task:  # fmt: skip
    """A task whose examples are the objects of a JSON-lines file, one a line.

    A prompt is a text, or a list of chat messages ({"role": ..., "content": ...}), which the vocabulary's own chat
    template renders. Rewards see the whole object.

    Args:
      path: the file; gzipped if its name ends in .gz.
      vocabulary: encodes prompts and answers.
      prompt, answer: keys of the objects. An answer may be a number; a missing one is "".
      template: text -> prompt, such as vocabularies.as_user_message(...); not for chat messages.
      name: in logs and messages; the file's name, up to its first dot, if empty.
      max_prompt_tokens, max_target_tokens, on_long_prompt, on_long_target: as of `table`.
    Raises: Refused, naming the row and its keys, if a prompt is missing or neither kind.
    """
    name = name or pathlib.Path(path).name.split(".")[0]
    examples = []
    for number, row in numbered_jsonl(path):
        text, right = row.get(prompt), row.get(answer, "")
        if isinstance(text, list):
            text = vocabularies.chat(vocabulary).apply_chat_template(text)
        elif isinstance(text, str):
            text = template(text)
        else:
            raise Refused(f"{path}, row {number}: {prompt!r} must be a text or a list of chat messages, got {text!r}; "
                          f"the row has {', '.join(row)}: name the right key as tables.jsonl.prompt")  # fmt: skip
        right = str(right) if isinstance(right, int | float) else right
        if not isinstance(right, str):
            raise Refused(f"{path}, row {number}: {answer!r} must be a text or a number, got {right!r}; the row has "
                          f"{', '.join(row)}: name the right key as tables.jsonl.answer")  # fmt: skip
        examples.append({**row, "prompt": text, "answer": right})
    return table(examples, vocabulary, name=name, max_prompt_tokens=max_prompt_tokens,
                 max_target_tokens=max_target_tokens, on_long_prompt=on_long_prompt,
                 on_long_target=on_long_target)  # fmt: skip


def read_jsonl(path: str | pathlib.Path, keys: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The objects in a JSON-lines file, gzipped if its name ends in .gz; empty lines are skipped.

    Raises: Refused, naming the file and the row (from 1), if it is missing, empty or malformed, or lacks a key.
    """
    return [row for _, row in numbered_jsonl(path, keys)]


def numbered_jsonl(path: str | pathlib.Path, keys: Sequence[str] = ()) -> list[tuple[int, dict[str, Any]]]:
    """As `read_jsonl`, with the number of each row's line, from 1."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise Refused(f"there is no file {path}")
    rows = []
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append((number, _parsed_row(line, f"{path}, row {number}", keys)))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise Refused(f"{path} cannot be read: {error}") from error
    if not rows:
        raise Refused(f"{path} has no rows")
    return rows


def _parsed_row(line: str, where: str, keys: Sequence[str]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise Refused(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise Refused(f"{where} must be a JSON object, got {type(row).__name__}")
    missing = [key for key in keys if key not in row]
    if missing:
        raise Refused(f"{where} lacks the key {missing[0]!r}; it has {sorted(row)}")
    return row


def _texts(example: Mapping[str, Any], where: str) -> tuple[str, str | None]:
    """(prompt, target or None) of an example."""
    for key in ("prompt", "answer"):
        if not isinstance(example.get(key), str):
            raise Refused(f"{where}: {key!r} must be a text, got {example.get(key)!r}")
    target = example.get("target", example["answer"])
    if not (target is None or isinstance(target, str)):
        raise Refused(f"{where}: 'target' must be a text or None, got {target!r}")
    return example["prompt"], target


def encode(vocabulary: Vocabulary, text: str, where: str) -> list[int]:
    """Token ids of a text. Raises Refused that names the row."""
    try:
        return list(vocabulary.encode(text))
    except Refused as refusal:
        raise Refused(f"{where}: {refusal}") from refusal
    except UnicodeEncodeError as error:
        raise Refused(f"{where}: {text[error.start]!r} is half of a character, and no text: mend the file") from error


def fit(ids: list[int], limit: int, on_long: LongFn, where: str) -> list[int] | None:
    """The ids as they are, or what `on_long` makes of them where they are more than `limit` (0 sets none)."""
    return on_long(ids, limit, where) if 0 < limit < len(ids) else ids


def padded(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [M,W] int32, valid [M,W] bool), as wide as the longest row and at least 1."""
    width = max(1, max(map(len, rows)))
    tokens, valid = np.full((len(rows), width), pad_id, np.int32), np.zeros((len(rows), width), bool)
    for number, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[number, columns] = row
        valid[number, columns] = True
    return tokens, valid
