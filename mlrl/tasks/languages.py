"""Translation between two small artificial languages, computed in the graph: a letter is a word or an ending."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlrl.tasks import symbols as s
from mlrl.tasks.verifiers import ngram_f
from mlrl.types import Array, Candidates, Prompts, Refused, Task
from mlrl.vocabularies import characters

NOUNS, ADJECTIVES, VERBS = 8, 6, 6
THEIRS = string.ascii_lowercase[: NOUNS + ADJECTIVES + VERBS + 1]  # nouns, adjectives, verbs, the plural
OURS = string.ascii_uppercase + "*+-"  # nouns, adjectives in two genders, verbs; object, plural, plural of the subject
VOCABULARY = characters(THEIRS + OURS + "0123456789=?")
PROBLEMS = (NOUNS * (ADJECTIVES + 1) * 2) ** 2 * VERBS
_FIRST = VOCABULARY.encode("a")[0]
_OURS = VOCABULARY.encode("A")[0]
_PLURAL = VOCABULARY.encode("u")[0]
_OBJECT, _OUR_PLURAL, _AGREES = VOCABULARY.encode("*+-")
_LONGEST = 9  # words and endings of a translation


def languages(*, noise: float = 0.0, candidates: int = 4, split: str = "train", test_share: float = 0.1,
              seed: int = 0, name: str = "") -> Task:  # fmt: skip
    """Translate sentences of subject, verb and object, from the small letters to the capitals.

    From: [adjective] noun [u] verb [adjective] noun [u], the subject first; u is the plural.
    To:   noun * [adjective] [+] verb [-] noun [adjective] [+], the object first. Adjectives follow their noun and agree
    with its gender (nouns A, C, E, G have one and B, D, F, H the other); * marks the object, + a plural, and - a verb
    whose subject is in the plural. So order, agreement and endings differ, and the first word depends on the last ones.

    Args:
      noise: the share of demonstrations that are spoiled, as candidates are.
      candidates: C rated completions of each prompt. Of them 25% are right, 10% are right for another sentence, and the
        rest have errors: words changed to another or to the other gender, left out, endings put in. Their outcome is
        `verifiers.ngram_f` of one and two tokens.
      split, test_share, seed, name: as in puzzles.arithmetic; the seed is also that of the errors.
    Returns: a Task in the graph. `Prompts.example` holds answer_tokens and answer_valid [N,T], the translation without
      EOS.
    """
    name = name or "languages" + "_test" * (split == "test")
    if not 0.0 <= noise <= 1.0 or candidates < 1:
        raise Refused(f"{name}: noise must lie in [0, 1] and candidates be at least 1, got {noise} and {candidates}")
    offset, size = s.held_out(PROBLEMS, split, test_share, name)
    eos, pad = VOCABULARY.eos_ids[0], VOCABULARY.pad_id

    def at(source: Array, index: Array) -> Prompts:
        words = _words(s.problem_number(index, offset, PROBLEMS, seed))
        tokens, valid = s.pack_right(_theirs(words), np.arange(VOCABULARY.size), pad)
        answer, answer_valid = _packed(_ours(words))
        return Prompts(tokens, valid, source, index, {"answer_tokens": answer, "answer_valid": answer_valid})

    def spoiled(index: Array, which: Array) -> tuple[tuple[Array, Array], tuple[Array, Array], Array]:
        """(completion number `which` [N], the right translation, both without EOS, and an unused draw [N])."""
        draw = lambda i, which: jax.random.uniform(  # noqa: E731
            jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), i), which), (7, _LONGEST))  # fmt: skip
        drawn = jax.vmap(draw)(index, which)
        kind, rate = drawn[:, 0, 0], 0.05 + 0.45 * drawn[:, 0, 1]
        both = s.problem_number(jnp.concatenate([index, (index + 1 + which) % size]), offset, PROBLEMS, seed)
        number, another = jnp.split(both, 2)
        elsewhere = (kind >= 0.25) & (kind < 0.35)
        rate = jnp.where(kind < 0.35, 0.0, rate)
        said = _with_errors(drawn[:, 1:], rate[:, None], _ours(_words(jnp.where(elsewhere, another, number))))
        tokens, valid = (x[:, : _LONGEST + 2] for x in _packed(said))
        return (tokens, valid), _packed(_ours(_words(number))), drawn[:, 0, 2]

    def targets(source: Array, index: Array) -> tuple[Array, Array]:
        bad, right, draw = spoiled(index, jnp.full_like(index, candidates))  # none of those that are rated
        right = tuple(jnp.pad(x, ((0, 0), (0, 2))) for x in right)
        tokens, valid = (jnp.where((draw < noise)[:, None], a, b) for a, b in zip(bad, right))
        return s.append_token(tokens, valid, eos, pad)

    def rated(source: Array, index: Array) -> Candidates:
        which = jnp.tile(jnp.arange(candidates, dtype=jnp.int32), len(index))
        said, right, _ = spoiled(jnp.repeat(index, candidates), which)
        outcome = ngram_f(*said, *right, max_order=2, beta=1.0)
        each = lambda x: x.reshape(len(index), candidates, *x.shape[1:])  # noqa: E731
        tokens, valid = (each(x) for x in s.append_token(*said, eos, pad))
        return Candidates(tokens, valid, each(outcome), jnp.full(tokens.shape, jnp.nan, jnp.float32))

    at, targets, rated = jax.jit(at), jax.jit(targets), jax.jit(rated)

    def example(source: int, index: int) -> Mapping[str, Any]:
        if not (source == 0 and 0 <= index < size):
            raise Refused(f"{name} has the examples 0 to {size - 1} of source 0, asked for {index} of {source}")
        prompts = jax.device_get(at(np.zeros(1, np.int32), np.full(1, index, np.int32)))
        answer = prompts.example["answer_tokens"][0][prompts.example["answer_valid"][0]]
        return {"prompt": VOCABULARY.decode(prompts.tokens[0][prompts.valid[0]]), "answer": VOCABULARY.decode(answer),
                "task": name}  # fmt: skip

    return Task(name, (name,), (size,), (1.0,), VOCABULARY, at, targets, example, True, rated)


def _words(number: Array) -> list[Array]:
    """[subject's noun, adjective (0: none), plural; object's noun, adjective, plural; verb] of a sentence's number."""
    words = []
    for count in (NOUNS, ADJECTIVES + 1, 2, NOUNS, ADJECTIVES + 1, 2):
        number, word = number // count, number % count
        words.append(word)
    return [*words, number]


