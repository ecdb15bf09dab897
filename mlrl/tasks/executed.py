"""Triplets that were run: proposals validated, answers judged, all by the sandbox, and remembered."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from mlrl.sandbox.pool import Pool
from mlrl.sandbox.results import Answer, Job, Limits, Result
from mlrl.tasks import triplets
from mlrl.tasks.triplets import Triplet
from mlrl.types import Refused, Vocabulary

Run = tuple[str, tuple[str, ...]]  # a program and inputs
_REMEMBERED: dict[tuple[Run, float], tuple[str | None, ...]] = {}
_MOST_REMEMBERED = 1 << 16


class Proposal(NamedTuple):
    """A proposer's text: whether it is well-formed, and the triplet it makes if that can be run (else None)."""

    well_formed: bool
    triplet: Triplet | None


def outputs(runs: Sequence[Run], *, seconds: float = 1.0) -> list[tuple[str | None, ...]]:
    """Of each run the outputs, as texts; None where an input has none, or two runs with different seeds disagree.

    Programs run many at a time. What was run before is remembered.
    """
    new = [run for run in dict.fromkeys(runs) if (run, seconds) not in _REMEMBERED]
    calls = [(triplets.source_of(program), tuple(f"f({given})" for given in inputs)) for program, inputs in new]
    results = _pool(seconds).run([Job(*call, seed) for call in calls for seed in (0, 1)]) if new else []
    if len(_REMEMBERED) + len(new) > _MOST_REMEMBERED:
        _REMEMBERED.clear()
    found = {(run, seconds): _agreed(*results[2 * i : 2 * i + 2]) for i, run in enumerate(new)}
    _REMEMBERED.update(found)
    return [_REMEMBERED[run, seconds] for run in runs]


def proposals(kinds: Sequence[int], texts: Sequence[str], references: Sequence[str], width: int,
              vocabulary: Vocabulary, *, seconds: float = 1.0) -> list[Proposal]:  # fmt: skip
    """What proposers wrote, validated: a proposal is a triplet if it runs, twice the same, and its prompts fit.

    Args:
      kinds, texts: of each proposal.
      references: texts of triplets; an induction proposal is inputs of its reference's program.
      width: how many tokens a prompt may have.
    """
    whole = [f"{reference.split('#')[0]}#{text}" if kind == triplets.INDUCTION else text
             for kind, text, reference in zip(kinds, texts, references)]  # fmt: skip
    parts = [triplets.parsed(kind, text) for kind, text in zip(kinds, whole)]
    ran = iter(outputs([part for part in parts if part], seconds=seconds))
    found = []
    for kind, part in zip(kinds, parts):
        results = next(ran) if part else (None,)
        triplet = None if None in results else Triplet(kind, *part, results)
        found.append(Proposal(part is not None, triplet if triplet and _fits(triplet, width, vocabulary) else None))
    return found


def judged(tasks: Sequence[Triplet], answers: Sequence[str], *, seconds: float = 1.0) -> list[tuple[bool, bool]]:
    """(well-formed, right) of each answer.

    Deduction: a literal equal to the output. Abduction: any input with that output. Induction: a program that is right
    on every pair that was not shown.
    """
    runs: list[Run | None] = []
    for task, answer in zip(tasks, answers):
        if task.kind == triplets.INDUCTION:
            hidden = task.inputs[task.shown :]
            runs.append((answer, hidden) if triplets.parsed(triplets.DEDUCTION, f"{answer}#0") else None)
        elif task.kind == triplets.ABDUCTION:
            part = triplets.parsed(triplets.ABDUCTION, f"{task.program}#{answer}")
            runs.append((task.program, (answer,)) if part else None)
        else:
            runs.append(None)
    ran, verdicts = iter(outputs([run for run in runs if run], seconds=seconds)), []
    for task, answer, run in zip(tasks, answers, runs):
        if task.kind == triplets.DEDUCTION:
            literal, value = triplets.value_of(answer)
            verdicts.append((literal, literal and value == triplets.value_of(task.outputs[0])[1]))
        elif run is None:
            verdicts.append((False, False))
        else:
            wanted = task.outputs[task.shown if task.kind == triplets.INDUCTION else 0 :]
            verdicts.append((True, all(_same(got, want) for got, want in zip(next(ran), wanted))))
    return verdicts


def _agreed(first: Result, second: Result) -> tuple[str | None, ...]:
    def text(answer: Answer) -> str | None:
        shown = triplets.shown_value(answer.value) if answer.status == "ok" else ""
        return shown if triplets.value_of(shown)[0] else None

    return tuple(text(a) if text(a) == text(b) else None for a, b in zip(first.answers, second.answers))


def _same(got: str | None, want: str) -> bool:
    return got is not None and triplets.value_of(got)[1] == triplets.value_of(want)[1]


def _fits(triplet: Triplet, width: int, vocabulary: Vocabulary) -> bool:
    prompts = [triplets.solve_prompt(triplet), triplets.propose_prompt(triplet.kind, triplet.text), triplet.text]
    try:
        return max(len(vocabulary.encode(text)) for text in prompts) <= width and len(triplet.text.encode()) <= width
    except Refused:  # a character that the vocabulary cannot spell: outputs may have any
        return False


@functools.lru_cache(maxsize=4)
def _pool(seconds: float) -> Pool:
    return Pool(Limits(seconds=seconds, cpu_seconds=max(1, round(seconds)), memory_bytes=64 << 20))
