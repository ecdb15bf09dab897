"""Stored preferences, ratings and step labels, read from files: TRL's three formats, and others by a row function.

A row function turns one row of a file into an Example; `where` names the row in messages. The ones here are `pairs`,
`ratings` and `steps` for TRL's formats, and `hh_rlhf`, `llmbar` and `bigbench_mistake` for those data sets.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlrl.tasks import tables
from mlrl.types import Array, Candidates, Refused, Task, Vocabulary

_ASSISTANT = "\n\nAssistant:"


class Example(NamedTuple):
    """A prompt and what was said of completions to it.

    completions  each a sequence of steps, of one step where nobody labelled any
    outcomes     how good each completion is, NaN where nobody said
    labels       of each completion's steps: as many numbers in [0, 1], or none
    """

    prompt: str
    completions: Sequence[Sequence[str]]
    outcomes: Sequence[float]
    labels: Sequence[Sequence[float]]


RowFn = Callable[[Mapping[str, Any], str], Example]  # (row of a file, where) -> Example


def pairs(row: Mapping[str, Any], where: str) -> Example:
    """{"prompt", "chosen", "rejected"}: the first of two completions is the better."""
    prompt, chosen, rejected = (_text(row, key, where) for key in ("prompt", "chosen", "rejected"))
    return Example(prompt, [[chosen], [rejected]], [1.0, 0.0], [[], []])


def ratings(row: Mapping[str, Any], where: str) -> Example:
    """{"prompt", "completion", "label": bool}: one completion, desirable or not."""
    outcome = float(_bool(_key(row, "label", where), f"{where}: 'label'"))
    return Example(_text(row, "prompt", where), [[_text(row, "completion", where)]], [outcome], [[]])


def steps(row: Mapping[str, Any], where: str) -> Example:
    """{"prompt", "completions": [step, ...], "labels": [bool, ...]}: one completion in steps, each right or wrong."""
    said, labels = _texts(row, "completions", where), _key(row, "labels", where)
    if not isinstance(labels, list) or len(labels) != len(said):
        raise Refused(f"{where}: 'labels' must be a list of {len(said)}, one for each completion, got {labels!r}")
    return Example(_text(row, "prompt", where), [said], [math.nan],
                   [[float(_bool(label, f"{where}: a label")) for label in labels]])  # fmt: skip


def hh_rlhf(row: Mapping[str, Any], where: str) -> Example:
    """Anthropic's {"chosen", "rejected"}, two whole dialogues: what both share up to an assistant's turn is the prompt.
    """
    chosen, rejected = _text(row, "chosen", where), _text(row, "rejected", where)
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    start = chosen.rfind(_ASSISTANT, 0, same)
    if start < 0:
        raise Refused(f"{where}: 'chosen' and 'rejected' share no beginning that ends in {_ASSISTANT!r}")
    start += len(_ASSISTANT)
    return Example(chosen[:start], [[chosen[start:]], [rejected[start:]]], [1.0, 0.0], [[], []])


def llmbar(row: Mapping[str, Any], where: str) -> Example:
    """LLMBar's {"input", "output_1", "output_2", "label": 1 or 2}."""
    label = _key(row, "label", where)
    if label not in (1, 2, "1", "2"):
        raise Refused(f"{where}: 'label' must be 1 or 2, got {label!r}")
    outputs = [[_text(row, f"output_{n}", where)] for n in (1, 2)]
    return Example(f"{_text(row, 'input', where)}\n\n", outputs, [float(int(label) == n) for n in (1, 2)], [[], []])


def bigbench_mistake(row: Mapping[str, Any], where: str) -> Example:
    """BIG-Bench Mistake's {"input", "steps", "mistake_index"}: steps are right before the first mistake, then wrong.

    The outcome is whether the "answer" is the "target".
    """
    said, mistake = _texts(row, "steps", where), _key(row, "mistake_index", where)
    if not (mistake is None or (isinstance(mistake, int) and 0 <= mistake < len(said))):
        raise Refused(f"{where}: 'mistake_index' must be null or one of the {len(said)} steps, got {mistake!r}")
    labels = [float(mistake is None or i < mistake) for i in range(len(said))]
    outcome = float(_key(row, "answer", where) == _key(row, "target", where))
    return Example(f"{_text(row, 'input', where)}\n", [said], [outcome], [labels])


