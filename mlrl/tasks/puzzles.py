"""Puzzles that are computed instead of stored: arithmetic and countdown, with their verifiers, all in the graph."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlrl.tasks import symbols as s
from mlrl.tasks.mixtures import mixture
from mlrl.types import Array, Prompts, Refused, Task, Vocabulary
from mlrl.vocabularies import characters

VOCABULARY = characters(s.ALPHABET)
_JUDGED = "0123456789+-*"  # what an expression is made of
_WORDS = {"+": "plus", "-": "minus", "*": "times"}


def arithmetic(
    *,
    operations: str = "+",
    digits: int = 2,
    operands: int = 2,
    modulus: int = 0,
    reverse_answer: bool = False,
    scratchpad: bool = False,
    split: str = "train",
    test_share: float = 0.1,
    seed: int = 0,
    vocabulary: Vocabulary = VOCABULARY,
    name: str = "",
) -> Task:
    """Sums, differences, products and chains of them: the prompt 12+34= has the answer 46.

    Every problem of the family has a number; it is decoded into operands and operations by mixed radix arithmetic. A
    fixed pseudo-random permutation of the numbers divides them into test and train, so no held-out problem is ever
    trained on. Products bind before sums. Operands have exactly `digits` digits, so that families of different
    `digits` share no problem.

    Args:
      operations: which operations occur, of "+-*"; each place in a chain draws one.
      digits: of an operand; one digit is 0 to 9, two are 10 to 99, ...
      operands: how many are chained.
      modulus: 0, or the answer is taken modulo this number: (12+34)%7= has the answer 4.
      reverse_answer: the answer's least significant digit comes first: 12+34= has the answer 64.
      scratchpad: demonstrations write running totals before the answer: 1+2+3= is answered 3,6. Sums and
        differences, or products alone. Judge with `final_answer_verifier`, which looks behind the last comma.
      split: "train" or "test".
      test_share: of all problems.
      seed: of the permutation.
      vocabulary: must spell each symbol as one token.
      name: in the logs; by default made of the settings, such as plus_2x2 (operands x digits).
    Returns: a Task in the graph. `Prompts.example` holds answer_tokens and answer_valid [N,T], the answer without
      EOS, and separator [N], the token before a final answer.
    Raises: Refused, if a setting is out of range, or the family or its answers leave int32.
    """
    name = name or _arithmetic_name(operations, digits, operands, modulus, reverse_answer, scratchpad, split)
    _check_arithmetic(operations, digits, operands, modulus, scratchpad, name)
    lowest = 0 if digits == 1 else 10 ** (digits - 1)
    count, places = 10**digits - lowest, operands - 1
    size = count**operands * len(operations) ** places
    offset, split_size = s.held_out(size, split, test_share, name)
    largest = _largest_answer(operations, 10**digits - 1, operands)
    width = len(str(modulus - 1 if modulus else largest))
    signed = "-" in operations and not modulus
    ids = s.token_ids(vocabulary, "0123456789=" + operations + "(%)" * bool(modulus) + "," * scratchpad
                      + "-" * signed)  # fmt: skip

    def problem(index: Array) -> tuple[list[Array], list[Array]]:
        rest, numbers, choices = s.problem_number(index, offset, size, seed), [], []
        for _ in range(operands):
            rest, digit = rest // count, rest % count
            numbers.append(lowest + digit)
        for _ in range(places):
            rest, digit = rest // len(operations), rest % len(operations)
            choices.append(digit)
        return numbers, choices

    def question(numbers: list[Array], choices: list[Array]) -> s.Cells:
        rows = len(numbers[0])
        parts = [s.fixed("(", rows)] if modulus else []
        for i, value in enumerate(numbers):
            parts += ([s.one_of(operations, choices[i - 1])] if i else []) + [s.number(value, digits)]
        return s.line(*parts, s.fixed(f")%{modulus}=" if modulus else "=", rows))

    def reduced(value: Array) -> Array:
        return value % modulus if modulus else value

    def answer(value: Array) -> s.Cells:
        return s.number(reduced(value), width, signed=signed, reverse=reverse_answer)

    def at(source: Array, index: Array) -> Prompts:
        numbers, choices = problem(index)
        tokens, valid = s.pack_right(question(numbers, choices), ids, vocabulary.pad_id)
        value = _value(numbers, choices, operations)
        answer_tokens, answer_valid = s.pack_left(answer(value), ids, vocabulary.pad_id)
        separator = jnp.full(index.shape, ids[s.ALPHABET.index(",")] if scratchpad else -1, jnp.int32)
        example = {"answer_tokens": answer_tokens, "answer_valid": answer_valid, "separator": separator}
        return Prompts(tokens, valid, source, index, example)

    def targets(source: Array, index: Array) -> tuple[Array, Array]:
        numbers, choices = problem(index)
        ends = range(2, operands + 1) if scratchpad else (operands,)
        totals = [_value(numbers[:end], choices[: end - 1], operations) for end in ends]
        comma = s.fixed(",", len(index))
        cells = [cell for total in totals for cell in (answer(total), comma)][:-1]
        return s.append_token(*s.pack_left(s.line(*cells), ids, vocabulary.pad_id), vocabulary.eos_ids[0],
                              vocabulary.pad_id)  # fmt: skip

    def facts(prompts: Prompts) -> dict[str, Any]:
        valid = prompts.example["answer_valid"][0]
        return {"answer": vocabulary.decode(prompts.example["answer_tokens"][0][valid])}

    return _task(name, split_size, vocabulary, at, targets, facts)


def arithmetic_levels(
    *, digits: Sequence[int] = (1, 2, 3), rates: Sequence[float] = (), name: str = "arithmetic_levels",
    **settings: Any,
) -> Task:  # fmt: skip
    """A mixture of `arithmetic` over the number of digits, from easy to hard: one source per level."""
    return mixture([arithmetic(digits=d, **settings) for d in digits], rates, name=name)


def countdown(
    *,
    numbers: int = 3,
    max_number: int = 9,
    operations: str = "+-*",
    use_all: bool = True,
    split: str = "train",
    test_share: float = 0.1,
    seed: int = 0,
    vocabulary: Vocabulary = VOCABULARY,
    name: str = "",
) -> Task:
    """Reach the target with the numbers: the prompt 3,5,7:22= may be answered 5*3+7.

    The target is the value of a hidden expression over all numbers in some order, so every puzzle can be solved; any
    expression that reaches it is right. Expressions have numbers and operations, products bind before sums, no
    parentheses, no division. Train and test share no tuple of numbers.

    Args:
      numbers: how many are given.
      max_number: they lie between 1 and this.
      operations: of "+-*".
      use_all: each number must be used exactly once; otherwise at most once.
      split, test_share, seed, vocabulary, name: as in `arithmetic`; the share is of number tuples.
    Returns: a Task in the graph. `Prompts.example` holds numbers [N,K], target [N], use_all [N] and symbols [N,13]:
      the token ids of the digits and of "+-*", as `countdown_verifier` reads them.
    Raises: Refused, if a setting is out of range, or the family or its targets leave int32.
    """
    name = name or f"countdown_{numbers}x{max_number}" + "_test" * (split == "test")
    _check_operations(operations, name)
    for knob, value, lowest in (("numbers", numbers, 2), ("max_number", max_number, 2)):
        if value < lowest:
            raise Refused(f"{name}: {knob} must be at least {lowest}, got {value}")
    orders = math.factorial(numbers)
    tuples, variants = max_number**numbers, orders * len(operations) ** (numbers - 1)
    if tuples * variants > s.MOST_PROBLEMS:
        raise Refused(f"{name} has {tuples * variants} problems, more than {s.MOST_PROBLEMS}: "
                      "lower numbers or max_number")  # fmt: skip
    offset, split_tuples = s.held_out(tuples, split, test_share, name)
    width, digits = len(str(_largest_answer(operations, max_number, numbers))), len(str(max_number))
    ids = s.token_ids(vocabulary, "0123456789,:=" + operations + "-")
    allowed = "0123456789" + operations
    judged = np.asarray([ids[s.ALPHABET.index(c)] if c in allowed else -1 for c in _JUDGED], np.int32)
    permutations = _permutations(numbers)

    def problem(index: Array) -> tuple[list[Array], list[Array], list[Array]]:
        """(numbers as shown, numbers as the hidden expression takes them, its operations)."""
        mixed = s.problem_number(index, 0, split_tuples * variants, seed + 1)
        rest, shown = s.problem_number(mixed % split_tuples, offset, tuples, seed), []
        for _ in range(numbers):
            rest, digit = rest // max_number, rest % max_number
            shown.append(1 + digit)
        rest, choices = mixed // split_tuples, []
        order = jnp.asarray(permutations)[rest % orders]
        rest = rest // orders
        for _ in range(numbers - 1):
            rest, digit = rest // len(operations), rest % len(operations)
            choices.append(digit)
        taken = jnp.take_along_axis(jnp.stack(shown, axis=1), order, axis=1)
        return shown, [taken[:, i] for i in range(numbers)], choices

    def at(source: Array, index: Array) -> Prompts:
        shown, taken, choices = problem(index)
        target, rows = _value(taken, choices, operations), len(index)
        cells = [cell for value in shown for cell in (s.number(value, digits), s.fixed(",", rows))][:-1]
        cells += [s.fixed(":", rows), s.number(target, width, signed="-" in operations), s.fixed("=", rows)]
        tokens, valid = s.pack_right(s.line(*cells), ids, vocabulary.pad_id)
        example = {
            "numbers": jnp.stack(shown, axis=1),
            "target": target,
            "use_all": jnp.full((rows,), use_all),
            "symbols": jnp.broadcast_to(jnp.asarray(judged), (rows, len(_JUDGED))),
        }
        return Prompts(tokens, valid, source, index, example)

    @jax.jit
    def expression(index: Array) -> tuple[Array, Array]:
        _, taken, choices = problem(index)
        cells = [s.number(taken[0], digits)]
        for value, choice in zip(taken[1:], choices):
            cells += [s.one_of(operations, choice), s.number(value, digits)]
        return s.pack_left(s.line(*cells), ids, vocabulary.pad_id)

    def targets(source: Array, index: Array) -> tuple[Array, Array]:
        return s.append_token(*expression(index), vocabulary.eos_ids[0], vocabulary.pad_id)

    def facts(prompts: Prompts) -> dict[str, Any]:
        tokens, valid = expression(prompts.index)
        values = prompts.example
        return {"answer": vocabulary.decode(tokens[0][valid[0]]), "numbers": values["numbers"][0].tolist(),
                "target": int(values["target"][0]), "use_all": use_all}  # fmt: skip

    return _task(name, split_tuples * variants, vocabulary, at, targets, facts)


def _task(name: str, size: int, vocabulary: Vocabulary, at: Callable, targets: Callable,
          facts: Callable[[Prompts], dict[str, Any]]) -> Task:  # fmt: skip
    """A task in the graph with one source; `facts` says what an example holds besides its prompt."""
    at, targets = jax.jit(at), jax.jit(targets)

    def example(source: int, index: int) -> Mapping[str, Any]:
        if not (source == 0 and 0 <= index < size):
            raise Refused(f"{name} has the examples 0 to {size - 1} of source 0, asked for {index} of {source}")
        prompts = jax.device_get(at(np.zeros(1, np.int32), np.full(1, index, np.int32)))
        prompt = vocabulary.decode(prompts.tokens[0][prompts.valid[0]])
        return {"prompt": prompt, "task": name} | facts(prompts)

    return Task(name, (name,), (size,), (1.0,), vocabulary, at, targets, example, in_graph=True)


def _value(numbers: Sequence[Array], choices: Sequence[Array], operations: str) -> Array:
    """Value of n0 op n1 op n2 ..., products before sums; `choices` are positions in `operations`."""
    total, term = jnp.zeros_like(numbers[0]), numbers[0]
    codes = jnp.asarray([_JUDGED.index(operation) for operation in operations], jnp.int32)
    for value, choice in zip(numbers[1:], choices):
        operation = codes[choice]
        total, term = _extended(total, term, operation, value)
    return total + term


def _extended(total: Array, term: Array, operation: Array, value: Array) -> tuple[Array, Array]:
    """(sum of closed terms, open term) after one more operation, a position in _JUDGED, and number."""
    times, minus = operation == _JUDGED.index("*"), operation == _JUDGED.index("-")
    return jnp.where(times, total, total + term), jnp.where(times, term * value, jnp.where(minus, -value, value))


def _permutations(n: int) -> np.ndarray:
    return np.asarray(list(itertools.permutations(range(n))), np.int32)


def _largest_answer(operations: str, largest: int, operands: int) -> int:
    """The largest absolute value of a chain."""
    return largest**operands if "*" in operations else largest * operands


def _arithmetic_name(operations: str, digits: int, operands: int, modulus: int, reverse_answer: bool,
                     scratchpad: bool, split: str) -> str:  # fmt: skip
    words = [_WORDS.get(operation, operation) for operation in operations]
    words += [f"{operands}x{digits}"] + [f"mod{modulus}"] * bool(modulus) + ["reversed"] * reverse_answer
    return "_".join(words + ["scratchpad"] * scratchpad + ["test"] * (split == "test"))


def _check_operations(operations: str, name: str) -> None:
    if not operations or len(set(operations)) != len(operations) or not set(operations) <= set(_WORDS):
        raise Refused(f"{name}: operations must be some of '+-*', each once, got {operations!r}")


def _check_arithmetic(operations: str, digits: int, operands: int, modulus: int, scratchpad: bool, name: str) -> None:
    _check_operations(operations, name)
    for knob, value, lowest in (("digits", digits, 1), ("operands", operands, 2)):
        if value < lowest:
            raise Refused(f"{name}: {knob} must be at least {lowest}, got {value}")
    if modulus < 0 or modulus == 1:
        raise Refused(f"{name}: modulus must be 0 (off) or at least 2, got {modulus}")
    if scratchpad and "*" in operations and operations != "*":
        raise Refused(f"{name}: running totals need operations that bind alike: '+', '-', '+-' or '*', "
                      f"got {operations!r} with scratchpad=True")  # fmt: skip
    largest = _largest_answer(operations, 10**digits - 1, operands)
    if largest > s.MOST_PROBLEMS:
        raise Refused(f"{name} has answers up to {largest}, more than {s.MOST_PROBLEMS}: lower digits or operands")
