"""Parallel text: lines of two files as a task, and what is refused."""

import gzip
import pathlib

import numpy as np
import pytest

from mlrl import vocabularies
from mlrl.tasks import parallel, prompt_templates
from mlrl.types import Refused

NTREX = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data" / "ntrex"
BYTES = vocabularies.byte_level()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "en.txt").write_text("".join(f"line {i}\n" for i in range(10)))
    with gzip.open(tmp_path / "de.txt.gz", "wt") as file:
        file.write("".join(f"Zeile {i}\n" for i in range(10)))
    return tmp_path


def read(folder, **settings):
    return parallel.parallel("en.txt", "de.txt.gz", BYTES, folder=str(folder), **settings)


def test_lines_are_prompts_and_answers_and_the_last_are_held_out(folder):
    template = prompt_templates.translation()
    train, test = read(folder, test_share=0.2, template=template), read(folder, split="test", test_share=0.2)
    assert train.sizes == (8,) and test.sizes == (2,) and test.name == "parallel_test"
    assert train.example(0, 3)["prompt"] == "English: line 3\nGerman:" and train.example(0, 3)["answer"] == "Zeile 3"
    assert test.example(0, 0) == {"prompt": "line 8", "answer": "Zeile 8", "task": "parallel_test"}
    tokens, valid = train.targets(np.zeros(1, int), np.zeros(1, int))
    assert BYTES.decode(tokens[0][valid[0]]) == "Zeile 0"


def test_files_that_are_no_translations_are_refused(folder):
    with pytest.raises(Refused, match="there is no file"):
        parallel.parallel("fr.txt", "de.txt.gz", BYTES, folder=str(folder))
    (folder / "en.txt").write_text("one\ntwo\n")
    with pytest.raises(Refused, match="2 lines and de.txt.gz has 10"):
        read(folder)
    (folder / "en.txt").write_text("one\n\nthree\n")
    with pytest.raises(Refused, match="line 2 is empty"):
        read(folder)
    (folder / "en.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(Refused, match="cannot be read"):
        read(folder)


def test_ntrex_is_read_where_it_is():
    if not NTREX.is_dir():
        pytest.skip(f"there is no folder {NTREX}")
    task = parallel.parallel("newstest2019-src.eng.txt.gz", "newstest2019-ref.deu.txt.gz", BYTES, folder=str(NTREX))
    assert task.sizes == (1797,) and task.example(0, 0)["prompt"].startswith("Welsh AMs")