def _line(*cells: tuple[Array, Array]) -> s.Cells:
    """Token ids [N] and whether they are said [N], side by side."""
    columns = [jnp.broadcast_arrays(jnp.asarray(token, jnp.int32), said) for token, said in cells]
    return tuple(jnp.stack(x, axis=1) for x in zip(*columns))


def _theirs(words: list[Array]) -> s.Cells:
    noun, adjective, plural, other, others_adjective, others_plural, verb = words
    always = jnp.ones_like(noun, bool)
    return _line(
        (_FIRST + NOUNS + adjective - 1, adjective > 0), (_FIRST + noun, always), (_PLURAL, plural > 0),
        (_FIRST + NOUNS + ADJECTIVES + verb, always),
        (_FIRST + NOUNS + others_adjective - 1, others_adjective > 0), (_FIRST + other, always),
        (_PLURAL, others_plural > 0), (VOCABULARY.encode("=")[0], always),
    )  # fmt: skip


def _ours(words: list[Array]) -> s.Cells:
    noun, adjective, plural, other, others_adjective, others_plural, verb = words
    always = jnp.ones_like(noun, bool)
    inflected = lambda adjective, noun: _OURS + NOUNS + adjective - 1 + ADJECTIVES * (noun % 2)  # noqa: E731
    return _line(
        (_OURS + other, always), (_OBJECT, always), (inflected(others_adjective, other), others_adjective > 0),
        (_OUR_PLURAL, others_plural > 0), (_OURS + NOUNS + 2 * ADJECTIVES + verb, always), (_AGREES, plural > 0),
        (_OURS + noun, always), (inflected(adjective, noun), adjective > 0), (_OUR_PLURAL, plural > 0),
    )  # fmt: skip


def _with_errors(drawn: Array, rate: Array, cells: s.Cells) -> s.Cells:
    """Sentences [N,W] with errors at their rate [N,1], by numbers drawn evenly from [0,1) [N,6,W]: [N,2W], for endings
    that are put in.
    """
    (tokens, said), (change, any_word, gender, drop, put, ending) = cells, jnp.moveaxis(drawn, 1, 0)
    word = tokens - _OURS
    gendered = (word >= NOUNS) & (word < NOUNS + 2 * ADJECTIVES)
    other_gender = NOUNS + (word - NOUNS + ADJECTIVES) % (2 * ADJECTIVES)
    other = jnp.where(gendered & (gender < 0.5), other_gender, (any_word * len(OURS)).astype(jnp.int32))
    changed = jnp.where(change < rate, _OURS + other, tokens)
    puts = said & (put < rate / 3)
    puts &= jnp.cumsum(puts, axis=1) <= 2
    endings = _OBJECT + (ending * 3).astype(jnp.int32)
    wide = lambda a, b: jnp.stack([a, b], axis=-1).reshape(a.shape[0], -1)  # noqa: E731
    return wide(changed, endings), wide(said & (drop >= rate / 3), puts)


def _packed(cells: s.Cells) -> tuple[Array, Array]:
    return s.pack_left(cells, np.arange(VOCABULARY.size), VOCABULARY.pad_id)
