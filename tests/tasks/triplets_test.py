"""Triplets: their texts, random ones that are true, prompts that fit, and running them."""

import gzip
import json
import zlib

import numpy as np
import pytest

from mlrl.tasks import executed, triplets
from mlrl.tasks.triplets import ABDUCTION, DEDUCTION, INDUCTION, Triplet
from mlrl.types import Refused

PAIRS = Triplet(INDUCTION, "x=x+3", ("4", "0", "1", "9"), ("7", "3", "4", "12"))


@pytest.mark.parametrize("kind, text, found", [
    (DEDUCTION, "x=x+1#2", ("x=x+1", ("2",))),
    (ABDUCTION, "def f(a, b):\n    return a#1,'b'", ("def f(a, b):\n    return a", ("1,'b'",))),
    (INDUCTION, "x=x#1#2#3#[4]", ("x=x", ("1", "2", "3", "[4]"))),
    (INDUCTION, "x=x#1#2#3#3", None),
    (INDUCTION, "x=x#1#2", None),
    (DEDUCTION, "x=x+#2", None),
    (DEDUCTION, "x=x+1", None),
    (DEDUCTION, "#1", None),
    (DEDUCTION, "x=x#", None),
    (DEDUCTION, "x=x#x", None),
    (DEDUCTION, "x=x#f(1)", None),
    (DEDUCTION, "x=x#1#2", None),
    (DEDUCTION, "x=" + "(" * 300 + "#1", None),
])  # fmt: skip
def test_well_formed_texts_are_parsed(kind, text, found):
    assert triplets.parsed(kind, text) == found


def test_prompts_show_what_is_given():
    one = ("x=x+3", ("4",), ("7",))
    assert [triplets.solve_prompt(t) for t in (Triplet(DEDUCTION, *one), Triplet(ABDUCTION, *one), PAIRS)] == [
        "dx=x+3#4=", "ax=x+3#7=", "i4>7#0>3="]  # fmt: skip
    assert [triplets.solution(t) for t in (Triplet(DEDUCTION, *one), Triplet(ABDUCTION, *one), PAIRS)] == [
        "7", "4", "x=x+3"]  # fmt: skip
    assert [triplets.propose_prompt(kind, "x=x+3#4") for kind in range(3)] == ["Dx=x+3#4=", "Ax=x+3#4=", "Ix=x+3="]


def test_random_triplets_are_true_and_a_function_of_their_number():
    found = [triplets.random_triplet(number % 3, number) for number in range(60)]
    assert found == [triplets.random_triplet(number % 3, number) for number in range(60)]
    assert len({t.text for t in found}) > 50
    ran = executed.outputs([(t.program, t.inputs) for t in found])
    assert [t.outputs for t in found] == ran
    assert all(triplets.parsed(t.kind, t.text) == (t.program, t.inputs) for t in found)


def test_tasks_to_solve_keep_their_splits_apart():
    train, test = (triplets.solve(count=60, split=split) for split in ("train", "test"))
    texts = [{task.example(s, i)["triplet"] for s in range(3) for i in range(task.sizes[s])} for task in (train, test)]
    assert not texts[0] & texts[1] and 5 < sum(test.sizes) < 40 < sum(train.sizes)
    assert all(zlib.crc32(text.encode()) % 10 == 0 for text in texts[1])
    assert train.sources == triplets.KINDS and test.name == "triplets_test"
    with pytest.raises(Refused, match="split must be"):
        triplets.solve(split="dev")


def test_tasks_to_propose_have_prompts_of_one_width_and_demonstrations():
    task = triplets.propose(prompt_tokens=40)
    source, index = np.array([0, 1, 2]), np.array([5, 6, 2**30 - 1])
    prompts = task.at(source, index).check()
    assert prompts.tokens.shape == (3, 40) and triplets.texts_of(prompts.example["fallback"]) == list(triplets.FIRST)
    tokens, valid = task.targets(source, index)
    written = [task.vocabulary.decode(row[mask]) for row, mask in zip(tokens, valid)]
    assert written == [task.example(int(s), int(i))["answer"] for s, i in zip(source, index)]
    shown = triplets.texts_of(prompts.example["reference"])
    found = executed.proposals([0, 1, 2], written, shown, 40, task.vocabulary)
    assert all(proposal.well_formed and proposal.triplet for proposal in found)
    asked = [task.vocabulary.decode(row[mask]) for row, mask in zip(prompts.tokens, prompts.valid)]
    assert asked == [triplets.propose_prompt(kind, text) for kind, text in enumerate(shown)]
    assert len({*shown, *triplets.FIRST}) == 6 - 1 and shown[0] != written[0]  # two kinds have one trivial triplet


