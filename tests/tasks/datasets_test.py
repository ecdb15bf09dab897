"""Tasks read through seqio: GSM8K, knights and knaves, reasoning-gym, registered tasks, and bad files."""

import gzip
import json
import pathlib

import numpy as np
import pytest

from mlrl import vocabularies
from mlrl.prompts import demonstrations, first
from mlrl.tasks import answers, datasets, seqio_tasks, tables
from mlrl.tasks.puzzles import arithmetic
from mlrl.types import Refused

import jax  # isort: skip

seqio = pytest.importorskip("seqio")
DATA = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data"
BYTES = vocabularies.byte_level()


def stored(name):
    if not (DATA / name).exists():
        pytest.skip(f"the data {name} does not lie beside the checkout")
    return str(DATA / name)


def written(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


QUESTIONS = [
    {"question": "How many are 3 and 4?", "answer": "3+4 = <<3+4=7>>7\n#### 7"},
    {"question": "And a thousand?", "answer": "Plainly.\n#### 1,000"},
]
QUIZ = {
    "quiz": "Ann says: Bo lies.", "names": ["Ann", "Bo"], "solution": [True, False],
    "solution_text_format": "(1) Ann is a knight\n(2) Bo is a knave",
    "statements": "(('lying', 1), ('lying', 0))",
}  # fmt: skip


def test_gsm8k_rows_become_prompts_answers_and_demonstrations(tmp_path):
    path = written(tmp_path, "train.jsonl", QUESTIONS)
    task = datasets.gsm8k(path, BYTES, template=lambda question: f"Q: {question}")
    assert task.name == "gsm8k" and task.sizes == (2,)
    assert task.example(0, 0) == {"prompt": "Q: How many are 3 and 4?", "answer": "7", "target": "3+4 = 7\n#### 7",
                                  "task": "gsm8k"}  # fmt: skip
    assert [answers.gsm8k_score(task.example(0, i)["target"], task.example(0, i))["reward"] for i in (0, 1)] == [1, 1]
    rows = demonstrations(task, jax.random.key(0), 0, 2, np.ones(1)).check()
    said = {BYTES.decode(t[m]) for t, m in zip(rows.tokens, rows.action_mask)}
    assert said == {"3+4 = 7\n#### 7", "Plainly.\n#### 1,000"}
    noted = datasets.gsm8k(path + "/train.jsonl", BYTES, keep_annotations=True)
    assert "<<3+4=7>>" in noted.example(0, 0)["target"]


def test_all_of_gsm8k_test_answers_itself():
    task = datasets.gsm8k(stored("gsm8k"), BYTES, split="test", max_prompt_tokens=300, on_long_prompt=tables.drop_long)
    everything = datasets.gsm8k(stored("gsm8k"), BYTES, split="test")
    assert everything.sizes == (1319,) and 0 < task.sizes[0] < 1319
    scores = [answers.gsm8k_score(e["target"], e) for e in (everything.example(0, i) for i in range(1319))]
    assert all(score == {"reward": 1.0, "strict": 1.0, "lenient": 1.0} for score in scores)
    assert first(task, 4).check().tokens.shape[1] <= 300


@pytest.mark.parametrize(
    "rows, words",
    [
        ([QUESTIONS[0], {"question": "?"}], r"train.jsonl, row 2 lacks the key 'answer'"),
        ([QUESTIONS[0], {"question": "?", "answer": "no number"}], r"train.jsonl, row 2: .*ends in '#### '"),
        ([{"question": 3, "answer": "#### 1"}], r"train.jsonl, row 1: needs a text 'question'"),
        ([], r"train.jsonl has no rows"),
    ],
)
def test_malformed_gsm8k_rows_are_named(tmp_path, rows, words):
    with pytest.raises(Refused, match=words) as refusal:
        datasets.gsm8k(written(tmp_path, "train.jsonl", rows), BYTES)
    assert "\n" not in str(refusal.value)


def test_missing_files_and_splits_are_named(tmp_path):
    path = written(tmp_path, "train.jsonl", QUESTIONS)
    with pytest.raises(Refused, match="holds no test.jsonl or test.jsonl.gz"):
        datasets.gsm8k(path, BYTES, split="test")
    with pytest.raises(Refused, match="gsm8k has no split 'dev', only test, train"):
        datasets.gsm8k(path, BYTES, split="dev")
    with pytest.raises(Refused, match="there is no .*nowhere"):
        datasets.gsm8k(str(tmp_path / "nowhere"), BYTES)
    with pytest.raises(Refused, match="example 0: the prompt has .* more than the limit of 10"):
        datasets.gsm8k(path, BYTES, max_prompt_tokens=10)
    with pytest.raises(Refused, match="alphabet 'abc' lacks"):
        datasets.gsm8k(path, vocabularies.characters("abc"))


def test_knights_and_knaves_of_several_sizes():
    task = datasets.knights_and_knaves(stored("knights_knaves"), BYTES, people=(3, 4), rates=(1, 3), split="test")
    assert task.sources == ("knights_and_knaves_3_test", "knights_and_knaves_4_test") and task.rates == (0.25, 0.75)
    for source in (0, 1):
        example = task.example(source, 7)
        assert len(example["names"]) == 3 + source
        assert answers.knights_and_knaves_score(example["answer"], example) == 1.0
        swapped = example["answer"].replace("knave", "?").replace("knight", "knave").replace("?", "knight")
        assert answers.knights_and_knaves_score(swapped, example) == 0.0


@pytest.mark.parametrize(
    "spoiled, words",
    [
        ({"solution": [True, True]}, "row 2: 'solution' contradicts 'statements'"),
        ({"statements": "(('perhaps', 1), ('lying', 0))"}, "row 2: 'statements' cannot be read"),
        ({"statements": "import os"}, "row 2: 'statements' cannot be read"),
        ({"names": ["Ann"]}, "row 2: 'solution' contradicts"),
    ],
)
def test_a_puzzle_that_contradicts_itself_is_named(tmp_path, spoiled, words):
    path = written(tmp_path, "kk_2ppl_train.jsonl", [QUIZ, QUIZ | spoiled])
    with pytest.raises(Refused, match=words):
        datasets.knights_and_knaves(path, BYTES, people=(2,))


def test_reasoning_gym_generators_mix_and_judge():
    names = ["chain_sum", "gcd", "rubiks_cube", "basic_arithmetic"]
    settings = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
    make = lambda split: datasets.reasoning_gym(  # noqa: E731
        names, BYTES, size=60, test_size=20, config=settings, split=split, rates=(2, 1, 1, 1)
    )
    train, test = make("train"), make("test")
    assert train.sources == tuple(names) and train.rates == (0.4, 0.2, 0.2, 0.2) and test.sizes == (20,) * 4
    questions = lambda task, s: {task.example(s, i)["prompt"] for i in range(task.sizes[s])}  # noqa: E731
    assert all(not questions(train, s) & questions(test, s) for s in range(4))
    assert train.sizes[0] < 60 == train.sizes[3]  # sums of two digits repeat: those held out were left out
    for source in (0, 1, 3):
        example = train.example(source, 3)
        assert answers.reasoning_gym_score(example["answer"], example) == 1.0
    assert train.example(2, 0)["target"] is None  # this one only judges


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"generators": ["chain_sun"]}, "no generator 'chain_sun'; did you mean 'chain_sum'"),
        ({"generators": ["chain_sum"], "config": {"terms": 3}}, "chain_sum refuses config"),
        ({"generators": ["chain_sum"], "config": {"min_terms": -3}}, "chain_sum refuses config"),
        ({"generators": ["chain_sum", "gcd"], "config": {"lcm": {}}}, "config has settings for 'lcm'"),
        ({"generators": "chain_sum"}, "must be a list of names"),
        ({"generators": ["chain_sum"], "size": 0}, "size must be at least 1"),
        ({"generators": ["chain_sum"], "test_size": 0, "split": "test"}, "no examples in its split 'test'"),
    ],
)
def test_bad_generators_are_refused(arguments, words):
    with pytest.raises(Refused, match=words):
        datasets.reasoning_gym(vocabulary=BYTES, **arguments)


