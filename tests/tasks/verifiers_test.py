"""Verifiers of puzzles, on rows written by hand: what is right, what is wrong, and why; under jit and not."""

import jax
import numpy as np
import pytest

from mlrl import vocabularies
from mlrl.tasks import symbols, verifiers
from mlrl.types import Prompts, Rollout

VOCABULARY = vocabularies.characters(symbols.ALPHABET)
EOS, WIDTH = VOCABULARY.eos_ids[0], 16


def rows_of(completions, *, hole=False):
    """Rows with two prompt tokens and the completions, "$" standing for EOS; a row without it is truncated.

    With `hole`, an observation that nobody chose stands after the first action.
    """
    b = len(completions)
    tokens = np.full((b, 2 + WIDTH + 1), VOCABULARY.pad_id, np.int32)
    action = np.zeros(tokens.shape, bool)
    tokens[:, :2] = VOCABULARY.encode("1=")
    for row, text in enumerate(completions):
        ids = [EOS if c == "$" else VOCABULARY.encode(c)[0] for c in text]
        columns = np.arange(2, 2 + len(ids))
        if hole:
            columns[1:] += 1
            tokens[row, 3] = VOCABULARY.encode("7")[0]
        tokens[row, columns] = ids
        action[row, columns] = True
    zeros, truncated = np.zeros(b, np.int32), np.array(["$" not in text for text in completions])
    return Rollout(tokens=tokens, valid=np.ones_like(action), action_mask=action,
                   behavior_log_probs=np.zeros(tokens.shape, np.float32), turn=np.zeros_like(tokens), role=zeros,
                   group=zeros, truncated=truncated, policy_version=zeros).check()  # fmt: skip


def prompts_with(rows, **example):
    zeros = np.zeros(rows, np.int32)
    example = {key: np.repeat(np.asarray(value)[None], rows, axis=0) for key, value in example.items()}
    tokens = np.zeros((rows, 2), np.int32)
    return Prompts(tokens, np.ones((rows, 2), bool), zeros, zeros, example).check()


def with_answer(rows, answer, separator=-1):
    ids = VOCABULARY.encode(answer)
    padded = np.asarray([*ids, 0, 0], np.int32)
    valid = np.asarray([True] * len(ids) + [False, False])
    return prompts_with(rows, answer_tokens=padded, answer_valid=valid, separator=np.int32(separator))


def puzzle(rows, numbers, target, use_all=True, allowed="0123456789+-*"):
    judged = [VOCABULARY.encode(c)[0] if c in allowed else -1 for c in "0123456789+-*"]
    return prompts_with(rows, numbers=np.asarray(numbers, np.int32), target=np.int32(target), use_all=use_all,
                        symbols=np.asarray(judged, np.int32))  # fmt: skip


CASES = {"46$": 1, "46": 0, "4$": 0, "461$": 0, "45$": 0, "$": 0, "046$": 0, "46,$": 0, "64$": 0, "": 0}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("hole", [False, True])
def test_arithmetic_wants_exactly_the_answer_and_an_end(jit, hole):
    verify = jax.jit(verifiers.arithmetic_verifier) if jit else verifiers.arithmetic_verifier
    found = verify(rows_of(CASES, hole=hole), with_answer(len(CASES), "46"))
    assert dict(zip(CASES, found.tolist())) == CASES


def test_any_eos_ends_an_answer():
    rollout = rows_of(["46$"])
    other_eos = rollout.replace(tokens=np.where(rollout.tokens == EOS, 99, rollout.tokens))
    assert verifiers.arithmetic_verifier(other_eos, with_answer(1, "46")).tolist() == [1.0]


def test_a_final_answer_stands_behind_the_last_separator():
    cases = {"46$": 1, "1,46$": 1, "9,8,46$": 1, "146$": 0, "1,46,$": 0, "46,1$": 0, "1,46": 0, "1,4$": 0, ",$": 0,
             "$": 0, "": 0, "1+46$": 0}  # fmt: skip
    found = verifiers.final_answer_verifier(rows_of(cases), with_answer(len(cases), "46", VOCABULARY.encode(",")[0]))
    assert dict(zip(cases, found.tolist())) == cases


def test_without_a_separator_all_must_be_the_answer():
    cases = {"46$": 1, "1,46$": 0}
    assert verifiers.final_answer_verifier(rows_of(cases), with_answer(2, "46")).tolist() == [1, 0]


@pytest.mark.parametrize("jit", [False, True])
def test_countdown_takes_any_expression_that_reaches_the_target(jit):
    verify = jax.jit(verifiers.countdown_verifier) if jit else verifiers.countdown_verifier
    cases = {
        "3*5+7$": 1, "7+5*3$": 1, "5*3+7$": 1, "3*5+7": 0,  # products first; no end, no reward
        "3*5$": 0, "3*5+7+0$": 0, "3*7+5$": 0, "5+5*3+7$": 0, "22$": 0,  # unused, used twice, wrong, not given
        "+3*5+7$": 0, "3*5+7+$": 0, "3**5+7$": 0, "3*5+07$": 0, "(3*5)+7$": 0, "3*5=7$": 0, "$": 0, "": 0,
    }  # fmt: skip
    found = verify(rows_of(cases), puzzle(len(cases), [3, 5, 7], 22))
    assert dict(zip(cases, found.tolist())) == cases


def test_countdown_with_numbers_left_over_or_twice_or_of_two_digits():
    cases = {"3*5$": 1, "5*3$": 1, "15$": 0, "3*5*1$": 0}
    some = puzzle(4, [3, 5, 7], 15, use_all=False)
    assert verifiers.countdown_verifier(rows_of(cases), some).tolist() == [1, 1, 0, 0]
    cases = {"4+4-12$": 1, "4-12+4$": 1, "4-12$": 0, "4*1-8$": 0}
    assert verifiers.countdown_verifier(rows_of(cases), puzzle(4, [4, 12, 4], -4)).tolist() == [1, 1, 0, 0]


def test_countdown_padding_is_no_number_and_a_forbidden_operation_no_operation():
    cases = {"3+5$": 1, "3+5+0$": 0, "3+5-0$": 0}
    assert verifiers.countdown_verifier(rows_of(cases), puzzle(3, [3, 5, 0], 8)).tolist() == [1, 0, 0]
    allowed = puzzle(2, [2, 2], 4, allowed="0123456789+")
    assert verifiers.countdown_verifier(rows_of(["2+2$", "2*2$"]), allowed).tolist() == [1, 0]


def test_a_very_long_number_does_not_wrap_around():
    text = "42949672999$"
    assert verifiers.countdown_verifier(rows_of([text]), puzzle(1, [3], 3)).tolist() == [0]
