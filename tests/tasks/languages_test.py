"""Two artificial languages: their grammar, spoiled translations, and how close these are."""

import jax.numpy as jnp
import numpy as np
import pytest

from mlrl.tasks import chrf, languages
from mlrl.tasks.verifiers import ngram_f
from mlrl.types import Refused

DECODE = languages.VOCABULARY.decode


def translated(sentence):
    """A translation by hand: the object first, adjectives that agree, endings."""
    position = sentence.index(next(c for c in sentence if c in "opqrst"))
    phrases = []
    for phrase in (sentence[:position], sentence[position + 1 :]):
        noun = next(c for c in phrase if c in "abcdefgh")
        adjective = next((c for c in phrase if c in "ijklmn"), "")
        forms = "IJKLMN" if noun in "aceg" else "OPQRST"
        inflected = forms["ijklmn".index(adjective)] if adjective else ""
        phrases.append((noun.upper(), inflected, "+" if "u" in phrase else ""))
    subject, other = phrases
    verb = "UVWXYZ"["opqrst".index(sentence[position])] + ("-" if subject[2] else "")
    return other[0] + "*" + other[1] + other[2] + verb + "".join(subject)


def rows(tokens, valid):
    return [DECODE(t[v]) for t, v in zip(np.asarray(tokens), np.asarray(valid))]


def test_translations_are_those_of_the_grammar():
    task = languages.languages()
    index = jnp.arange(64)
    prompts = task.at(index * 0, index).check()
    sentences = [text.removesuffix("=") for text in rows(prompts.tokens, prompts.valid)]
    wanted = [translated(sentence) for sentence in sentences]
    assert rows(prompts.example["answer_tokens"], prompts.example["answer_valid"]) == wanted
    assert rows(*task.targets(index * 0, index)) == wanted and task.example(0, 5)["answer"] == wanted[5]
    assert len(set(sentences)) == 64 and max(map(len, wanted)) > min(map(len, wanted))


def test_held_out_sentences_are_not_trained_on():
    whole = [languages.languages(split=split) for split in ("train", "test")]
    assert sum(task.sizes[0] for task in whole) == languages.PROBLEMS
    index = jnp.arange(2000)
    seen = [set(rows(*(lambda p: (p.tokens, p.valid))(task.at(index * 0, index)))) for task in whole]
    assert not seen[0] & seen[1]


def test_completions_are_rated_by_how_close_they_are():
    task, index = languages.languages(), jnp.arange(40)
    found, right = task.candidates(index * 0, index), task.at(index * 0, index).example
    answers = rows(right["answer_tokens"], right["answer_valid"])
    for row, answer in enumerate(answers):
        for said, outcome in zip(rows(found.tokens[row], found.valid[row]), np.asarray(found.outcome[row])):
            assert outcome == pytest.approx(chrf.chrf(said, {"answer": answer}, max_order=2, beta=1.0), abs=1e-5)
    right_share = float(np.mean(np.asarray(found.outcome) > 0.999))
    assert 0.15 < right_share < 0.5 and float(found.outcome.min()) < 0.4
    ends = np.take_along_axis(np.asarray(found.tokens), np.asarray(found.valid).sum(axis=2, keepdims=True) - 1, axis=2)
    assert (ends == 2).all()


def test_as_many_demonstrations_are_spoiled_as_are_asked_for():
    index = jnp.arange(400)
    right = rows(*languages.languages().targets(index * 0, index))
    noisy = rows(*languages.languages(noise=0.8).targets(index * 0, index))
    differs = np.mean([a != b for a, b in zip(right, noisy)])
    assert 0.45 < differs < 0.7  # a quarter of the spoiled ones is right after all
    with pytest.raises(Refused, match="noise must lie in"):
        languages.languages(noise=1.5)


@pytest.mark.parametrize("order, beta", [(1, 1.0), (2, 1.0), (6, 2.0)])
def test_the_overlap_of_tokens_is_chrf_of_their_letters(order, beta):
    said = ["AB", "ABAB", "", "AAAA", "ABCDEFGH", "B"]
    wanted = ["AB", "ABA", "AB", "A", "ABXDEFGHC", "C"]
    pack = lambda texts: (  # noqa: E731
        jnp.asarray([languages.VOCABULARY.encode(t) + [0] * (9 - len(t)) for t in texts]),
        jnp.arange(9)[None] < jnp.asarray([len(t) for t in texts])[:, None],
    )
    found = ngram_f(*pack(said), *pack(wanted), max_order=order, beta=beta)
    by_hand = [chrf.chrf(a, {"answer": b}, max_order=order, beta=beta) for a, b in zip(said, wanted)]
    np.testing.assert_allclose(found, by_hand, atol=1e-6)
    assert by_hand[0] == 1.0 and by_hand[2] == by_hand[5] == 0.0


def test_chrf_by_hand():
    assert chrf.chrf("a b", {"answer": "ab"}) == 1.0  # white space does not count
    precision, recall = (2 / 3 + 1 / 2) / 2, (2 / 2 + 1 / 1) / 2  # abc of ab, orders 1 and 2
    assert chrf.chrf("abc", {"answer": "ab"}, max_order=2) == pytest.approx(
        5 * precision * recall / (4 * precision + recall))  # fmt: skip
