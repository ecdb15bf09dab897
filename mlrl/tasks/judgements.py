"""Judging as tokens: what a judge is asked about a completion, how its grade is read, and how it learns to grade."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlrl.tasks import symbols as s
from mlrl.tasks.tables import encode, padded
from mlrl.types import Array, Prompts, Refused, Task, Vocabulary, require_whole


@dataclasses.dataclass(frozen=True)
class Form:
    """What a judge reads, `before` source `between` candidate `after`, and what it may answer: a grade of 0 to `top`.

    before, between, after  texts, tokenized by themselves
    top        the best grade; the paper's is 100
    separator  one token, behind whose last occurrence the grade stands, for judges that think first; "": it is all
    """

    before: str = ""
    between: str = ""
    after: str = "?"
    top: int = 9
    separator: str = ""

    def __post_init__(self):
        require_whole("Form", "top", self.top, 1)

    @property
    def digits(self) -> int:
        """Of the longest grade."""
        return len(str(self.top))


def ask(form: Form, vocabulary: Vocabulary, source: tuple[Array, Array],
        candidate: tuple[Array, Array]) -> tuple[Array, Array]:  # fmt: skip
    """Judge prompts, padded on the left, whatever the padding of what is judged.

    Args:
      source, candidate: (tokens [B,W], valid [B,W]); valid ones keep their order. The candidate is without its EOS.
    Returns: (tokens [B,W'], valid [B,W']), W' the sum of all widths.
    """
    rows = source[0].shape[0]

    def fixed(text: str, name: str) -> tuple[Array, Array]:
        ids = jnp.asarray(encode(vocabulary, text, f"Form.{name}"), jnp.int32)
        return jnp.broadcast_to(ids, (rows, ids.size)), jnp.ones((rows, ids.size), bool)

    parts = (fixed(form.before, "before"), source, fixed(form.between, "between"), candidate,
             fixed(form.after, "after"))  # fmt: skip
    tokens, valid = (jnp.concatenate([jnp.asarray(part[i]) for part in parts], axis=1) for i in range(2))
    order = jnp.argsort(valid, axis=1, stable=True)
    tokens, valid = (jnp.take_along_axis(x, order, axis=1) for x in (tokens, valid))
    return jnp.where(valid, tokens, vocabulary.pad_id).astype(jnp.int32), valid


def read(form: Form, vocabulary: Vocabulary, tokens: Array, written: Array, ended: Array) -> Array:
    """The grades of answers as shares of the top grade, in [0,1]; NaN where an answer is no grade.

    A grade is a whole number of 0 to `form.top` in digits, no longer than the top one, after which the answer ends.
    Nothing is guessed: 12 of 9, "8.", "8 or 9", nothing, and an answer that was cut off are no grades.

    Args:
      tokens: [B,T].
      written: [B,T] bool, the tokens of the answer without its EOS.
      ended: [B] bool, whether there was an EOS.
    Returns: [B] float32.
    """
    values, digits = _numbers(vocabulary)
    graded, found = written, jnp.ones_like(ended)
    if form.separator:
        ids = encode(vocabulary, form.separator, "Form.separator")
        if len(ids) != 1:
            raise Refused(f"Form.separator must be one token, and {form.separator!r} is {len(ids)}: name another")
        here = written & (tokens == ids[0])
        graded, found = written & (jnp.cumsum(here[:, ::-1], axis=1)[:, ::-1] == 0), here.any(axis=1)
    value, known = jnp.zeros(ended.shape, jnp.int32), jnp.asarray(values)[tokens] >= 0
    count = jnp.sum(jnp.where(graded, jnp.asarray(digits)[tokens], 0), axis=1)
    for column in range(tokens.shape[1]):  # what is longer than the top grade is refused below, whatever overflows here
        token = tokens[:, column]
        longer = value * 10 ** jnp.asarray(digits)[token] + jnp.asarray(values)[token]
        value = jnp.where(graded[:, column], longer, value)
    fine = ended & found & jnp.all(known | ~graded, axis=1) & (count >= 1) & (count <= form.digits)
    return jnp.where(fine & (value <= form.top), value / form.top, jnp.nan).astype(jnp.float32)


@functools.lru_cache(maxsize=8)
def _numbers(vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """(value [V] of tokens that are nothing but a few digits, -1 for others; their number of digits [V])."""
    texts = [vocabulary.decode([token]) for token in range(vocabulary.size)]
    known = [text.isascii() and text.isdigit() and len(text) < 9 for text in texts]
    return (np.asarray([int(text) if fine else -1 for text, fine in zip(texts, known)], np.int32),
            np.asarray([len(text) if fine else 0 for text, fine in zip(texts, known)], np.int32))  # fmt: skip


def judgements(task: Task, *, form: Form = Form(), name: str = "") -> Task:
    """The rated completions of a task as demonstrations of judging: the prompt asks, the target is the grade.

        grade = round(top * outcome)

    Args:
      task: in the graph, with candidates whose outcomes lie in [0,1]; one without an outcome is no demonstration.
      form: as the judge will be asked.
      name: in the logs; by default the task's with "_judged".
    Returns: a Task in the graph with C examples for each prompt. `Prompts.example` holds the grade as answer_tokens
      and answer_valid [N,T], for graph.arithmetic.
    Raises: Refused, if the task is on the host, or has no candidates.
    """
    name, vocabulary = name or f"{task.name}_judged", task.vocabulary
    if not task.in_graph:
        raise Refused(f"judgements needs a task in the graph, and {task.name} is on the host")
    row = np.zeros(1, np.int32)
    each = jax.eval_shape(task.candidates, row, row).outcome.shape[1]
    spelled = [encode(vocabulary, str(grade), f"{name}, the grade {grade}") for grade in range(form.top + 1)]
    answer_ids, answer_valid = padded(spelled, vocabulary.pad_id, left=False)

    def judged(source: Array, index: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        """(judge prompts, grades as tokens) of the index % C th candidate of each example index // C."""
        prompts, which = task.at(source, index // each), jnp.asarray(index % each)
        found = task.candidates(source, index // each)
        of = lambda x: jnp.take_along_axis(x, which.reshape((-1,) + (1,) * (x.ndim - 1)), axis=1)[:, 0]  # noqa: E731
        tokens, outcome = of(found.tokens), of(found.outcome)
        said = without_end(tokens, of(found.valid), vocabulary)
        asked = ask(form, vocabulary, (prompts.tokens, prompts.valid), (tokens, said))
        grade = jnp.round(form.top * jnp.clip(jnp.nan_to_num(outcome), 0.0, 1.0)).astype(jnp.int32)
        known = jnp.isfinite(outcome)[:, None]
        return asked, (jnp.asarray(answer_ids)[grade], jnp.asarray(answer_valid)[grade] & known)

    def at(source: Array, index: Array) -> Prompts:
        (tokens, valid), (answer, answer_is) = judged(source, index)
        return Prompts(tokens, valid, source, index, {"answer_tokens": answer, "answer_valid": answer_is})

    def targets(source: Array, index: Array) -> tuple[Array, Array]:
        answer, answer_is = judged(source, index)[1]
        tokens, valid = s.append_token(answer, answer_is, vocabulary.eos_ids[0], vocabulary.pad_id)
        return tokens, valid & answer_is.any(axis=1, keepdims=True)

    at, targets = jax.jit(at), jax.jit(targets)

    def example(source: int, index: int) -> Mapping[str, Any]:
        prompts = jax.device_get(at(np.full(1, source, np.int32), np.full(1, index, np.int32)))
        answer = prompts.example["answer_tokens"][0][prompts.example["answer_valid"][0]]
        return {"prompt": vocabulary.decode(prompts.tokens[0][prompts.valid[0]]), "answer": vocabulary.decode(answer),
                "task": name}  # fmt: skip

    sources = tuple(f"{source}_judged" for source in task.sources)
    sizes = tuple(size * each for size in task.sizes)
    return Task(name, sources, sizes, task.rates, vocabulary, at, targets, example, in_graph=True)


def without_end(tokens: Array, valid: Array, vocabulary: Vocabulary) -> Array:
    """`valid` [B,T] without the tokens that end a completion."""
    return valid & ~jnp.isin(tokens, jnp.asarray(vocabulary.eos_ids))
