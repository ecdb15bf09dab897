"""The shipped rewards: of text, and in the graph."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
from reward_worlds import prompts_of, rollout_of, run, task_of

from mlrl import prompts
from mlrl.rewards import graph, shipped
from mlrl.rewards.completions import per_completion
from mlrl.rewards.lifting import in_graph, lift
from mlrl.tasks import puzzles
from mlrl.types import Refused


def say(answer):
    return {"prompt": "?", "answer": answer}


@pytest.mark.parametrize(
    "completion, answer, reward",
    [
        ("42", "42", 1.0),
        (" 42\n", 42, 1.0),
        ("<think>41</think><answer>41</answer> no, <answer> 42 </answer>", "42", 1.0),
        ("42.0", "42", 0.0),
        ("the answer is 42", "42", 0.0),
    ],
)
def test_exact(completion, answer, reward):
    assert shipped.exact(completion, say(answer)) == reward


@pytest.mark.parametrize(
    "completion, answer, reward",
    [
        ("first 7, then 1,234.50", "1234.5", 1.0),
        ("-3", "3", 0.0),
        ("it is .5", "0.5", 1.0),
        ("1e3.", "1000", 1.0),
        ("<answer>5</answer> 6", "5", 1.0),
        ("none", "5", 0.0),
        ("5-3", "3", 1.0),
        ("2 + -3", "-3", 1.0),
        ("1,2,3", "3", 1.0),
        ("1000000.5", "1000000", 1.0),  # within 1e-6 of its size
        ("1000002", "1000000", 0.0),
        ("0.0000005", "0", 1.0),
    ],
)
def test_numeric(completion, answer, reward):
    assert shipped.numeric(completion, say(answer)) == reward


def test_numeric_tolerance_and_a_bad_answer():
    assert shipped.numeric("5.4", say("5"), tolerance=0.1) == 1.0
    assert shipped.numeric("5.6", say("5"), tolerance=0.1) == 0.0
    with pytest.raises(ValueError, match="the example's answer has no number: 'five'"):
        shipped.numeric("5", say("five"))


def test_symbolic_in_workers():
    """In workers, where it runs: math-verify's own limits would not fire outside of a main thread."""
    texts = ["$\\frac{1}{2}$", "<answer>0.5</answer>", "\\boxed{2/4}", "1/3", "what", "$\\frac{2}{4}x$"]
    answers = ["1/2", "\\frac{1}{2}", "$\\frac12$", "1/2", "1/2", "$x/2$"]

    class Verbatim:
        def decode(self, ids):
            return texts[ids[0] - 2]

    rollout, prompts = rollout_of(list("abcdef"), prompt=""), prompts_of(6)
    task = dataclasses.replace(task_of(answers), vocabulary=Verbatim())
    reward = per_completion(shipped.symbolic, timeout_seconds=30.0, workers=1)
    rewards, _ = reward.update((), rollout, prompts, task, None)
    np.testing.assert_array_equal(rewards.outcome, [1, 1, 1, 0, 0, 1])
    assert rewards.scored.all()


@pytest.mark.parametrize(
    "completion, reward",
    [
        ("<think>a\nb</think>\n<answer>c</answer>\n", 1.0),
        ("<answer>c</answer>", 0.0),
        ("<think>a</think><answer>c</answer> and more", 0.0),
        ("<think>a</think><think>b</think><answer>c</answer>", 0.0),
        ("<think>a</think><answer>c</answer><answer>d</answer>", 0.0),
    ],
)
def test_format_tags(completion, reward):
    assert shipped.format_tags(completion, {}) == reward


def test_regular_expression_and_length_in_workers():
    reward = lift([shipped.regular_expression("^a.c$"), shipped.length])
    rewards, _ = run(reward, ["abc", "abcd"])
    np.testing.assert_array_equal(rewards.parts["regular_expression"], [1, 0])
    np.testing.assert_array_equal(rewards.parts["length"], [3, 4])
    with pytest.raises(Refused, match=r"'\(' is not a regular expression: missing \)"):
        shipped.regular_expression("(")


