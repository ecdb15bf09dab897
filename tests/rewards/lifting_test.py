"""The liftings: shapes, masks, unscored rows, errors that name the function, in the graph and in workers."""

import gc
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reward_behaviors import behave
from reward_worlds import prompts_of, rollout_of, run, task_of

from mlrl.rewards.completions import completion_texts, name_of, per_completion
from mlrl.rewards.lifting import at_last_action, in_graph, lift, stateful, with_models
from mlrl.types import Models, Refused, RewardFn, Rollout

TEXTS = ["abc", "", "zz"]  # the completion and its EOS are actions, in columns 2 and on of 10


def update_of(reward, jit):
    def update(state, rollout, prompts):
        return reward.update(state, rollout, prompts, None, None)

    return jax.jit(update) if jit else update


def count_actions(rollout, prompts):
    return rollout.action_mask.sum(axis=1)


@pytest.mark.parametrize("jit", [False, True])
def test_in_graph_outcome_sits_on_the_last_action(jit):
    reward = in_graph(count_actions)
    assert reward.in_graph and reward.names == ("count_actions", "unscored/count_actions")
    rewards, state = update_of(reward, jit)(reward.init(), rollout_of(TEXTS), prompts_of(3))
    expected = np.zeros((3, 10), np.float32)
    expected[0, 5], expected[1, 2], expected[2, 4] = 4, 1, 3
    np.testing.assert_array_equal(rewards.check().tokens, expected)
    np.testing.assert_array_equal(rewards.outcome, [4, 1, 3])
    assert rewards.tokens.dtype == jnp.float32 and rewards.scored.all() and state == ()
    np.testing.assert_array_equal(rewards.parts["count_actions"], [4, 1, 3])


@pytest.mark.parametrize("jit", [False, True])
def test_in_graph_reward_per_token_counts_actions_only(jit):
    def per_token(rollout, prompts):
        column = jnp.arange(rollout.tokens.shape[1], dtype=jnp.float32)
        return jnp.where(rollout.valid, column, jnp.nan)  # NaN at padding reaches nothing

    rewards, _ = update_of(in_graph(per_token), jit)((), rollout_of(TEXTS), prompts_of(3))
    np.testing.assert_array_equal(rewards.tokens[0], [0, 0, 2, 3, 4, 5, 0, 0, 0, 0])  # not the prompt's 1
    np.testing.assert_array_equal(rewards.outcome, [14, 2, 9])
    assert rewards.scored.all()


@pytest.mark.parametrize("jit", [False, True])
def test_in_graph_not_finite_is_unscored(jit):
    def reciprocal(rollout, prompts):
        return {"reward": 1.0 / prompts.example["answer"], "outcome": prompts.example["answer"] > 1}

    rewards, _ = update_of(in_graph(reciprocal, name="r"), jit)((), rollout_of(TEXTS), prompts_of(3))
    np.testing.assert_array_equal(rewards.scored, [False, True, True])
    np.testing.assert_array_equal(rewards.tokens.sum(axis=1), [0, 1, 0.5])
    np.testing.assert_array_equal(rewards.outcome, [0, 0, 1])
    np.testing.assert_array_equal(rewards.parts["r"], [0, 1, 0.5])
    np.testing.assert_array_equal(rewards.parts["unscored/r"], [1, 0, 0])


