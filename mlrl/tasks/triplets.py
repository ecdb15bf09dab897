"""Triplets (program f, input i, output o) as tasks: to tell o (deduction), an i (abduction), or f (induction).

A triplet is written `program#input`, or `program#input#input...` for induction; its outputs are what running it gives.
A program is a Python function f, or in short the statements of its body over x: `x=x+3;x=x%5` is

    def f(x):
        x=x+3;x=x%5
        return x

A prompt is a letter, what is given, and `=`: the small letters d, a, i ask to solve, the capitals D, A, I to propose.

    d x=x+3#4 =   -> 7          a x=x+3#7 =   -> 4           i 4>7#0>3 =   -> x=x+3        (spaces only here)
    D x=x+3#4 =   -> x=x*2#5    A likewise                   I x=x+3 =     -> 4#0#7#1

Reference: Zhao et al. 2025, "Absolute Zero". Left out: messages, think and answer tags, which a small model can do
without, and the list of forbidden imports, for which there is mlrl.sandbox.
"""

from __future__ import annotations

import ast
import json
import random
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mlrl.sandbox.values import is_literal
from mlrl.tasks import tables
from mlrl.tasks.mixtures import mixture
from mlrl.types import Array, Prompts, Refused, Task, Vocabulary
from mlrl.vocabularies import characters

KINDS = ("deduction", "abduction", "induction")
DEDUCTION, ABDUCTION, INDUCTION = range(3)
VOCABULARY = characters("0123456789+-*%=x;()[],:#>daiDAIsortelunm")
INDUCTION_INPUTS = 4  # the first half is shown, and the program must be right on the rest
FIRST = ("x=x#1", "x=x#1", "x=x#1#2#3#4")  # the one trivial triplet of each kind that a run can begin with
_TEST_OF_TEN = 1


class Triplet(NamedTuple):
    """A program and its runs: one input and output, or several for induction, as texts of Python."""

    kind: int
    program: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def text(self) -> str:
        return "#".join((self.program, *self.inputs))

    @property
    def shown(self) -> int:
        """How many of the pairs a solver sees."""
        return len(self.inputs) // 2 if self.kind == INDUCTION else 1


def source_of(program: str) -> str:
    """The Python function f of a program, which may be only its body."""
    return program if program.lstrip().startswith(("def ", "import ", "from ")) else f"def f(x):\n {program}\n return x"


def parsed(kind: int, text: str) -> tuple[str, tuple[str, ...]] | None:
    """(program, inputs) of a triplet's text; None unless it is well-formed: Python, and as many literals as its kind
    needs, no two of them equal.
    """
    program, *inputs = text.split("#")
    enough = len(inputs) == INDUCTION_INPUTS if kind == INDUCTION else len(inputs) == 1
    if not program or not enough or len(set(inputs)) < len(inputs) or not all(map(_is_input, inputs)):
        return None
    try:
        ast.parse(source_of(program))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    return program, tuple(inputs)


def shown_value(value: Any) -> str:
    """A value as text: its repr, without spaces where no text is in it."""
    text = repr(value)
    return text if "'" in text or '"' in text else text.replace(" ", "")


def value_of(text: str) -> tuple[bool, Any]:
    """(whether it is a literal, its value)."""
    return (True, ast.literal_eval(text)) if is_literal(text) else (False, None)


def solve_prompt(triplet: Triplet) -> str:
    """What a solver is asked."""
    kind, program, inputs, outputs = triplet
    if kind == DEDUCTION:
        return f"d{program}#{inputs[0]}="
    if kind == ABDUCTION:
        return f"a{program}#{outputs[0]}="
    pairs = "#".join(f"{i}>{o}" for i, o in zip(inputs[: triplet.shown], outputs))
    return f"i{pairs}="


def propose_prompt(kind: int, reference: str) -> str:
    """What a proposer is asked; for induction, inputs of the reference's program."""
    return f"{'DAI'[kind]}{reference.split('#')[0] if kind == INDUCTION else reference}="


def solution(triplet: Triplet) -> str:
    """One right answer."""
    return (triplet.outputs[0], triplet.inputs[0], triplet.program)[triplet.kind]


