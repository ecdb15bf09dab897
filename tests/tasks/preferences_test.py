"""Stored preferences: the three formats by hand, real data sets, and rows that are malformed."""

import gzip
import json
import pathlib

import numpy as np
import pytest

from mlrl import vocabularies
from mlrl.tasks import mixtures, preferences, tables
from mlrl.types import Refused, no_candidates

BYTES = vocabularies.byte_level()
DATA = pathlib.Path(__file__).resolve().parents[2].parent / "shared" / "data"
PAIR = {"prompt": "2+2=", "chosen": "4", "rejected": "22"}
RATING = {"prompt": "2+2=", "completion": "5", "label": False}
STEPS = {"prompt": "1+2+3=", "completions": ["3", "7"], "labels": [True, False]}


def written(folder, *rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def candidates(task):
    index = np.arange(task.sizes[0])
    return task.candidates(np.zeros_like(index), index)


def texts(found):
    return [[BYTES.decode(t[v]) for t, v in zip(*row)] for row in zip(found.tokens, found.valid)]


def test_pairs(tmp_path):
    task = preferences.read(written(tmp_path, PAIR, PAIR | {"chosen": "four"}), BYTES)
    found = candidates(task)
    assert texts(found) == [["4", "22"], ["four", "22"]] and found.outcome.tolist() == [[1, 0], [1, 0]]
    assert (found.tokens[found.valid.cumsum(-1) == found.valid.sum(-1, keepdims=True)] != BYTES.pad_id).any()
    assert all(row[v][-1] == BYTES.eos_ids[0] for row, v in zip(found.tokens[1], found.valid[1]))
    assert np.isnan(found.labels).all() and found.labels.shape == (2, 2, 5)
    target, valid = task.targets(np.zeros(1, int), np.zeros(1, int))
    assert BYTES.decode(target[0][valid[0]]) == "4" and not task.in_graph and task.name == "rows"
    assert task.example(0, 1)["answer"] == "four" and task.example(0, 1)["row"]["rejected"] == "22"


def test_ratings(tmp_path):
    rows = [RATING, RATING | {"completion": "4", "label": True}]
    task = preferences.read(written(tmp_path, *rows), BYTES, row_fn=preferences.ratings)
    found = candidates(task)
    assert texts(found) == [["5"], ["4"]] and found.outcome.tolist() == [[0.0], [1.0]]
    _, valid = task.targets(np.zeros(2, int), np.arange(2))
    assert valid.any(axis=1).tolist() == [False, True]  # an undesirable completion is no demonstration


def test_step_labels_sit_behind_their_steps(tmp_path):
    found = candidates(preferences.read(written(tmp_path, STEPS), BYTES, row_fn=preferences.steps, separator=", "))
    assert texts(found) == [["3, 7"]] and np.isnan(found.outcome).all()
    np.testing.assert_array_equal(found.labels[0, 0], [np.nan, 1.0, np.nan, np.nan, 0.0])  # "3" "," " " "7" EOS


def test_rows_with_fewer_completions_are_padded_with_empty_ones(tmp_path):
    def first_or_both(row, where):
        pair = preferences.pairs(row, where)
        return pair if len(row["chosen"]) > 1 else preferences.Example(pair.prompt, pair.completions[:1], [1.0], [[]])

    path = written(tmp_path, PAIR, PAIR | {"chosen": "four"})
    found = candidates(preferences.read(path, BYTES, row_fn=first_or_both))
    assert texts(found) == [["4", ""], ["four", "22"]] and np.isnan(found.outcome[0, 1])
    assert not found.valid[0, 1].any()


@pytest.mark.parametrize(
    "row_fn, row, words",
    [
        (preferences.pairs, {"prompt": "a", "chosen": "b"}, "row 3 lacks the key 'rejected'"),
        (preferences.pairs, PAIR | {"chosen": [{"role": "user"}]}, "row 3: 'chosen' must be a text"),
        (preferences.pairs, PAIR | {"prompt": ""}, "row 3: the prompt is empty"),
        (preferences.ratings, RATING | {"label": 1}, "row 3: 'label' must be true or false, got 1"),
        (preferences.steps, STEPS | {"labels": [True]}, "row 3: 'labels' must be a list of 2"),
        (preferences.steps, STEPS | {"completions": []}, "row 3: 'completions' must be a list of texts"),
        (preferences.hh_rlhf, {"chosen": "a", "rejected": "b"}, "row 3: 'chosen' and 'rejected' share no beginning"),
        (preferences.llmbar, {"label": 3}, "row 3: 'label' must be 1 or 2"),
        (preferences.bigbench_mistake, {"steps": ["a"], "mistake_index": 1}, "row 3: 'mistake_index' must be null"),
    ],
)
def test_a_malformed_row_is_named(row_fn, row, words, tmp_path):
    good = {preferences.pairs: PAIR, preferences.ratings: RATING, preferences.steps: STEPS}.get(row_fn)
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt") as lines:  # the first line is empty: rows are numbered as lines
        lines.write("\n" + (json.dumps(good) if good else "") + "\n" + json.dumps(row))
    with pytest.raises(Refused, match=words):
        preferences.read(path, BYTES, row_fn=row_fn)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(Refused, match="there is no file"):
        preferences.read(tmp_path / "none.json", BYTES)
    (tmp_path / "one.json").write_text('{"prompt": "a"}')
    with pytest.raises(Refused, match="must hold a list of JSON objects"):
        preferences.read(tmp_path / "one.json", BYTES)
    (tmp_path / "bad.json").write_text("[1,")
    with pytest.raises(Refused, match="cannot be read"):
        preferences.read(tmp_path / "bad.json", BYTES)


def test_limits(tmp_path):
    path = written(tmp_path, PAIR, PAIR | {"rejected": "twenty-two"})
    with pytest.raises(Refused, match="row 2: a completion has 11 tokens, more than the limit of 4"):
        preferences.read(path, BYTES, max_target_tokens=4)
    assert preferences.read(path, BYTES, max_target_tokens=4, on_long_target=tables.drop_long).sizes == (1,)
    cut = candidates(preferences.read(path, BYTES, max_target_tokens=4, on_long_target=tables.truncate_right))
    assert texts(cut)[1] == ["4", "twen"]
    with pytest.raises(Refused, match="row 1: the prompt has 4 tokens"):
        preferences.read(path, BYTES, max_prompt_tokens=3)


def test_mixtures_pass_candidates_on(tmp_path):
    two = preferences.read(written(tmp_path, PAIR), BYTES, name="two")
    one = preferences.read(written(tmp_path, RATING, name="b.jsonl"), BYTES, row_fn=preferences.ratings, name="one")
    mixed = mixtures.mixture([two, one])
    found = mixed.candidates(np.asarray([1, 0]), np.asarray([0, 0]))
    assert texts(found) == [["5", ""], ["4", "22"]]
    np.testing.assert_array_equal(found.outcome, [[0.0, np.nan], [1.0, 0.0]])
    plain = tables.table([{"prompt": "a", "answer": "b"}], BYTES, name="plain")
    with pytest.raises(Refused, match="plain has no stored completions"):
        mixtures.mixture([two, plain]).candidates(np.zeros(1, int), np.zeros(1, int))
    assert mixtures.mixture([plain, tables.table([{"prompt": "a", "answer": "b"}], BYTES, name="other")]
                            ).candidates is no_candidates  # fmt: skip
    with pytest.raises(Refused, match="no stored completions"):
        plain.candidates(np.zeros(1, int), np.zeros(1, int))


def real(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"there is no {path}")
    return path


def test_hh_rlhf():
    path = real("hh_rlhf/harmless_base_test.jsonl.gz")
    task = preferences.read(path, BYTES, row_fn=preferences.hh_rlhf)
    assert task.sizes == (2312,)
    raw = tables.read_jsonl(path)
    for index in (0, 7, 2311):
        prompt = task.example(0, index)["prompt"]
        found = task.candidates(np.zeros(1, int), np.full(1, index))
        assert prompt.endswith("\n\nAssistant:")
        assert [prompt + text for text in texts(found)[0]] == [raw[index]["chosen"], raw[index]["rejected"]]


@pytest.mark.parametrize("name, rows", [("natural.json", 100), ("adversarial_gptinst.json.gz", 92)])
def test_llmbar(name, rows):
    task = preferences.read(real(f"llmbar/{name}"), BYTES, row_fn=preferences.llmbar)
    found, row = candidates(task), task.example(0, 1)["row"]
    assert task.sizes == (rows,) and (found.outcome.sum(axis=1) == 1).all()
    assert texts(found)[1] == [row["output_1"], row["output_2"]]
    assert found.outcome[1].argmax() == int(row["label"]) - 1


def test_bigbench_mistake():
    path = real("bigbench_mistake/multistep_arithmetic.jsonl")
    task = preferences.read(path, BYTES, row_fn=preferences.bigbench_mistake)
    found = candidates(task)
    for index, row in enumerate(tables.read_jsonl(path)[:20]):
        labels = found.labels[index, 0]
        mistake = row["mistake_index"]
        wanted = [float(mistake is None or i < mistake) for i in range(len(row["steps"]))]
        assert labels[~np.isnan(labels)].tolist() == wanted
        said = BYTES.decode(found.tokens[index, 0][found.valid[index, 0]])
        assert said == "\n".join(row["steps"])
        assert found.outcome[index, 0] == float(row["answer"] == row["target"])
