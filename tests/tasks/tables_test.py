"""Tables: what is encoded, what is too long, and rows of files that are malformed."""

import gzip
import json
import logging
import pickle

import numpy as np
import pytest

from mlrl import vocabularies
from mlrl.tasks import tables
from mlrl.tasks.tables import read_jsonl, table
from mlrl.types import Refused

VOCABULARY = vocabularies.characters("abcdef ")
EXAMPLES = [
    {"prompt": "abc", "answer": "f", "target": "a f", "level": 3},
    {"prompt": "a", "answer": "e"},
    {"prompt": "abcdef", "answer": "d"},
]


def decoded(tokens, valid):
    return [VOCABULARY.decode(t[v]) for t, v in zip(tokens, valid)]


def all_rows(task):
    rows = np.arange(task.sizes[0])
    return task.at(np.zeros_like(rows), rows).check(), task.targets(np.zeros_like(rows), rows)


def test_prompts_targets_and_examples():
    task = table(EXAMPLES, VOCABULARY, name="three")
    batch, (tokens, valid) = all_rows(task)
    assert decoded(batch.tokens, batch.valid) == ["abc", "a", "abcdef"] and batch.tokens.shape == (3, 6)
    assert batch.valid[:, -1].all() and batch.valid.sum(axis=1).tolist() == [3, 1, 6]  # padded on the left
    assert decoded(tokens, valid) == ["a f", "e", "d"]
    assert [row[v][-1] for row, v in zip(tokens, valid)] == [VOCABULARY.eos_ids[0]] * 3
    assert task.example(0, 0) == EXAMPLES[0] | {"task": "three"} and not task.in_graph
    assert pickle.loads(pickle.dumps(task.example(0, 0)))["level"] == 3


def test_padding_may_equal_the_eos():
    vocabulary = vocabularies.Characters("abcdef ", pad_id=2)
    _, (tokens, valid) = all_rows(table(EXAMPLES, vocabulary, name="three"))
    assert valid.sum(axis=1).tolist() == [4, 2, 2] and (tokens[~valid] == 2).all()


def test_long_prompts_are_refused_by_default():
    with pytest.raises(Refused, match="three, example 2: the prompt has 6 tokens, more than the limit of 5"):
        table(EXAMPLES, VOCABULARY, name="three", max_prompt_tokens=5)
    with pytest.raises(Refused, match="three, example 0: the target has 4 tokens, more than the limit of 2"):
        table(EXAMPLES, VOCABULARY, name="three", max_target_tokens=2)


def test_long_ones_are_dropped_with_a_count(caplog):
    with caplog.at_level(logging.WARNING, "mlrl"):
        task = table(EXAMPLES, VOCABULARY, name="three", max_prompt_tokens=5, on_long_prompt=tables.drop_long)
    assert task.sizes == (2,) and task.example(0, 1)["prompt"] == "a"
    assert "three: dropped, 1 of 3 examples are longer than the limits (max_prompt_tokens=5" in caplog.text
    with pytest.raises(Refused, match="three has no examples: 3 of 3 examples are longer"):
        table(EXAMPLES, VOCABULARY, name="three", max_target_tokens=1, on_long_target=tables.drop_long)


def test_long_ones_are_cut():
    task = table(EXAMPLES, VOCABULARY, name="three", max_prompt_tokens=2, on_long_prompt=tables.truncate_left,
                 max_target_tokens=2, on_long_target=tables.truncate_right)  # fmt: skip
    batch, (tokens, valid) = all_rows(task)
    assert decoded(batch.tokens, batch.valid) == ["bc", "a", "ef"]
    assert decoded(tokens, valid) == ["a ", "e", "d"]
    assert [VOCABULARY.eos_ids[0] in row[v] for row, v in zip(tokens, valid)] == [False, True, True]


