"""The adapters: functions written for other libraries, run as rewards in worker processes."""

import numpy as np
import pytest
from reward_worlds import run

from mlrl.rewards.adapters import from_openrlhf, from_trl, from_verifiers, from_verl
from mlrl.rewards.lifting import lift
from mlrl.types import Refused

TEXTS, ANSWERS = ["abc", "x", "zz"], ["abc", "y", "zz"]


def outcome(reward, **knobs):
    rewards, _ = run(lift(reward), TEXTS, ANSWERS)
    return rewards.outcome.tolist()


def test_trl_columns_and_kwargs():
    def accuracy_reward(completions, answer, **kwargs):
        assert kwargs["prompts"] == ["ab"] and kwargs["task"] == ["letters"]
        return [1.0 if c == a else 0.25 for c, a in zip(completions, answer)]

    reward = from_trl(accuracy_reward)
    assert outcome(reward) == [1.0, 0.25, 1.0]
    assert lift(reward).names[0] == "accuracy_reward"

    def named_only(prompts, completions, answer):
        return [float(p + c == "ab" + a) for p, c, a in zip(prompts, completions, answer)]

    assert outcome(from_trl(named_only)) == [1.0, 0.0, 1.0]


def test_trl_conversational_coroutine_and_none():
    async def chat(prompts, completions, **kwargs):
        assert prompts[0] == [{"role": "user", "content": "ab"}]
        assert completions[0][0]["role"] == "assistant"
        return [None if c[0]["content"] == "x" else 1.0 for c in completions]

    rewards, _ = run(
        lift([from_trl(chat, conversational=True), from_trl(lambda completions: [0.5])]), TEXTS, ANSWERS
    )
    assert rewards.outcome.tolist() == [1.5, 0.5, 1.5]


def test_verl():
    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        assert data_source == "letters" and extra_info["prompt"] == "ab"
        return float(solution_str == ground_truth)

    assert outcome(from_verl(compute_score)) == [1.0, 0.0, 1.0]

    def with_details(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
        return {"score": 0.5, "acc": solution_str == ground_truth, "pred": solution_str}

    rewards, _ = run(lift(from_verl(with_details)), TEXTS, ANSWERS)
    assert rewards.outcome.tolist() == [0.5] * 3
    assert rewards.parts["with_details/acc"].tolist() == [1.0, 0.0, 1.0]
    assert "with_details/pred" not in rewards.parts


def test_openrlhf():
    def reward_func(queries, prompts, labels):
        assert queries[0].startswith(prompts[0])
        right = np.array(
            [float(q == p + a) for q, p, a in zip(queries, prompts, labels)]
        )  # stands for a tensor
        return {
            "rewards": right - 0.5,
            "scores": right,
            "extra_logs": {"letters": np.array([len(queries[0])])},
        }

    rewards, _ = run(lift(from_openrlhf(reward_func)), TEXTS, ANSWERS)
    assert rewards.outcome.tolist() == [1.0, 0.0, 1.0]
    assert rewards.tokens.sum(axis=1).tolist() == [0.5, -0.5, 0.5]
    assert rewards.parts["reward_func/letters"].tolist() == [5.0, 3.0, 4.0]
    assert outcome(from_openrlhf(lambda queries, prompts, labels, **kwargs: np.array([0.25]))) == [0.25] * 3


def test_verifiers():
    def correct(completion, answer):
        return 1.0 if completion[-1]["content"] == answer else 0.0

    async def from_state(prompt, completion, state, task, **kwargs):
        assert prompt == "ab" and task == "letters" and kwargs["info"]["prompt"] == "ab"
        return float(completion == state["answer"])

    assert outcome(from_verifiers(correct)) == [1.0, 0.0, 1.0]
    assert outcome(from_verifiers(from_state, conversational=False)) == [1.0, 0.0, 1.0]


def test_mistakes():
    with pytest.raises(Refused, match="from_trl: 'f' must take completions; it takes completion, example"):

        def f(completion, example):
            return 0.0

        from_trl(f)
    with pytest.raises(Refused, match="from_verl: .* must take solution_str, ground_truth"):
        from_verl(lambda a, b: 0.0)
    with pytest.raises(Refused, match="from_openrlhf needs a function"):
        from_openrlhf(3)
    with pytest.raises(Refused, match="one completion was given, and 2 rewards came back: return a list of one"):
        outcome(from_trl(lambda completions: [1.0, 2.0]))
    with pytest.raises(Refused, match="raised: TypeError: it asks for solution, and is given answer, .*completions"):
        outcome(from_trl(lambda completions, solution: [1.0]))
