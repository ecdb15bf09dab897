"""Judging as tokens: what a judge is asked, which answers are grades, and demonstrations of grading."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mlrl import vocabularies
from mlrl.tasks import judgements, languages
from mlrl.tasks.judgements import Form
from mlrl.types import Refused

VOCABULARY = vocabularies.characters("abcdef0123456789=?>.")


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A vocabulary with tokens of several digits, as large ones have."""

    size: int = 5
    pad_id: int = 0
    eos_ids: tuple = (1,)

    def decode(self, ids):
        return "".join(("", "", "8", "85", "x")[i] for i in ids)


def packed(texts, width=6, left=False, vocabulary=VOCABULARY):
    rows = [vocabulary.encode(text) for text in texts]
    tokens, valid = np.full((len(rows), width), 9, np.int32), np.zeros((len(rows), width), bool)
    for row, ids in enumerate(rows):
        columns = slice(width - len(ids), width) if left else slice(0, len(ids))
        tokens[row, columns], valid[row, columns] = ids, True
    return jnp.asarray(tokens), jnp.asarray(valid)


def graded(text, form, ended=True):
    tokens, valid = packed([text])
    return float(judgements.read(form, VOCABULARY, tokens, valid, jnp.asarray([ended]))[0])


@pytest.mark.parametrize("text, top, share", [("0", 9, 0.0), ("9", 9, 1.0), ("7", 9, 7 / 9), ("100", 100, 1.0),
                                              ("7", 100, 0.07), ("42", 100, 0.42)])  # fmt: skip
def test_a_grade_is_a_share_of_the_top_one(text, top, share):
    assert graded(text, Form(top=top)) == pytest.approx(share)


@pytest.mark.parametrize("text, top", [("12", 9), ("9.", 9), ("a9", 9), ("", 9), ("8?9", 9), ("101", 100),
                                       ("0042", 100), ("99999", 9)])  # fmt: skip
def test_what_is_no_grade_is_not_guessed(text, top):
    assert np.isnan(graded(text, Form(top=top)))


def test_an_answer_that_was_cut_off_is_no_grade():
    assert np.isnan(graded("1", Form(top=100), ended=False)) and graded("1", Form(top=100)) == pytest.approx(0.01)


@pytest.mark.parametrize("text, share", [("ab>4", 4 / 9), ("3>5", 5 / 9), (">1>2", 2 / 9), ("45", None), ("4>", None),
                                         (">4a", None)])  # fmt: skip
def test_a_judge_may_think_before_the_separator(text, share):
    found = graded(text, Form(separator=">"))
    assert np.isnan(found) if share is None else found == pytest.approx(share)


def test_tokens_of_several_digits_are_read():
    tokens = jnp.asarray([[3, 0], [2, 3], [2, 2], [3, 4]])
    written = jnp.asarray([[True, False], [True, True], [True, True], [True, True]])
    found = judgements.read(Form(top=100), Pieces(), tokens, written, jnp.ones(4, bool))
    np.testing.assert_allclose(found, [0.85, np.nan, 0.88, np.nan])  # 885 is above the top


def test_a_separator_is_one_token():
    with pytest.raises(Refused, match="Form.separator must be one token"):
        graded("9", Form(separator=">>"))


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("width", [4, 9])
def test_a_judge_is_asked_the_same_whatever_the_padding(left, width):
    form = Form(before="c", between=">", after="=?")
    tokens, valid = judgements.ask(form, VOCABULARY, packed(["ab", "d"], width, left), packed(["e1", ""], width, left))
    assert valid.shape[1] == 2 * width + 4 and bool(jnp.all(valid[:, 1:] >= valid[:, :-1]))
    assert [VOCABULARY.decode(t[v]) for t, v in zip(tokens, valid)] == ["cab>e1=?", "cd>=?"]
    assert bool(jnp.all(tokens[~valid] == VOCABULARY.pad_id))


def test_rated_completions_are_demonstrations_of_grading():
    rated = languages.languages(candidates=3)
    task = judgements.judgements(rated, form=Form(after="?"))
    index = jnp.asarray([0, 1, 2, 7])
    prompts, (tokens, valid) = task.at(index * 0, index).check(), task.targets(index * 0, index)
    found, sources = rated.candidates(index * 0, index // 3), rated.at(index * 0, index // 3)
    decode = task.vocabulary.decode
    for row, i in enumerate(index.tolist()):
        said = decode(found.tokens[row, i % 3][found.valid[row, i % 3]])
        source = decode(sources.tokens[row][sources.valid[row]])
        grade = str(round(9 * float(found.outcome[row, i % 3])))
        assert decode(prompts.tokens[row][prompts.valid[row]]) == f"{source}{said}?"
        assert decode(tokens[row][valid[row]]) == grade and int(tokens[row][valid[row]][-1]) == 2
        assert task.example(0, i)["answer"] == grade
    assert task.sizes[0] == 3 * rated.sizes[0]
