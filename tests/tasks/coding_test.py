"""MBPP and CRUXEval: what is read, how it is asked, and what is refused."""

import gzip
import json

import pytest

from mlrl.tasks import coding
from mlrl.types import Refused
from mlrl.vocabularies import characters

VOCABULARY = characters("".join(map(chr, range(32, 127))) + "\n\t")
MBPP = {"text": "Add one.", "code": "def f(x):\r\n  return x + 1", "test_setup_code": "",
        "test_list": ["assert f(1) == 2"]}  # fmt: skip
CRUX = {"code": "def f(x):\n    return x + 1", "input": "1", "output": "2"}


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl.gz"
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return str(path)

    return write


def test_mbpp_is_divided_by_number(write):
    path = write(*({**MBPP, "task_id": number} for number in (1, 10, 11, 510, 511, 600, 601, 974)))
    sizes = {split: coding.mbpp(path, VOCABULARY, split=split).sizes for split in ("train", "validation", "test")}
    assert sizes == {"train": (2,), "validation": (2,), "test": (2,)}
    task = coding.mbpp(path, VOCABULARY, split="test")
    example = task.example(0, 0)
    assert task.name == "mbpp_test" and example["tests"] == ("assert f(1) == 2",) and example["setup"] == ""
    assert example["prompt"] == '"""\nAdd one.\nassert f(1) == 2\n"""\n'
    assert example["answer"] == "def f(x):\n  return x + 1"


def test_cruxeval_asks_for_the_output_or_the_input(write):
    path = write(CRUX)
    forward, backward = (coding.cruxeval(path, VOCABULARY, ask_for=what) for what in ("output", "input"))
    assert forward.example(0, 0)["prompt"] == CRUX["code"] + "\nassert f(1) =="
    assert (forward.name, forward.example(0, 0)["target"]) == ("cruxeval_output", " 2")
    assert backward.example(0, 0)["prompt"] == CRUX["code"] + "\n# f(input) == 2\ninput ="
    assert (backward.name, backward.example(0, 0)["answer"]) == ("cruxeval_input", "1")


def test_mistakes_are_refused(write):
    with pytest.raises(Refused, match="split must be one of"):
        coding.mbpp("", VOCABULARY, split="dev")
    with pytest.raises(Refused, match="row 1: needs a number 'task_id'"):
        coding.mbpp(write({**MBPP, "task_id": "1"}), VOCABULARY)
    with pytest.raises(Refused, match="ask_for must be 'output' or 'input'"):
        coding.cruxeval("", VOCABULARY, ask_for="code")
    with pytest.raises(Refused, match="lacks the key 'output'"):
        coding.cruxeval(write({"code": "", "input": ""}), VOCABULARY)