def random_triplet(kind: int, number: int, *, statements: int = 2, seed: int = 0) -> Triplet:
    """A triplet of short statements over digits and lists of up to three; a function of its arguments."""
    draw = random.Random(f"{seed}/{kind}/{number}")
    lists = draw.random() < 0.4
    digit = lambda low=1: draw.randint(low, 9)  # noqa: E731
    ints = (lambda: f"x=x+{digit()}", lambda: f"x=x-{digit()}", lambda: f"x=x*{digit(2)}", lambda: f"x=x%{digit(2)}")
    of_lists = (lambda: "x=x[::-1]", lambda: f"x=x+[{digit()}]", lambda: "x=x[1:]", lambda: "x=sorted(x)")
    steps, left = [], draw.randint(1, statements)
    if lists and draw.random() < 0.5:
        steps, left = [draw.choice(("x=sum(x)", "x=len(x)"))], left - 1
    steps = [draw.choice(of_lists if lists else ints)() for _ in range(left)] + steps
    program, inputs = ";".join(steps), []
    while len(inputs) < (INDUCTION_INPUTS if kind == INDUCTION else 1):
        given = f"[{','.join(str(digit(0)) for _ in range(draw.randint(1, 3)))}]" if lists else str(draw.randint(0, 19))
        inputs += [given] if given not in inputs else []
    own: dict[str, Any] = {}
    exec(source_of(program), own)  # written above, not by a model
    outputs = tuple(shown_value(own["f"](ast.literal_eval(given))) for given in inputs)
    return Triplet(kind, program, tuple(inputs), outputs)


def solve(*, count: int = 2000, split: str = "train", kinds: Sequence[int] = (0, 1, 2), statements: int = 2,
          seed: int = 0, vocabulary: Vocabulary = VOCABULARY, name: str = "") -> Task:  # fmt: skip
    """Random triplets to solve, one source for each kind. Judge with mlrl.rewards.absolute_zero.solved.

    Triplets are numbered; one in ten, by a hash of its text, is of the test split, so that no text is in both.

    Args:
      count: how many numbers of each kind are looked at; about nine in ten are of the train split.
      split: "train" or "test".
      kinds: of KINDS, by number.
      statements: at most, of a program.
    Returns: a Task on the host; examples hold "kind", "triplet" (its text) and "outputs".
    Raises: Refused, if the split is unknown or empty.
    """
    if split not in ("train", "test"):
        raise Refused(f"triplets.solve: split must be 'train' or 'test', got {split!r}")
    parts, name = [], name or ("triplets" if split == "train" else "triplets_test")
    for kind in kinds:
        found = [random_triplet(kind, number, statements=statements, seed=seed) for number in range(count)]
        own = [t for t in found if (zlib.crc32(t.text.encode()) % 10 < _TEST_OF_TEN) == (split == "test")]
        examples = [{"prompt": solve_prompt(t), "answer": solution(t), "kind": kind, "triplet": t.text,
                     "outputs": list(t.outputs)} for t in own]  # fmt: skip
        parts.append(tables.table(examples, vocabulary, name=KINDS[kind]))
    return mixture(parts, name=name)