def read(
    path: str | pathlib.Path,
    vocabulary: Vocabulary,
    *,
    row_fn: RowFn = pairs,
    separator: str = "\n",
    name: str = "",
    max_prompt_tokens: int = 0,
    max_target_tokens: int = 0,
    on_long_prompt: tables.LongFn = tables.refuse_long,
    on_long_target: tables.LongFn = tables.refuse_long,
) -> Task:
    """A task of stored completions: its candidates are what the file says of them, its targets the best of them.

    A label of a step sits on the first token of the separator behind it, of the last step on the EOS: a value there
    has seen the whole step. A row whose best outcome is not above 0 has no demonstration.

    Args:
      path: a JSON-lines file, or a JSON file with a list (.json); gzipped if its name ends in .gz.
      vocabulary: encodes prompts and steps; its first EOS is appended to completions.
      row_fn: (row, where) -> Example: pairs, ratings, steps, hh_rlhf, llmbar, bigbench_mistake, or one like them.
      separator: written between the steps of a completion.
      name: in the logs; by default the file's.
      max_prompt_tokens, max_target_tokens: limits of a prompt and of every completion, EOS included; 0 sets none.
      on_long_prompt, on_long_target: what to do with longer ones, see tables.table. drop_long leaves out the whole row.
    Returns: a Task outside of the graph. C is the most completions of a row; rows with fewer have empty ones.
    Raises: Refused, naming the file and the row, if it is malformed, lacks a key, or is too long.
    """
    path = pathlib.Path(path)
    name, rows = name or path.name.split(".")[0], _rows(path)
    kept, prompts, targets, stored = [], [], [], []
    for number, row in rows:
        where = f"{path}, row {number}"
        example = row_fn(row, where)
        limit = (max_target_tokens, on_long_target)
        said = [_completion(vocabulary, *of, separator, limit, where)
                for of in zip(example.completions, example.outcomes, example.labels, strict=True)]  # fmt: skip
        prompt = tables.encode(vocabulary, example.prompt, where)
        prompt = tables.fit(prompt, max_prompt_tokens, on_long_prompt, f"{where}: the prompt")
        if prompt is not None and not prompt:
            raise Refused(f"{where}: the prompt is empty")
        if prompt is None or None in said:
            continue
        best = max(range(len(said)), key=lambda i: np.nan_to_num(example.outcomes[i], nan=-math.inf))
        answer = separator.join(example.completions[best])
        kept.append({"prompt": example.prompt, "answer": answer, "task": name, "row": dict(row)})
        prompts.append(prompt)
        targets.append(said[best].ids if said[best].outcome > 0 else [])
        stored.append(said)
    limits = (max_prompt_tokens, max_target_tokens)
    task = tables.from_ids(kept, prompts, targets, vocabulary, name=name, read=len(rows), limits=limits)
    return dataclasses.replace(task, candidates=_stacked(stored, vocabulary.pad_id))


class _Completion(NamedTuple):
    ids: list[int]
    outcome: float
    labels: list[float]  # of each token, NaN where none


def _completion(vocabulary: Vocabulary, said: Sequence[str], outcome: float, labels: Sequence[float], separator: str,
                limit: tuple[int, tables.LongFn], where: str) -> _Completion | None:  # fmt: skip
    """A completion's ids and the labels of its steps; None if it is to be dropped."""
    between = tables.encode(vocabulary, separator, where)
    ids: list[int] = []
    ends: list[int] = []  # the column behind each step
    for number, step in enumerate(said):
        ids += [*(between if number else []), *tables.encode(vocabulary, step, where)]
        ends.append(len(ids))
    ids = tables.fit([*ids, vocabulary.eos_ids[0]], *limit, f"{where}: a completion")
    if ids is None:
        return None
    at = dict(zip(ends, labels)) if labels else {}
    return _Completion(ids, outcome, [at.get(column, math.nan) for column in range(len(ids))])


def _stacked(stored: Sequence[Sequence[_Completion]], pad_id: int) -> Callable[[Array, Array], Candidates]:
    """(source, index) -> Candidates of rows that were read."""
    shape = (len(stored), max(map(len, stored)), max(len(one.ids) for said in stored for one in said))
    tokens, valid = np.full(shape, pad_id, np.int32), np.zeros(shape, bool)
    outcome, labels = np.full(shape[:2], np.nan, np.float32), np.full(shape, np.nan, np.float32)
    for row, said in enumerate(stored):
        for c, one in enumerate(said):
            columns = slice(0, len(one.ids))
            tokens[row, c, columns], valid[row, c, columns] = one.ids, True
            outcome[row, c], labels[row, c, columns] = one.outcome, one.labels

    def candidates(source: Array, index: Array) -> Candidates:
        index = np.asarray(index)
        return Candidates(tokens[index], valid[index], outcome[index], labels[index])

    return candidates


def _rows(path: pathlib.Path) -> Sequence[tuple[int, Mapping[str, Any]]]:
    """The rows of a file and their numbers from 1."""
    if path.name.removesuffix(".gz").endswith(".json"):
        return list(enumerate(_json_list(path), 1))
    return tables.numbered_jsonl(path)


def _json_list(path: pathlib.Path) -> list[Mapping[str, Any]]:
    if not path.is_file():
        raise Refused(f"there is no file {path}")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as text:
            rows = json.load(text)
    except (OSError, EOFError, ValueError) as error:
        raise Refused(f"{path} cannot be read: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise Refused(f"{path} must hold a list of JSON objects")
    return rows


def _key(row: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in row:
        raise Refused(f"{where} lacks the key {key!r}; it has {sorted(row)}")
    return row[key]


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = _key(row, key, where)
    if not isinstance(value, str):
        raise Refused(f"{where}: {key!r} must be a text, got {value!r}")
    return value


def _texts(row: Mapping[str, Any], key: str, where: str) -> list[str]:
    value = _key(row, key, where)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise Refused(f"{where}: {key!r} must be a list of texts, got {value!r}")
    return value


def _bool(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise Refused(f"{what} must be true or false, got {value!r}")
    return value
