"""The per-completion lifting: plain Python functions of text, judged in worker processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mlrl import processes
from mlrl.rewards.workers import REASONS, Answer, Call, WorkerPool
from mlrl.types import Refused, RewardFn, Rewards, Rollout, Vocabulary


def per_completion(
    f: Callable[[str, Mapping[str, Any]], Any] | Sequence[Callable],
    *,
    name: str = "",
    timeout_seconds: float = 5.0,
    workers: int = 2,
    max_unscored_share: float = 0.2,
    memory_bytes: int = 0,
) -> RewardFn:
    """Lifts f(completion: str, example: Mapping) -> float | Mapping[str, float] | None, run in workers.

    A mapping's entry "reward" (or its only entry) is the reward, "outcome" the unshaped score if that
    differs, and all entries are logged as parts. None means not applicable. A call that raises, hangs,
    returns NaN or something else, or ends its process is tried once more; then its row is unscored: marked,
    counted, and left out of baseline and loss. What a function prints is discarded.

    Several functions are summed: a row is unscored if one fails on it or none applies to it.

    The completion is the text of the row's action tokens, special tokens left out; of an episode with several
    turns, those of the last turn with actions.

    Args:
      f: one function or several. They travel by cloudpickle, so notebook cells and closures work; a worker
        never sees an accelerator.
      name: of the part in the logs; the function's own if empty. With several functions, each keeps its own.
      timeout_seconds: limit of one call; importing what the function needs is not counted.
      workers: processes; they start at the first call.
      max_unscored_share: the run stops when more than this share of a step's rows is unscored. 1.0 never
        stops it.
      memory_bytes: limit of a worker's address space; 0 sets none.
    Returns:
      A RewardFn that takes and returns numpy arrays, with parts `name`, `name/entry`, `unscored/name` and
      `unscored/name/reason` for each of workers.REASONS. An entry is a part from the step that first returns
      it.
    Raises:
      Refused: naming the function, the share and an example row, if too many rows are unscored.
    """
    functions = tuple(f) if isinstance(f, (list, tuple)) else (f,)
    if not functions or not all(callable(one) for one in functions):
        raise Refused(f"per_completion needs a function of (completion, example) or several, got {f!r}")
    for knob, value, allowed in (
        ("timeout_seconds", timeout_seconds, timeout_seconds > 0),
        ("workers", workers, workers >= 1),
        ("max_unscored_share", max_unscored_share, 0 <= max_unscored_share <= 1),
        ("memory_bytes", memory_bytes, memory_bytes >= 0),
    ):
        if not allowed:
            raise Refused(f"per_completion: {knob}={value!r} is out of range")
    names = tuple(name_of(one) for one in functions)
    if name:
        names = (name,) if len(functions) == 1 else tuple(f"{name}/{one}" for one in names)
    check_distinct(names)
    pool = WorkerPool(functions, timeout_seconds=timeout_seconds, workers=workers, memory_bytes=memory_bytes,
                      name=" + ".join(names))  # fmt: skip
    entries_seen: dict[str, None] = {}  # only grows, so that the parts of a run settle at once

    def update(state, rollout, prompts, task, models):
        action_mask = np.asarray(rollout.action_mask)
        rows = len(action_mask)
        texts = completion_texts(rollout, task.vocabulary)
        sources, indices = np.asarray(prompts.source), np.asarray(prompts.index)
        examples = [task.example(int(source), int(index)) for source, index in zip(sources, indices)]
        limit = int(max_unscored_share * rows + 1e-6)

        def judged(own: range) -> list[Answer]:
            calls = [Call(row, which, texts[row], examples[row]) for row in own for which in range(len(names))]
            return pool.run(calls, max_failed_rows=limit)

        answers = processes.in_shares(rows, judged)
        by_row = [answers[row * len(names) : (row + 1) * len(names)] for row in range(rows)]
        scored = np.array([_row_scored(row) for row in by_row], bool)
        if rows - scored.sum() > limit:
            raise Refused(_too_many(names, by_row, scored, texts, examples, max_unscored_share))
        for which, answer in ((which, a) for row in by_row for which, a in enumerate(row)):
            entries_seen.update(dict.fromkeys(f"{names[which]}/{e}" for e in answer.entries if e != "reward"))
        return _gather(names, by_row, scored, action_mask, tuple(entries_seen)), state

    parts = tuple(part for one in names for part in (one, f"unscored/{one}", *_reason_parts(one)))
    return RewardFn(tuple, update, False, parts)


def completion_texts(rollout: Rollout, vocabulary: Vocabulary) -> list[str]:
    """Text of every row's action tokens in its last turn that has any, special tokens left out."""
    tokens, masks, turns = (np.asarray(leaf) for leaf in (rollout.tokens, rollout.action_mask, rollout.turn))
    texts = []
    for row, mask, turn in zip(tokens, masks, turns):
        last = mask & (turn == turn[mask].max(initial=0))
        texts.append(vocabulary.decode(row[last].tolist()))
    return texts