def test_puzzles_are_seqio_tasks_and_come_back():
    puzzle = arithmetic(digits=1, test_share=0.5)
    task = seqio_tasks.from_task(puzzle)
    rows = list(task.get_dataset(sequence_length=None, split="train", shuffle=False).as_numpy_iterator())
    assert rows[3]["targets"].tolist() == [*puzzle.vocabulary.encode(puzzle.example(0, 3)["answer"]), 2]
    back = seqio_tasks.read(task, "train", puzzle.vocabulary)
    assert [back.example(0, i)["prompt"] for i in range(50)] == [puzzle.example(0, i)["prompt"] for i in range(50)]
    np.testing.assert_array_equal(first(back, 50).tokens, first(puzzle, 50).tokens)


def test_registered_tasks_and_mixtures_are_read(tmp_path):
    path = written(tmp_path, "train.jsonl", QUESTIONS)
    for name in ("questions_a", "questions_b"):
        seqio_tasks.register(datasets.gsm8k_source(path, BYTES, name=name))
    seqio.MixtureRegistry.add("questions_mixed", [("questions_a", 1), ("questions_b", 3)])
    task = seqio_tasks.from_seqio("questions_mixed", "train", vocabularies.byte_level())
    assert dict(zip(task.sources, task.rates)) == {"questions_a": 0.25, "questions_b": 0.75}
    assert seqio_tasks.from_seqio("questions_a", "train", BYTES).example(0, 1)["answer"] == "1000"
    with pytest.raises(Refused, match="no task or mixture 'questions_mixes'; did you mean 'questions_mixed'"):
        seqio_tasks.from_seqio("questions_mixes", "train", BYTES)
    with pytest.raises(Refused, match="already has a task 'questions_a'"):
        seqio_tasks.register(datasets.gsm8k_source(path, BYTES, name="questions_a"))


