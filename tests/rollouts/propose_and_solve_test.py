"""A rollout of proposals and attempts, and its rewards, on rows that are written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl import prompts as prompts_lib
from mlrl.generation import as_rollout
from mlrl.rewards import absolute_zero
from mlrl.rollouts.propose_and_solve import propose_and_solve, solve_alone
from mlrl.sampling import Sampling
from mlrl.tasks import triplets
from mlrl.types import Models, Prompts, Refused

TASK = triplets.propose(prompt_tokens=30)
V = TASK.vocabulary
T = 16
PROPOSED = ["x=x+3#4", "x=", "4#0#1#9", "x=x*2#5"]  # deduction, abduction, induction, deduction
SOURCE = np.array([0, 1, 2, 0], np.int32)
# Of each, three attempts. The second's proposal is malformed: its attempts are at the trivial triplet, x=x with 1.
ATTEMPTS = [["7", "7", "8"], ["1", "2", "x"], ["x=x", "x=x+0", "x="], ["10", "10", "10"]]


def completions(prompts, texts, group_size):
    """Rows of the prompts with the texts as completions."""
    n, width = prompts.tokens.shape
    tokens, lengths = np.full((len(texts), T), V.pad_id, np.int32), []
    for row, text in enumerate(texts):
        ids = [*V.encode(text), V.eos_ids[0]]
        tokens[row, : len(ids)] = ids
        lengths.append(len(ids))
    return as_rollout(prompts, jnp.asarray(tokens), jnp.zeros(tokens.shape), jnp.asarray(lengths),
                      ended=jnp.ones(len(texts), bool), policy_version=0)  # fmt: skip


def written(model, params, prompts, key, *, group_size, **given):
    """A policy that says what is written above, and a noted number of groups."""
    asked.append([V.decode(row[mask]) for row, mask in zip(np.asarray(prompts.tokens), np.asarray(prompts.valid))])
    texts = PROPOSED if group_size == 1 else [text for group in ATTEMPTS for text in group]
    return completions(prompts, texts, group_size)


asked = []


@pytest.fixture
def rows():
    """(prompts, rollout) of the policy that is written above, with the buffer as it begins."""
    asked.clear()
    reward = absolute_zero.absolute_zero(width=30, capacity=8)
    prompts = absolute_zero.recall(TASK.at(SOURCE, np.array([5, 6, 7, 8])), reward.init(), TASK).check()
    given = dict(vocabulary=V, sampling=Sampling(), policy_version=3, rollout_fn=written)
    rollout = propose_and_solve(None, None, prompts, jax.random.key(0), group_size=4, **given).check()
    return prompts, rollout


def repeated(prompts, times):
    return jax.tree.map(lambda x: np.repeat(np.asarray(x), times, axis=0), prompts)


def test_attempts_are_at_what_was_proposed_or_at_the_buffer(rows):
    _, rollout = rows
    assert asked == [["Dx=x#1=", "Ax=x#1=", "Ix=x=", "Dx=x#1="], ["dx=x+3#4=", "ax=x#1=", "i4>4#0>0=", "dx=x*2#5="]]
    assert rollout.role.tolist() == [0, 1, 1, 1, 2, 3, 3, 3, 4, 5, 5, 5, 0, 1, 1, 1]
    assert rollout.group.tolist() == [4, 0, 0, 0, 5, 1, 1, 1, 6, 2, 2, 2, 7, 3, 3, 3]
    seen = [V.decode(row[mask]) for row, mask in zip(np.asarray(rollout.tokens), np.asarray(rollout.valid))]
    assert seen[:2] == ["Dx=x#1=x=x+3#4", "dx=x+3#4=7"] and seen[9] == "i4>4#0>0=x=x"


def test_rewards_are_learnability_and_being_right(rows):
    prompts, rollout = rows
    reward = absolute_zero.absolute_zero(width=30, capacity=8)
    given = jax.tree.map(np.asarray, rollout), repeated(prompts, 4)
    rewards, state = reward.update(reward.init(), *given, TASK, None)
    third = pytest.approx(1 / 3)
    assert rewards.check().tokens.sum(axis=1).tolist() == [
        third, 1, 1, -0.5, -1, 1, -0.5, -1, third, 1, 1, -1, -0.5, 1, 1, 1]  # fmt: skip
    assert rewards.outcome.tolist() == [1, 1, 1, 0, 0, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1] and rewards.scored.all()
    shares = {name: float(part.mean()) for name, part in rewards.parts.items()}
    assert tuple(shares) == reward.names
    expected = {
        "propose/reward": (1 / 3 - 1 + 1 / 3 - 0.5) / 4, "propose/malformed": 1 / 4, "propose/valid": 3 / 4,
        "propose/new": 3 / 4, "rate/none": 0.0, "rate/some": 2 / 3, "rate/all": 1 / 3, "solve/malformed": 2 / 12,
        "solve/deduction": 5 / 6, "solve/abduction": 1 / 3, "solve/induction": 2 / 3, "buffer/size": 6.0,
    }  # fmt: skip
    assert shares == pytest.approx(expected)
    assert state["count"].tolist() == [3, 1, 2]
    assert triplets.texts_of(state["texts"][0])[:4] == ["x=x#1", "x=x+3#4", "x=x*2#5", ""]
    again, state = reward.update(state, *given, TASK, None)
    assert float(again.parts["propose/new"].mean()) == 0.0 and state["count"].tolist() == [5, 1, 3]


def test_the_constants_of_the_rewards_are_arguments(rows):
    prompts, rollout = rows
    reward = absolute_zero.absolute_zero(width=30, malformed=-3.0, unrewarded=0.25)
    rewards, _ = reward.update(reward.init(), jax.tree.map(np.asarray, rollout), repeated(prompts, 4), TASK, None)
    assert rewards.tokens.sum(axis=1)[[4, 12, 3, 7]].tolist() == [-3.0, 0.25, 0.25, -3.0]


def test_a_full_buffer_loses_its_oldest():
    state = absolute_zero.absolute_zero(width=30, capacity=2).init()
    found = [triplets.Triplet(0, f"x=x+{n}", ("1",), (str(1 + n),)) for n in range(3)]
    state, new = absolute_zero.remembered(state, [found[0], None, found[1], found[0], found[2]])
    assert new.tolist() == [True, False, True, False, True]
    assert state["count"].tolist() == [5, 1, 1] and triplets.texts_of(state["texts"][0]) == ["x=x+2#1", "x=x+0#1"]


def test_prompts_are_recalled_by_their_index_and_stay_as_wide():
    seeds = dict(deduction_seeds=("x=x+1#2", "x=x+2#3"), induction_seeds=("x=x*3#1#2#3#4",))
    reward = absolute_zero.absolute_zero(width=30, **seeds)
    drawn = TASK.at(np.array([0, 0, 0, 2]), np.array([0, 1, 2 + 65537, 1 + 65537]))
    prompts = absolute_zero.recall(drawn, reward.init(), TASK).check()
    assert [V.decode(row[mask]) for row, mask in zip(prompts.tokens, prompts.valid)] == [
        "Dx=x#1=", "Dx=x+1#2=", "Dx=x+1#2=", "Ix=x="]  # fmt: skip
    assert triplets.texts_of(prompts.example["fallback"]) == ["x=x#1", "x=x#1", "x=x+1#2", "x=x*3#1#2#3#4"]
    assert prompts.tokens.shape == drawn.tokens.shape
    with pytest.raises(Refused, match="is no triplet of that kind"):
        absolute_zero.absolute_zero(width=30, deduction_seeds=("x=",))
    with pytest.raises(Refused, match="capacity is 1"):
        absolute_zero.absolute_zero(width=30, capacity=1, deduction_seeds=("x=x#2",))


def test_a_demonstration_has_no_attempts_and_is_unscored():
    reward, weights = absolute_zero.absolute_zero(), jnp.ones(3) / 3
    task = triplets.propose()
    prompts = prompts_lib.draw(task, jax.random.key(0), 0, 4, weights)
    rollout = prompts_lib.demonstrations(task, jax.random.key(0), 0, 4, weights)
    models = Models(None, None, None, None)
    rewards, _ = reward.update(reward.init(), rollout, prompts, task, models)
    assert not rewards.scored.any() and (rewards.outcome == 1).all() and (rewards.tokens == 0).all()


def test_a_group_of_one_and_a_solver_alone_are_left_to_the_sampler():
    asked.clear()
    given = dict(vocabulary=V, sampling=Sampling(), rollout_fn=written)
    single = propose_and_solve(None, None, TASK.at(SOURCE, SOURCE), jax.random.key(0), group_size=1, **given)
    assert len(asked) == 1 and single.role.tolist() == [0] * 4
    rows = solve_alone(None, None, TASK.at(SOURCE, SOURCE), jax.random.key(0), group_size=3, **given)
    assert rows.role.tolist() == [1, 1, 1, 3, 3, 3, 5, 5, 5, 1, 1, 1]


def test_other_prompts_are_refused():
    number = np.zeros(2, np.int32)
    prompts = Prompts(np.zeros((2, 3), np.int32), np.ones((2, 3), bool), number, number, {})
    with pytest.raises(Refused, match="needs the prompts of triplets.propose"):
        propose_and_solve(None, None, prompts, jax.random.key(0), vocabulary=V, sampling=Sampling(), group_size=2)


def test_an_attempt_is_judged_alone_too():
    example = {"triplet": "x=x+3#4", "kind": 0, "outputs": ["7"]}
    assert [absolute_zero.solved(text, example)["reward"] for text in ("7", "8", "x")] == [1.0, -0.5, -1.0]
    assert [absolute_zero.solved(text, example)["outcome"] for text in ("7", "8", "x")] == [1.0, 0.0, 0.0]