def name_of(f: Any) -> str:
    """The name a function is known by in logs and errors."""
    inner = f
    while not hasattr(inner, "__name__") and hasattr(inner, "func"):  # functools.partial
        inner = inner.func
    return getattr(inner, "__name__", type(inner).__name__).replace("<lambda>", "lambda")


def check_distinct(names: Sequence[str]) -> None:
    """Raises Refused if two parts would be logged under one name."""
    twice = sorted({one for one in names if list(names).count(one) > 1})
    if twice:
        raise Refused(
            f"two rewards report a part called {twice[0]!r}; rename one: per_completion(f, name=...), "
            "in_graph(f, name=...) or with_models(f, name=...)"
        )


def _reason_parts(name: str) -> list[str]:
    return [f"unscored/{name}/{reason}" for reason in REASONS]


def _row_scored(answers: Sequence[Answer]) -> bool:
    """Whether the functions' answers to one row make a reward: none failed, and at least one applies."""
    reasons = [answer.reason for answer in answers]
    return "" in reasons and all(reason in ("", "not_applicable") for reason in reasons)


def _gather(names, by_row, scored, action_mask, entry_parts) -> Rewards:
    """Numpy Rewards from the answers of every row; entries that a row lacks, and unscored rows, are 0."""
    rows = len(by_row)
    total, outcome = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
    parts = {part: np.zeros(rows, np.float32) for part in (*names, *entry_parts)}
    for one in names:
        parts |= {part: np.zeros(rows, np.float32) for part in (f"unscored/{one}", *_reason_parts(one))}
    for row, answers in enumerate(by_row):
        for one, answer in zip(names, answers):
            if answer.reason:
                parts[f"unscored/{one}"][row] = parts[f"unscored/{one}/{answer.reason}"][row] = 1.0
                continue
            reward = answer.entries["reward"]
            parts[one][row] = reward
            for entry in answer.entries.keys() - {"reward"}:
                parts[f"{one}/{entry}"][row] = answer.entries[entry]
            if scored[row]:
                total[row] += reward
                outcome[row] += answer.entries.get("outcome", reward)
    tokens = np.zeros(action_mask.shape, np.float32)
    acting = np.flatnonzero(action_mask.any(axis=1))
    last = action_mask.shape[1] - 1 - action_mask[:, ::-1].argmax(axis=1)
    tokens[acting, last[acting]] = total[acting]
    return Rewards(tokens=tokens, outcome=outcome, scored=scored, parts=parts)


def _too_many(names, by_row, scored, texts, examples, max_unscored_share) -> str:
    """One line: the function, the share, and a row with its prompt, its completion and what went wrong."""
    # A row that failed says more than one that no function applied to, or that was not reached.
    telling = [
        (row, one, answer)
        for kinds in (("raised", "hung", "not_finite", "wrong_type", "died"), ("not_applicable",))
        for row, answers in enumerate(by_row)
        for one, answer in zip(names, answers)
        if answer.reason in kinds and not scored[row]
    ]
    row, one, answer = telling[0]
    failed = sum(any(a.reason not in ("", "not_run") for a in answers) and not scored[r]
                 for r, answers in enumerate(by_row))  # fmt: skip
    prompt, completion = (
        repr(text if len(text) <= 80 else text[:80] + "...")
        for text in (str(examples[row].get("prompt", "")), texts[row])
    )
    return (
        f"reward {one!r} left {failed} of {len(by_row)} rows unscored, more than max_unscored_share="
        f"{max_unscored_share:g}; row {row}: {answer.reason}: {answer.detail}; prompt {prompt}, "
        f"completion {completion}"
    )