def test_shipped_imports_nothing_heavy():
    code = (
        "import sys, mlrl.rewards.shipped, mlrl.rewards.adapters;"
        "sys.exit(bool({'jax', 'numpy', 'tensorflow', 'flax'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_length_tokens_and_truncated_penalty():
    rollout, prompts = rollout_of(["abc", ""]), prompts_of(2)
    np.testing.assert_array_equal(graph.length_tokens(rollout, prompts), [4, 1])
    np.testing.assert_array_equal(graph.truncated_penalty(rollout, prompts), [0, 0])
    full = rollout.replace(truncated=np.array([True, False]))
    np.testing.assert_array_equal(graph.truncated_penalty(full, prompts), [-1, 0])


def test_overlong():
    rollout, prompts = (
        rollout_of(["", "a", "ab", "abc", "abcde", "abcdef"]),
        prompts_of(6),
    )  # lengths 1 2 3 4 6 7
    penalty = graph.overlong(rollout, prompts, max_tokens=6, buffer_tokens=4)
    np.testing.assert_array_equal(penalty, [0, 0, -0.25, -0.5, -1, -1])
    with pytest.raises(Refused, match="0 < buffer_tokens <= max_tokens"):
        graph.overlong(rollout, prompts, max_tokens=4, buffer_tokens=5)


def test_random_is_deterministic_resumes_and_changes():
    reward = graph.random(seed=1, rate=0.5)
    rollout, prompts = rollout_of(["ab"] * 64), prompts_of(64)
    step = jax.jit(lambda state: reward.update(state, rollout, prompts, None, None))
    first, state = step(reward.init())
    second, _ = step(state)
    again, _ = step(jax.tree.map(lambda x: np.array(x), state))  # as restored from a disk
    np.testing.assert_array_equal(second.outcome, again.outcome)
    assert (first.outcome != second.outcome).any()
    assert set(np.unique(first.outcome)) == {0.0, 1.0} and 20 < first.outcome.sum() < 44
    other = graph.random(seed=2)
    assert (other.update(other.init(), rollout, prompts, None, None)[0].outcome != first.outcome).any()
    always = graph.random(rate=1.0)
    assert (always.update(always.init(), rollout, prompts, None, None)[0].outcome == 1).all()
    with pytest.raises(Refused, match="rate"):
        graph.random(rate=1.5)


def test_public_names_are_imported_on_first_use():
    import mlrl.rewards

    assert mlrl.rewards.lift is lift and mlrl.rewards.in_graph is in_graph
    for name in dir(mlrl.rewards):
        assert callable(getattr(mlrl.rewards, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mlrl.rewards.nothing


@pytest.mark.parametrize(
    "task, reward",
    [
        (puzzles.arithmetic(digits=1), graph.arithmetic),
        (puzzles.arithmetic(digits=1, operands=3, scratchpad=True), graph.final_answer),
        (puzzles.countdown(numbers=3), graph.countdown),
    ],
)
def test_puzzle_rewards_know_right_from_wrong(task, reward):
    key, weights = jax.random.key(0), np.ones(1, np.float32)
    given = prompts.draw(task, key, 0, 8, weights)
    right = prompts.demonstrations(task, key, 0, 8, weights)
    judge = jax.jit(lambda rollout: lift(reward).update((), rollout, given, task, None)[0])
    np.testing.assert_array_equal(judge(right).outcome, np.ones(8))
    np.testing.assert_array_equal(judge(right.replace(truncated=~right.truncated)).outcome, np.zeros(8))
    others = right.replace(
        tokens=np.roll(right.tokens, 1, axis=0), action_mask=np.roll(right.action_mask, 1, axis=0)
    )
    assert judge(others).outcome.mean() < 0.5  # the answers of other prompts


def test_a_puzzle_reward_on_another_task_says_what_is_missing():
    with pytest.raises(Refused, match="reward 'countdown' raised KeyError: 'numbers'"):
        run(lift(graph.countdown), ["ab"])


def test_judges_of_text_tasks_run_in_workers_and_report_apart():
    class Verbatim:
        def decode(self, ids):
            return ["#### 7", "so 7", "8"][ids[0] - 2]

    task = dataclasses.replace(task_of(["7"] * 3), vocabulary=Verbatim())
    rewards, _ = lift(shipped.gsm8k_score).update(
        (), rollout_of(list("abc"), prompt=""), prompts_of(3), task, None
    )
    np.testing.assert_array_equal(rewards.outcome, [1, 0, 0])
    np.testing.assert_array_equal(rewards.parts["gsm8k_score/strict"], [1, 0, 0])
    np.testing.assert_array_equal(rewards.parts["gsm8k_score/lenient"], [1, 1, 0])


def test_from_environment_places_each_payment_and_leaves_out_rows_that_did_not_act():
    rollout = rollout_of(["abcd", "abcd"])
    action = np.array(rollout.action_mask)
    action[0, 4], action[1] = False, False  # an observation between two turns; another player's row
    earned = np.zeros(action.shape, np.float32)
    earned[0, 3], earned[0, 4], earned[0, 6], earned[1, 6] = 1.0, 5.0, -2.0, 3.0
    rollout = rollout.replace(action_mask=action, earned=earned, facts={"turns": np.float32([2, 1])}).check()
    reward = lift(graph.from_environment)
    rewards, _ = reward.update((), rollout, prompts_of(2), None, None)
    np.testing.assert_array_equal(rewards.tokens, [[0, 0, 0, 1, 0, 0, -2, 0, 0, 0], [0] * 10])
    np.testing.assert_array_equal(rewards.outcome, [-1, 0])
    np.testing.assert_array_equal(rewards.scored, [True, False])
    np.testing.assert_array_equal(rewards.parts["from_environment/turns"], [2, 0])
    with pytest.raises(Refused, match="no environment that pays"):
        run(lift(graph.from_environment), ["abcd"])