@pytest.mark.parametrize(
    "example, words",
    [
        ({"answer": "a"}, "example 0: 'prompt' must be a text, got None"),
        ({"prompt": "a"}, "example 0: 'answer' must be a text, got None"),
        ({"prompt": "a", "answer": 3}, "'answer' must be a text, got 3"),
        ({"prompt": "a", "answer": "b", "target": 3}, "'target' must be a text or None, got 3"),
        ({"prompt": "", "answer": "b"}, "the prompt is empty"),
        ({"prompt": "axe", "answer": "b"}, "example 0: the alphabet 'abcdef ' lacks 'x'"),
    ],
)
def test_bad_examples_are_named(example, words):
    with pytest.raises(Refused, match=words):
        table([example], VOCABULARY, name="bad")


def test_no_examples_are_refused():
    with pytest.raises(Refused, match="nothing has no examples$"):
        table([], VOCABULARY, name="nothing")
    with pytest.raises(Refused, match="three has the examples 0 to 2 of source 0, asked for 3 of 0"):
        table(EXAMPLES, VOCABULARY, name="three").example(0, 3)


def test_json_lines_are_read_gzipped_or_not(tmp_path):
    text = '{"a": 1}\n\n{"a": 2}\n'
    (tmp_path / "x.jsonl").write_text(text)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("x.jsonl", "x.jsonl.gz"):
        assert read_jsonl(tmp_path / name, ["a"]) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    "content, words",
    [
        (b'{"a": 1}\n{"a": \n', r"x.jsonl, row 2 is not JSON"),
        (b'{"a": 1}\n\n[1]\n', r"x.jsonl, row 3 must be a JSON object, got list"),
        (b'{"a": 1}\n{"b": 1}\n', r"x.jsonl, row 2 lacks the key 'a'; it has \['b'\]"),
        (b"\n\n", "x.jsonl has no rows"),
        (b"\xff\xfe", "x.jsonl cannot be read"),
    ],
)
def test_malformed_rows_are_named(tmp_path, content, words):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(Refused, match=words) as refusal:
        read_jsonl(tmp_path / "x.jsonl", ["a"])
    assert "\n" not in str(refusal.value)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(Refused, match="there is no file .*nowhere.jsonl"):
        read_jsonl(tmp_path / "nowhere.jsonl")
    (tmp_path / "x.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(Refused, match="x.jsonl.gz cannot be read"):
        read_jsonl(tmp_path / "x.jsonl.gz")
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-20])
    with pytest.raises(Refused, match="y.jsonl.gz cannot be read"):
        read_jsonl(tmp_path / "y.jsonl.gz")


class Chatty:
    """A vocabulary with a chat template."""

    chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"

    def __getattr__(self, name):
        return getattr(VOCABULARY, name)


def written(folder, rows):
    path = folder / "sums.v1.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_file_of_prompts_and_answers_is_a_task(tmp_path):
    path = written(tmp_path, [{"question": "ab", "right": "c", "level": 1}, {"question": "ba", "right": "d"}])
    task = tables.jsonl(path, VOCABULARY, prompt="question", answer="right", template="e {}".format)
    prompts, _ = all_rows(task)
    assert decoded(prompts.tokens, prompts.valid) == ["e ab", "e ba"]
    assert task.name == "sums" and task.example(0, 0)["answer"] == "c" and task.example(0, 0)["level"] == 1
    numbers = tables.jsonl(written(tmp_path, [{"prompt": "a", "answer": 7}]), vocabularies.byte_level())
    assert numbers.example(0, 0)["answer"] == "7"


def test_chat_messages_are_rendered_by_the_vocabulary_s_own_template(tmp_path):
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "bc"}]
    path = written(tmp_path, [{"prompt": messages, "answer": "d"}])
    prompts, _ = all_rows(tables.jsonl(path, Chatty()))
    assert decoded(prompts.tokens, prompts.valid) == ["a bc "]
    with pytest.raises(Refused, match="came without a chat template"):
        tables.jsonl(path, VOCABULARY)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"question": "a"}, "row 1: 'prompt' must be a text or .* got None; the row has question: .*jsonl.prompt"),
        ({"prompt": "a", "answer": ["b"]}, r"row 1: 'answer' must be .* got \['b'\]; the row has prompt, answer: "),
    ],
)
def test_a_key_that_is_not_there_is_named_beside_those_that_are(tmp_path, row, words):
    with pytest.raises(Refused, match=words):
        tables.jsonl(written(tmp_path, [row]), VOCABULARY)
