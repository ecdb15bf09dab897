"""Files of rows for the drill of mutated files: problems, preferences, ratings, labelled steps; and what they hold."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import numpy as np

from mlrl import vocabularies
from mlrl.tasks import preferences, tables

VOCABULARY = vocabularies.byte_level()
PROBLEMS = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "weight": a / 7} for a in range(4) for b in range(3)]
PAIRS = [{"prompt": f"Is {n} odd?", "chosen": " yes" * (n % 2) or " no", "rejected": " perhaps"} for n in range(9)]
RATINGS = [{"prompt": f"Write {n}. ", "completion": str(n), "label": n % 3 > 0} for n in range(9)]
STEPS = [{"prompt": f"{n}+1+1?", "completions": [f"{n}+1={n + 1}", f"{n + 2}"], "labels": [True, n % 2 == 0]}
         for n in range(8)]  # fmt: skip
DIALOGUES = [{"chosen": f"\n\nHuman: {n}?\n\nAssistant: {n}.", "rejected": f"\n\nHuman: {n}?\n\nAssistant: no"}
             for n in range(5)]  # fmt: skip
READERS = {"problems": None, "pairs": preferences.pairs, "ratings": preferences.ratings, "steps": preferences.steps,
           "dialogues": preferences.hh_rlhf}  # fmt: skip


def write(folder: pathlib.Path) -> list[pathlib.Path]:
    """A folder for each format; pairs as a JSON list too."""
    made = []
    for name, found in zip(READERS, (PROBLEMS, PAIRS, RATINGS, STEPS, DIALOGUES)):
        made.append(folder / name)
        made[-1].mkdir()
        (made[-1] / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    made.append(folder / "list")
    made[-1].mkdir()
    (made[-1] / "pairs.json").write_text(json.dumps(PAIRS))
    return made


def use(folder: pathlib.Path) -> str:
    """Reads the folder's file as a task, and its rows by json alone; says in what they differ."""
    file = next(iter(folder.glob("*.json*")), folder / "gone.jsonl")
    read = READERS.get(file.stem)
    if read is None:
        task = tables.table(tables.read_jsonl(file), VOCABULARY, name=file.stem)
    else:
        task = preferences.read(file, VOCABULARY, row_fn=read)
    written = _written(file)
    if task.sizes != (len(written),):
        return f"{task.sizes} rows of {len(written)}"
    for index, row in enumerate(written):
        prompts = task.at(np.zeros(1, np.int32), np.asarray([index]))
        said = VOCABULARY.decode(prompts.tokens[0][prompts.valid[0]])
        wanted, completion = _expected(file.stem, row)
        if said != wanted:
            return f"row {index}: the prompt is {said!r}, and {wanted!r} in the file"
        tokens, valid = task.targets(np.zeros(1, np.int32), np.asarray([index]))
        target = VOCABULARY.decode(tokens[0][valid[0]])
        if completion is not None and target != completion:
            return f"row {index}: the target is {target!r}, and {completion!r} in the file"
    return ""


def _written(file: pathlib.Path) -> list[dict[str, Any]]:
    text = file.read_bytes().decode()
    if file.suffix == ".json":
        return json.loads(text)
    return [json.loads(line) for line in re.split(r"\r\n|\r|\n", text) if line.strip()]


def _expected(name: str, row: dict[str, Any]) -> tuple[str, str | None]:
    """(prompt, demonstration; None: not compared) of a row."""
    if name == "dialogues":
        return row["chosen"][: row["chosen"].index("Assistant:") + len("Assistant:")], None
    answers = {"problems": lambda: row.get("target", row.get("answer")) or "", "pairs": lambda: row["chosen"],
               "ratings": lambda: row["completion"] if row["label"] else "", "steps": lambda: None}  # fmt: skip
    return row["prompt"], answers[name]()