def test_a_seqio_task_of_somebody_else_is_read():
    """Only inputs and targets, another vocabulary, no texts kept: the token ids are decoded."""
    import tensorflow as tf

    feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=False)
    task = seqio.Task(
        "foreign",
        seqio.FunctionDataSource(lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
            {"inputs": ["ab", "c"], "targets": ["x", "yz"], "level": [1, 2]}), splits=["train"]),
        {"inputs": feature, "targets": feature},
        preprocessors=[lambda ds, output_features: seqio.preprocessors.tokenize(ds, output_features,
                                                                                copy_pretokenized=False)],
    )  # fmt: skip
    read = seqio_tasks.read(task, "train", vocabularies.characters("abcxyz"))
    assert read.example(0, 1) == {"prompt": "c", "answer": "yz", "target": "yz", "level": 2, "task": "foreign"}


def test_gzipped_files_are_found(tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in QUESTIONS)
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert datasets.gsm8k(str(tmp_path), BYTES, split="test").name == "gsm8k_test"


def test_gsm8k_is_read_from_tensorflow_datasets(tmp_path):
    """A local builder of the same name and features stands in for the download."""
    from tiny_gsm8k import build

    build(tmp_path, QUESTIONS)
    task = datasets.gsm8k("tfds:tiny_gsm8k:1.0.0", BYTES, tfds_data_dir=str(tmp_path))
    found = sorted((task.example(0, i) for i in range(2)), key=lambda example: example["answer"])
    assert [example["answer"] for example in found] == ["1000", "7"]
    assert found[1]["target"] == "3+4 = 7\n#### 7"
    with pytest.raises(Refused, match="'tiny_gsm8k' needs its version, such as 'tiny_gsm8k:1.0.0'"):
        datasets.gsm8k("tfds:tiny_gsm8k", BYTES)
    build(tmp_path / "bad", [{"question": "?", "answer": "no number"}])
    with pytest.raises(Refused, match="reading train of gsm8k failed: tiny_gsm8k:1.0.0: needs a text 'question'"):
        datasets.gsm8k("tfds:tiny_gsm8k:1.0.0", BYTES, tfds_data_dir=str(tmp_path / "bad"))