def test_a_row_without_actions_gets_no_reward_anywhere():
    mask = np.array([[False, True, False], [False, False, False]])
    np.testing.assert_array_equal(at_last_action(jnp.array([2.0, 3.0]), mask), [[0, 2, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    "f, message",
    [
        (
            lambda rollout, prompts: jnp.zeros(4),
            r"'lambda' must return shape \[B\]=\[3\] or \[B,L\]=\[3,10\], got \[4\]",
        ),
        (lambda rollout, prompts: jnp.zeros((10, 3)), r"got \[10, 3\]"),
        (lambda rollout, prompts: 0.0, r"got \[\]"),
        (lambda rollout, prompts: "good", "'lambda' must return an array, got str"),
        (lambda rollout, prompts: None, "'lambda' must return an array, got NoneType"),
        (lambda rollout, prompts: jnp.zeros(3, complex), "must return numbers, got dtype complex64"),
        (lambda rollout, prompts: prompts.example["truth"], "'lambda' raised KeyError: 'truth'"),
        (lambda rollout, prompts: {"a": jnp.zeros(3), "b": jnp.zeros(3)}, 'must return an entry "reward"'),
        (
            lambda rollout, prompts: {"reward": jnp.zeros(3), "b": jnp.zeros(2)},
            r"entry 'b' must have shape \[B\]=\[3\]",
        ),
    ],
)
def test_in_graph_mistakes_name_the_function(f, message):
    with pytest.raises(Refused, match=message):
        jax.eval_shape(
            lambda r, p: in_graph(f).update((), r, p, None, None), rollout_of(TEXTS), prompts_of(3)
        )
    with pytest.raises(Refused, match=message):
        run(in_graph(f), TEXTS)


def test_no_gradient_flows_through_a_reward():
    def loss(x):
        reward = in_graph(lambda rollout, prompts: x * jnp.ones(3), name="x")
        return reward.update((), rollout_of(TEXTS), prompts_of(3), None, None)[0].tokens.sum()

    assert jax.grad(loss)(2.0) == 0.0


@pytest.mark.parametrize("jit", [False, True])
def test_with_models(jit):
    def likelihood(models, rollout, prompts):
        return models.score(rollout)

    reward = lift(likelihood)
    assert reward.in_graph

    def update(scale):
        models = Models(
            generate=None, score=lambda rollout: scale * rollout.valid.sum(axis=1), reference=None,
            generate_reference=None,
        )
        return reward.update((), rollout_of(TEXTS), prompts_of(3), None, models)[0]

    np.testing.assert_array_equal((jax.jit(update) if jit else update)(2.0).outcome, [12, 6, 10])


@pytest.mark.parametrize("jit", [False, True])
def test_stateful(jit):
    def steps(state, rollout, prompts):
        return state + jnp.zeros(3), state + 1

    reward = stateful(lambda: jnp.zeros((), jnp.int32), steps)
    update, state = update_of(reward, jit), reward.init()
    for step in range(3):
        rewards, state = update(state, rollout_of(TEXTS), prompts_of(3))
        np.testing.assert_array_equal(rewards.outcome, [step] * 3)


def test_stateful_mistakes():
    with pytest.raises(Refused, match="'steps' must return a state with the structure, shapes and dtypes"):
        run(stateful(lambda: jnp.zeros(()), lambda s, r, p: (jnp.zeros(3), (s, s)), name="steps"), TEXTS)
    with pytest.raises(Refused, match="structure, shapes and dtypes"):
        run(
            stateful(lambda: jnp.zeros(()), lambda s, r, p: (jnp.zeros(3), jnp.zeros(2)), name="steps"), TEXTS
        )
    with pytest.raises(Refused, match=r"'steps' must return \(rewards, state\)"):
        run(stateful(lambda: jnp.zeros(()), lambda s, r, p: jnp.zeros(3), name="steps"), TEXTS)


def test_lift_goes_by_the_first_parameter():
    assert lift(count_actions).in_graph
    assert not lift(lambda completion, example: 0.0).in_graph
    assert not lift([lambda completion, example: 0.0]).in_graph
    reward = in_graph(count_actions)
    assert lift(reward) is reward
    with pytest.raises(Refused, match="'lambda' takes 'completions', as TRL's do: wrap it in adapters.from_trl"):
        lift(lambda completions, answer: [0.0])
    with pytest.raises(Refused, match="a list of rewards holds .* and 'lambda' is another"):
        lift([lambda completion, example: 0.0, lambda completions, answer: [0.0]])
    with pytest.raises(Refused, match="'lambda' must take .* first parameter's name .* here it is 'text'"):
        lift(lambda text, example: 0.0)
    with pytest.raises(Refused, match="must be a function or a RewardFn, got float 0.5"):
        lift(0.5)


def test_names():
    assert name_of(count_actions) == "count_actions"
    assert name_of(jax.tree_util.Partial(count_actions)) == "count_actions"
    with pytest.raises(Refused, match="two rewards report a part called 'lambda'"):
        per_completion([lambda completion, example: 0.0, lambda completion, example: 1.0])


def test_per_completion_gets_the_text_and_the_example():
    def same(completion, example):  # a closure: it travels by value, as a notebook's functions do
        return float(completion == example["answer"]) + 2.0 * (example["prompt"] == "ab")

    rewards, state = run(lift(same), TEXTS, answers=["abc", "", "z"])
    assert isinstance(rewards.tokens, np.ndarray) and state == ()
    np.testing.assert_array_equal(rewards.outcome, [3, 3, 2])
    expected = np.zeros((3, 10), np.float32)
    expected[0, 5], expected[1, 2], expected[2, 4] = 3, 3, 2
    np.testing.assert_array_equal(rewards.tokens, expected)


def test_completion_is_the_last_turn_with_actions():
    rollout = rollout_of(["abcdef", "xyz"])
    turn = np.array(rollout.turn)
    turn[0, 5:] = 2  # the second turn begins at "d"
    rollout = Rollout(**{**rollout.__dict__, "turn": turn})
    assert completion_texts(rollout, task_of([]).vocabulary) == ["def", "xyz"]


def test_unscored_rows_are_marked_and_counted_by_reason():
    reward = per_completion(behave, timeout_seconds=0.3, max_unscored_share=1.0)
    texts = ["ok", "raise", "hang", "nan", "text", "die", "none"]
    rewards, _ = run(reward, texts, answers=["3"] * 7)
    np.testing.assert_array_equal(rewards.scored, [True] + [False] * 6)
    np.testing.assert_array_equal(rewards.outcome, [3] + [0] * 6)
    np.testing.assert_array_equal(rewards.tokens.sum(axis=1), [3] + [0] * 6)
    assert set(rewards.parts) == set(reward.names)
    np.testing.assert_array_equal(rewards.parts["unscored/behave"], [0] + [1] * 6)
    for row, reason in enumerate(("raised", "hung", "not_finite", "wrong_type", "died", "not_applicable"), 1):
        np.testing.assert_array_equal(rewards.parts[f"unscored/behave/{reason}"], np.eye(7)[row])


def test_too_many_unscored_rows_stop_the_run_with_an_example():
    texts = ["ok", "ok", "raise", "ok"]
    with pytest.raises(Refused) as caught:
        run(per_completion(behave), texts, answers=["3"] * 4)
    message = str(caught.value)
    assert "\n" not in message
    assert message == (
        "reward 'behave' left 1 of 4 rows unscored, more than max_unscored_share=0.2; row 2: raised: "
        "KeyError: 'no such key'; prompt 'ab', completion 'raise'"
    )
    rewards, _ = run(per_completion(behave, max_unscored_share=0.25), texts, answers=["3"] * 4)
    assert rewards.scored.sum() == 3
    with pytest.raises(
        Refused, match="3 of 3 rows .* not_applicable: it returned None"
    ):  # a forgotten return
        run(lift(lambda completion, example: None), TEXTS)


def test_several_functions_are_summed_and_none_means_not_applicable():
    def short(completion, example):
        return {"reward": 1.0, "letters": len(completion), "outcome": 5.0} if len(completion) < 3 else None

    def letter(completion, example):
        return 0.5 if completion else None

    reward = lift([short, letter])
    rewards, _ = run(reward, ["abc", "ab", "a", "b", "", "c"])
    np.testing.assert_array_equal(rewards.scored, [True] * 6)
    np.testing.assert_array_equal(rewards.tokens.sum(axis=1), [0.5, 1.5, 1.5, 1.5, 1.0, 1.5])
    np.testing.assert_array_equal(rewards.outcome, [0.5, 5.5, 5.5, 5.5, 5.0, 5.5])
    np.testing.assert_array_equal(rewards.parts["short/letters"], [0, 2, 1, 1, 0, 1])
    np.testing.assert_array_equal(rewards.parts["letter"], [0.5, 0.5, 0.5, 0.5, 0, 0.5])
    np.testing.assert_array_equal(rewards.parts["unscored/short/not_applicable"], [1, 0, 0, 0, 0, 0])


def test_parts_only_grow():
    def sometimes(completion, example):
        return {"reward": 0.0, completion: 1.0}

    reward = lift(sometimes)
    run(reward, ["a"])
    rewards, _ = run(reward, ["b"])
    np.testing.assert_array_equal(rewards.parts["sometimes/a"], [0])
    np.testing.assert_array_equal(rewards.parts["sometimes/b"], [1])


def test_dropping_the_reward_ends_its_workers():
    reward = lift(lambda completion, example: os.getpid())
    rewards, _ = run(reward, ["a"])
    worker = int(rewards.outcome[0])
    assert os.path.exists(f"/proc/{worker}")
    del reward
    gc.collect()
    assert not os.path.exists(f"/proc/{worker}")


@pytest.mark.parametrize("knob", [{"workers": 0}, {"timeout_seconds": 0.0}, {"max_unscored_share": 1.5}])
def test_knobs_out_of_range(knob):
    with pytest.raises(Refused, match=f"per_completion: {next(iter(knob))}="):
        per_completion(behave, **knob)
    with pytest.raises(Refused, match="needs a function"):
        per_completion(())


def test_reward_fn_is_what_lift_returns():
    assert isinstance(with_models(lambda models, rollout, prompts: jnp.zeros(3)), RewardFn)