def test_proposals_are_validated_by_running_them():
    texts = {
        "x=x+3#4": (True, ("7",)), "x=x+#4": (False, None), "x=1/0#4": (True, None), "x=[x]*9999#4": (True, None),
        "import random\ndef f(x): return random.random()#4": (True, None), "while 1:x=1#4": (True, None),
        "x=x+1#[4]": (True, None), "def f(x): return print#1": (True, None), "x='é'#4": (True, None),
        "import os\ndef f(x): return os.getpid()#4": (True, None), "x=x//2#9": (True, None),
        "x=float('inf')#9": (True, None),
    }  # fmt: skip  # // and é are not in the vocabulary
    found = executed.proposals([0] * len(texts), list(texts), ["x=x#1"] * len(texts), 40, triplets.VOCABULARY,
                               seconds=0.3)  # fmt: skip
    said = {t: (p.well_formed, p.triplet and p.triplet.outputs) for t, p in zip(texts, found)}
    assert said == texts
    inputs, bad = executed.proposals([2, 2], ["4#0#1#9", "4#0#1"], ["x=x+3#1"] * 2, 40, triplets.VOCABULARY)
    assert inputs.triplet == PAIRS and bad == (False, None)


def test_answers_are_judged():
    deduction, abduction = (Triplet(kind, "x=x%5", ("7",), ("2",)) for kind in (DEDUCTION, ABDUCTION))
    cases = [
        (deduction, "2", (True, True)), (deduction, "2.0", (True, True)), (deduction, "3", (True, False)),
        (deduction, "1+1", (False, False)), (deduction, "", (False, False)),
        (abduction, "7", (True, True)), (abduction, "12", (True, True)), (abduction, "4", (True, False)),
        (abduction, "x", (False, False)), (abduction, "[1]", (True, False)), (abduction, "7#12", (False, False)),
        (PAIRS, "x=x+3", (True, True)), (PAIRS, "x=3+x", (True, True)), (PAIRS, "x=x+3;x=[7,3,4,9][0]", (True, False)),
        (PAIRS, "x=[4,12][x==9]", (True, True)),  # right on what is hidden, which is what is asked
        (PAIRS, "x=", (False, False)), (PAIRS, "x=x+3#1", (False, False)), (PAIRS, "x=y", (True, False)),
    ]  # fmt: skip
    verdicts = executed.judged([task for task, *_ in cases], [answer for _, answer, _ in cases])
    assert verdicts == [wanted for *_, wanted in cases]


def test_what_was_run_is_remembered(monkeypatch):
    (first,) = executed.outputs([("x=x*9", ("9",))])
    monkeypatch.setattr(executed, "_pool", lambda seconds: pytest.fail("it is run again"))
    assert executed.outputs([("x=x*9", ("9",))] * 2) == [first, first] == [("81",)] * 2


def test_seeds_are_those_that_can_be_written(tmp_path):
    path = tmp_path / "seeds.jsonl.gz"
    same = "def f(a):\n    return a"
    rows = [{"snippet": same, "input": '"Hello"'}, {"snippet": "def f(a): # b\n  return a", "input": "1"},
            {"snippet": same, "inputs": ["1", "2", "3", "4", "5"]}]  # fmt: skip
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    assert triplets.seeds(str(path), DEDUCTION) == ('def f(a):\n    return a#"Hello"', "def f(a):\n    return a#1")
    assert triplets.seeds(str(path), DEDUCTION, width=28) == ("def f(a):\n    return a#1",)
    assert triplets.seeds(str(path), INDUCTION) == ("def f(a):\n    return a#1#2#3#4",)