def propose(*, prompt_tokens: int = 48, statements: int = 2, seed: int = 0, vocabulary: Vocabulary = VOCABULARY,
            name: str = "proposals") -> Task:  # fmt: skip
    """Prompts that ask for triplets, one source for each kind; `absolute_zero.recall` puts others' triplets into them.

    As drawn, a prompt shows a random triplet, and its demonstration is another (for induction, inputs of the same
    program): for a warm start. The fallback is the trivial triplet.

    Args:
      prompt_tokens: P, room for the prompts of proposers and of solvers: what does not fit cannot be proposed.
    Returns: a Task on the host; `Prompts.example` holds reference and fallback [N,P] uint8, texts of triplets.
    """
    size = 2**30  # the index is where randomness comes from

    def at(source: Array, index: Array) -> Prompts:
        source, index = np.asarray(source, np.int32), np.asarray(index, np.int32)
        references = [reference(int(s), int(i)) for s, i in zip(source, index)]
        asked = [propose_prompt(kind, text) for kind, text in zip(source, references)]
        fallback = text_array([FIRST[kind] for kind in source], prompt_tokens)
        return Prompts(*prompt_arrays(asked, prompt_tokens, vocabulary), source, index,
                       {"reference": text_array(references, prompt_tokens), "fallback": fallback})  # fmt: skip

    def reference(source: int, index: int) -> str:
        if source == INDUCTION:  # its demonstration is inputs of this very program
            triplet = random_triplet(source, index, statements=statements, seed=seed + 1)
            return f"{triplet.program}#{triplet.inputs[0]}"
        return random_triplet(source, index, statements=statements, seed=seed + 2).text

    def shown(source: int, index: int) -> str:
        triplet = random_triplet(source, index, statements=statements, seed=seed + 1)
        return triplet.text if source != INDUCTION else "#".join(triplet.inputs)

    def targets(source: Array, index: Array) -> tuple[np.ndarray, np.ndarray]:
        rows = [[*vocabulary.encode(shown(int(s), int(i))), vocabulary.eos_ids[0]] for s, i in zip(source, index)]
        tokens, valid = tables.padded(rows, vocabulary.pad_id, left=False)
        room = ((0, 0), (0, prompt_tokens - tokens.shape[1]))  # one width for all steps
        return np.pad(tokens, room, constant_values=vocabulary.pad_id), np.pad(valid, room)

    def example(source: int, index: int) -> dict[str, Any]:
        return {"prompt": propose_prompt(source, reference(source, index)), "answer": shown(source, index),
                "task": KINDS[source]}  # fmt: skip

    return Task(name, tuple(f"propose_{kind}" for kind in KINDS), (size,) * 3, (1 / 3,) * 3, vocabulary, at, targets,
                example, in_graph=False)  # fmt: skip


def prompt_arrays(texts: Sequence[str], width: int, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [N,P] int32, valid [N,P] bool) of prompts, padded on the left. Raises Refused if one is longer than P."""
    rows = [vocabulary.encode(text) for text in texts]
    if max(map(len, rows)) > width:
        raise Refused(f"a prompt has {max(map(len, rows))} tokens: raise triplets.propose.prompt_tokens from {width}")
    tokens, valid = np.full((len(rows), width), vocabulary.pad_id, np.int32), np.zeros((len(rows), width), bool)
    for number, row in enumerate(rows):
        tokens[number, width - len(row) :] = row
        valid[number, width - len(row) :] = True
    return tokens, valid


def text_array(texts: Sequence[str], width: int) -> np.ndarray:
    """Texts as bytes [N,width] uint8, zeros behind them."""
    return np.array([list(text.encode().ljust(width, b"\0")) for text in texts], np.uint8).reshape(len(texts), width)


def texts_of(array: Array) -> list[str]:
    """The texts of `text_array`."""
    return [bytes(row).rstrip(b"\0").decode() for row in np.asarray(array)]


def seeds(path: str, kind: int, *, most: int = 256, width: int = 48) -> tuple[str, ...]:
    """Triplets' texts of a file of Absolute-Zero-Reasoner's seeds, as far as they can be written without another #.

    Args:
      path: seed_io.jsonl(.gz) with "snippet" and "input", or for induction code_f_seed_io.jsonl(.gz) with "inputs".
      most: how many at most.
      width: of the buffer that they are for; longer ones are left out.
    """
    found = []
    for row in tables.read_jsonl(path, ("snippet",)):
        inputs = row.get("inputs", [row.get("input")])[: INDUCTION_INPUTS if kind == INDUCTION else 1]
        if all(isinstance(given, str) for given in inputs) and "#" not in json.dumps([row["snippet"], inputs]):
            text = "#".join((row["snippet"], *inputs))
            found += [text] if len(text.encode()) + 2 <= width and parsed(kind, text) else []
    return tuple(found[:most])


def _is_input(text: str) -> bool:
    return bool(text) and is_literal(f"[{text}]")
