"""Environments in plain Python: the rollout hands them text, and their text comes back as tokens."""

import functools

import jax
import numpy as np
import pytest

from mlrl import prompts as prompts_lib
from mlrl import vocabularies
from mlrl.environments.host import on_host
from mlrl.models.transformer import Config, Transformer, initialize
from mlrl.rollouts.multi_turn import multi_turn
from mlrl.sampling import Sampling
from mlrl.tasks import tables
from mlrl.types import Refused

WORDS = vocabularies.characters("abcdef+ ")
TASK = tables.table([{"prompt": "ab", "answer": "c"}, {"prompt": "b", "answer": "e"}], WORDS, name="letters")
MODEL = Transformer(Config(vocabulary_size=WORDS.size, width=16, layers=1, heads=2, kv_heads=1, head_width=8,
                           mlp_width=24))  # fmt: skip
K, T, O, G = 3, 2, 4, 8


def begin(example):
    return {"answer": example["answer"], "heard": []}


def answer(state, completion):
    """Changes its state: says all that it heard, pays for the answer, ends with it."""
    state["heard"].append(completion)
    right = state["answer"] in completion
    return state, "+".join(state["heard"]), float(right), right


def sample(*, step=answer):
    environment = on_host(task=TASK, reset=begin, step=step, observation_tokens=O, max_turns=K, max_turn_tokens=T)
    params = initialize(MODEL, jax.random.key(0))
    run = jax.jit(lambda params, prompts, key: multi_turn(
        MODEL, params, prompts, key, vocabulary=WORDS, sampling=Sampling(), group_size=G, environment=environment,
        max_turns=K, max_turn_tokens=T))  # fmt: skip
    return jax.device_get(run(params, prompts_lib.first(TASK, 2), jax.random.key(1)).check())


@functools.cache
def episodes():
    return sample()


def test_a_row_is_what_python_makes_of_its_turns():
    rows, counts, found = episodes(), set(), 0
    for b in range(2 * G):
        state = begin(TASK.example(0, b // G))
        turns = int(rows.facts["turns"][b])
        for k in range(turns):
            here = rows.valid[b] & (rows.turn[b] == k)
            said = rows.tokens[b][here & rows.action_mask[b]]
            state, text, reward, done = answer(state, WORDS.decode(said))
            last = np.flatnonzero(here & rows.action_mask[b])[-1]
            assert rows.earned[b, last] == reward and done == (k == turns - 1 and rows.facts["over"][b] == 1)
            if k + 1 < turns:
                told = rows.tokens[b][rows.valid[b] & (rows.turn[b] == k + 1) & ~rows.action_mask[b]]
                assert WORDS.decode(told) == text[:O]
        counts.add(turns)
        found += int(rows.facts["over"][b])
    assert len(counts) > 1 and 0 < found < 2 * G, "the test needs episodes of several kinds"


def test_an_episode_that_is_played_again_is_the_same(monkeypatch):
    monkeypatch.setattr("mlrl.environments.host._KEPT", 0)  # no state is kept: every turn begins at the beginning
    jax.tree.map(np.testing.assert_array_equal, sample(), episodes())


@pytest.mark.parametrize("step, words", [
    (lambda state, completion: 1 / 0, "step raised ZeroDivisionError: division by zero; the prompt is '(ab|b)'"),
    (lambda state, completion: ("", 1.0), r"must return \(state, observation text, reward, done\), got tuple"),
])  # fmt: skip
def test_a_mistake_ends_the_run_and_is_named(step, words):
    with pytest.raises(Exception, match=words):
        sample(step=step)


def test_knobs_that_differ_are_refused():
    environment = on_host(task=TASK, reset=begin, step=answer, observation_tokens=O, max_turn_tokens=5)
    with pytest.raises(Refused, match="max_turn_tokens is 5, and that of the rollout 2"):
        jax.eval_shape(lambda: multi_turn(
            MODEL, {}, prompts_lib.first(TASK, 2), jax.random.key(1), vocabulary=WORDS, sampling=Sampling(),
            group_size=G, environment=environment, max_turn_tokens=T))  # fmt: skip
