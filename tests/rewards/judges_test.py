"""Judges: grades that models write become rewards, once for equal completions, and what is no grade is no reward."""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "loops"))

import worlds  # noqa: E402

from mlrl import groups, prompts, runs  # noqa: E402
from mlrl.generation import as_rollout  # noqa: E402
from mlrl.loops import online, stages  # noqa: E402
from mlrl.rewards import combinators, graph, judges  # noqa: E402
from mlrl.sampling import Sampling  # noqa: E402
from mlrl.tasks import puzzles  # noqa: E402
from mlrl.tasks.judgements import Form  # noqa: E402
from mlrl.types import Models, Refused  # noqa: E402

TASK = puzzles.arithmetic(digits=1)
VOCABULARY = TASK.vocabulary
FORM = Form(after=":")
DIGIT, EOS, PAD = VOCABULARY.encode("0")[0], VOCABULARY.eos_ids[0], VOCABULARY.pad_id


def rows(texts, *, left=0, right=0, ended=True):
    """(rollout, prompts) of rows that answer 1+1= with these texts, with more or less padding."""
    given = VOCABULARY.encode("1+1=")
    tokens = jnp.asarray([[PAD] * left + given] * len(texts), jnp.int32)
    valid = jnp.asarray([[False] * left + [True] * 4] * len(texts))
    zero = jnp.zeros(len(texts), jnp.int32)
    asked = prompts.Prompts(tokens, valid, zero, zero, {})
    width = max(map(len, texts)) + 1 + right
    said = [VOCABULARY.encode(text) + [EOS] * ended for text in texts]
    columns = jnp.asarray([ids + [DIGIT] * (width - len(ids)) for ids in said], jnp.int32)  # padding may be any token
    rollout = as_rollout(asked, columns, jnp.zeros(columns.shape), jnp.asarray([len(ids) for ids in said]),
                         ended=jnp.full(len(texts), ended), policy_version=0)  # fmt: skip
    return rollout, asked


def answering(answer, calls=None):
    """A model that answers `answer(prompts, key, group_size)` [B,T] to judge prompts, as its first and only tokens."""

    def generate(asked, key, *, sampling, rollout_fn, group_size):
        assert rollout_fn.keywords == {"max_completion_tokens": 2}
        if calls is not None:
            jax.debug.callback(lambda _: calls.append(asked.tokens.shape[0]), asked.tokens)
        tokens = answer(asked, key, group_size)
        ended = (tokens == EOS).any(axis=1)
        lengths = jnp.where(ended, jnp.argmax(tokens == EOS, axis=1) + 1, tokens.shape[1])
        return as_rollout(asked, tokens, jnp.zeros(tokens.shape), lengths, ended=ended, policy_version=0)

    return generate


def last_digit(asked, key, group_size):
    """Grades a completion by its last digit."""
    grade = asked.tokens[:, -2]
    return jnp.repeat(jnp.stack([grade, jnp.full_like(grade, EOS)], axis=1), group_size, axis=0)


def by_chance(asked, key, group_size):
    """A grade that is drawn."""
    grade = DIGIT + jax.random.randint(key, (asked.tokens.shape[0] * group_size,), 0, 10)
    return jnp.stack([grade, jnp.full_like(grade, EOS)], axis=1)


def rewarded(reward, given, answer, calls=None):
    models = Models(answering(answer, calls), None, None, None)
    found, _ = reward.update(reward.init(), *given, TASK, models)
    return found.check()


def test_a_grade_is_the_reward_on_the_last_action():
    given = rows(["2", "17", "0"])
    found = rewarded(judges.judge(form=FORM), given, last_digit)
    np.testing.assert_allclose(found.outcome, [2 / 9, 7 / 9, 0.0], atol=1e-6)
    np.testing.assert_allclose(found.tokens.sum(axis=1), found.outcome)
    assert bool(found.scored.all()) and set(found.parts) == set(judges.judge(form=FORM).names)
    last = [int(np.flatnonzero(mask)[-1]) for mask in np.asarray(given[0].action_mask)]
    np.testing.assert_allclose(found.tokens[jnp.arange(3), jnp.asarray(last)], found.outcome)


def test_a_judge_sees_the_prompt_and_the_completion_and_no_end_of_it():
    tokens, valid = judges.asked_of(FORM, VOCABULARY, *rows(["2", "17"]))
    assert [VOCABULARY.decode(t[v]) for t, v in zip(tokens, valid)] == ["1+1=2:", "1+1=17:"]
    assert not bool(jnp.any(tokens == EOS))


@pytest.mark.parametrize("answer", ["x", "99", ":9", ""])
def test_an_answer_that_is_no_grade_leaves_the_row_unscored(answer):
    ids = ([*VOCABULARY.encode(answer.replace("x", ",")), EOS] + [PAD] * 2)[:2]
    found = rewarded(judges.judge(form=FORM), rows(["2", "3"]), lambda asked, *_: jnp.asarray([ids] * 2, jnp.int32))
    assert not bool(found.scored.any()) and float(jnp.abs(found.tokens).sum()) == 0.0
    assert found.parts["unscored/judge"].tolist() == found.parts["unscored/judge/answers"].tolist() == [1.0, 1.0]


def test_several_grades_are_averaged_over_those_that_can_be_read():
    grades = VOCABULARY.encode("4,8,,,")  # of two rows, three answers each
    answer = lambda *_: jnp.asarray([[token, EOS] for token in grades], jnp.int32)  # noqa: E731
    reward = judges.judge(form=FORM, samples=3, sampling=Sampling())
    found = rewarded(reward, rows(["2", "3"]), answer)
    np.testing.assert_allclose(found.outcome, [6 / 9, 0.0], atol=1e-6)
    assert found.scored.tolist() == [True, False]
    np.testing.assert_allclose(found.parts["unscored/judge/answers"], [1 / 3, 1.0], atol=1e-6)


def test_a_completion_that_did_not_end_earns_nothing():
    found = rewarded(judges.judge(form=FORM), rows(["9", "8"], ended=False), last_digit)
    assert found.outcome.tolist() == [0.0, 0.0] and bool(found.scored.all())


@pytest.mark.parametrize("at_once", [0, 2])
def test_equal_completions_have_the_same_grade_also_where_it_is_drawn(at_once):
    reward = judges.judge(form=FORM, sampling=Sampling(), rows_at_once=at_once)
    found = rewarded(reward, rows(["2", "5", "2", "7", "5", "2"]), by_chance)
    grade = found.outcome.tolist()
    assert grade[0] == grade[2] == grade[5] and grade[1] == grade[4] and len(set(grade)) > 1
    assert found.parts["judge/repeated"].tolist() == [0, 0, 1, 0, 1, 1]


@pytest.mark.parametrize("at_once, sizes", [(0, [6]), (2, [2, 2]), (4, [4]), (6, [6])])
def test_what_is_generated_is_as_much_as_is_distinct(at_once, sizes):
    calls, given = [], rows(["2", "5", "2", "7", "5", "2"])
    reward = judges.judge(form=FORM, rows_at_once=at_once)
    found = rewarded(reward, given, last_digit, calls)
    jax.effects_barrier()
    assert calls == sizes
    np.testing.assert_allclose(found.outcome, np.asarray([2, 5, 2, 7, 5, 2]) / 9, atol=1e-6)


def test_the_first_of_equal_rows_is_found_within_its_home():
    given = jnp.asarray([[1, 2], [3, 4], [1, 2], [1, 2], [3, 4]])
    assert groups.place_of_first_equal(given, jnp.zeros(5, jnp.int32)).tolist() == [0, 1, 0, 0, 1]
    assert groups.place_of_first_equal(given, jnp.asarray([0, 0, 1, 1, 0])).tolist() == [0, 1, 2, 2, 1]


def test_greedy_grades_are_not_repeated_and_numbers_are_whole():
    with pytest.raises(Refused, match="2 greedy grades"):
        judges.judge(samples=2)
    with pytest.raises(Refused, match="judge.rows_at_once must be a whole number"):
        judges.judge(rows_at_once=-1)


# With a real model.

SAMPLED = functools.partial(judges.judge, form=FORM, samples=64, sampling=Sampling())


@functools.cache
def world(by):
    parts = online.prepare(worlds.sums(reward_fn=SAMPLED(by=by), evaluations=()))
    return parts, online.initial_state(parts)


@functools.cache
def graded(by):
    """(state, rows) -> grades, jitted."""
    parts, _ = world(by)
    return jax.jit(lambda state, given: parts.reward.update(
        state.reward, *given, parts.experiment.task, stages.models(parts, state))[0].outcome)  # fmt: skip


def test_only_the_judge_with_current_weights_moves_with_the_policy():
    given = rows(["2", "17", "4"])
    for by, moves in ((judges.current, True), (judges.frozen, False)):
        _, state = world(by)
        other = state.replace(params=jax.tree.map(lambda x: 1.5 * x + 0.1, state.params))
        before, after = (np.asarray(graded(by)(s, given)) for s in (state, other))
        assert before.any() and (before != after).any() == moves


def test_a_frozen_judge_keeps_the_reference_in_the_state():
    assert world(judges.frozen)[1].reference != () and world(judges.current)[1].reference == ()


def test_a_grade_does_not_depend_on_padding():
    texts = ["2", "17", "4"]
    _, state = world(judges.current)
    parts = world(judges.current)[0]

    @jax.jit
    def answers(given):
        asked = judges.asked_of(FORM, VOCABULARY, *given)
        models = stages.models(parts, state)
        said = models.generate(prompts.Prompts(*asked, jnp.zeros(3, jnp.int32), jnp.zeros(3, jnp.int32), {}),
                               jax.random.key(0), sampling=Sampling(),
                               rollout_fn=functools.partial(worlds.single_turn, max_completion_tokens=6))  # fmt: skip
        return said.tokens[:, -6:], said.behavior_log_probs[:, -6:]

    tokens, log_probs = answers(rows(texts))
    others, other_log_probs = answers(rows(texts, left=5, right=3))
    np.testing.assert_array_equal(tokens, others)
    np.testing.assert_allclose(log_probs, other_log_probs, atol=1e-5)
    padded = graded(judges.current)(state, rows(texts, left=5, right=3))
    np.testing.assert_allclose(graded(judges.current)(state, rows(texts)), padded, atol=1e-5)


def test_a_run_whose_judge_cannot_be_read_is_stopped(tmp_path):
    unread = judges.judge(form=FORM)
    experiment = worlds.sums(reward_fn=unread, evaluations=(), recording=runs.Recording(save_every_steps=0))
    with runs.Run(tmp_path, experiment.recording) as run:
        with pytest.raises(runs.Stopped, match=r"no reward for \d+% of its rows \(unscored/judge") as refusal:
            online.train(experiment, run)
    assert "\n" not in str(refusal.value)


def test_an_external_scorer_joins_the_judge():
    reward = combinators.weighted_sum((judges.judge(form=FORM), graph.length_tokens), (0.5, 0.5))
    found = rewarded(reward, rows(["2", "17"]), last_digit)
    np.testing.assert_allclose(found.tokens.sum(axis=1), [0.5 * (2 / 9 + 2), 0.5 * (7 / 9 + 3)], atol=1e-6)
