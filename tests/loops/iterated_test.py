"""The iterated loop: rounds resume bitwise, learn, begin as they say, and keep groups whole where a loss needs it."""

import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import worlds  # noqa: E402

from mlrl import meshes, optimizers, runs, scoring, selection  # noqa: E402
from mlrl.loops import iterated, rounds, start  # noqa: E402
from mlrl.losses import policy, preference, supervised  # noqa: E402
from mlrl.models.transformer import Config  # noqa: E402
from mlrl.reductions import sequence_mean_token_mean  # noqa: E402
from mlrl.rollouts.greedy import with_greedy_row  # noqa: E402
from mlrl.sampling import Sampling  # noqa: E402
from mlrl.types import Refused  # noqa: E402

QUIET = runs.Recording(save_every_steps=0, samples_every_steps=0)


def train(folder, **changes):
    experiment = worlds.round_of_sums(**changes)
    with runs.Run(folder, experiment.recording) as run:
        state = iterated.train(experiment, run)
    return state, worlds.logged(folder)


def play(folder, count, **changes):
    """(state before, state after, metrics, rows) of each of the first rounds, and the parts."""
    parts = iterated.prepare(worlds.round_of_sums(recording=QUIET, **changes))
    found = []
    with meshes.use(parts.experiment.mesh()), runs.Run(folder, QUIET) as run:
        round_, state = iterated.round_function(parts, run), iterated.initial_state(parts)
        while len(found) < count:
            before = state
            state, metrics, rows = round_(state)
            found.append((before, state, metrics, rows))
    return parts, found


def differ(a, b):
    return any((x != y).any() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def starts_evenly(rollout, prompts):
    """1 where the completion starts with an even digit."""
    digit = rollout.tokens[:, prompts.tokens.shape[1]] - worlds.sums().task.vocabulary.encode("0")[0]
    return ((digit >= 0) & (digit < 10) & (digit % 2 == 0)).astype(jnp.float32)


def test_n_rounds_are_k_and_the_rest_bitwise_and_the_reward_is_learned(tmp_path):
    changes = dict(reward_fn=starts_evenly, optimizer=optimizers.adamw(learning_rate=2e-2), num_rounds=16)
    whole, lines = train(tmp_path / "whole", **changes)
    train(tmp_path / "parts", **changes | {"num_rounds": 7})
    resumed, others = train(tmp_path / "parts", **changes)
    worlds.assert_same(whole, resumed)
    assert lines[1:] == others[1:] and [line["step"] for line in lines] == list(range(17))
    assert lines[1]["reward"] < 0.6 and lines[-1]["reward"] > 0.9
    assert lines[1]["selection/rows"] == 16 and lines[1]["optimizer_steps"] == 4
    clocked = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert len({line["compilations"] for line in clocked[2:]}) == 1, "a round compiles nothing after the first"


def test_a_restarted_round_learns_from_the_start_what_the_last_model_said(tmp_path):
    """Round two by hand: rows by the policy after round one; one AdamW step on all of them from the first parameters.
    """
    settings = dict(begin_round=rounds.restart, select_fn=selection.keep_all, rows_per_step=64, epochs=1,
                    reward_fn=worlds.first_digit)  # fmt: skip
    parts, ((first, *_), (before, after, metrics, rows)) = play(tmp_path, 2, **settings)
    assert metrics["optimizer_steps"] == 1 and rows.mask.shape[0] == 64
    worlds.assert_same(first.replace(reference=()), first.replace(params=after.reference, reference=()))
    assert differ(before.params, first.params)
    mask, said = rows.rollout.action_mask, jax.jit(lambda p: scoring.score(parts.model, p, rows.rollout).log_probs)
    np.testing.assert_allclose(np.where(mask, said(before.params), 0), rows.rollout.behavior_log_probs, atol=1e-5)

    loss = lambda params: -jnp.sum(jnp.where(mask, said(params), 0.0)) / mask.sum()  # noqa: E731
    optimizer = parts.experiment.optimizer

    @jax.jit
    def by_hand(params):
        steps, _ = optimizer.update(jax.grad(loss)(params), optimizer.init(params), params)
        return optax.apply_updates(params, steps)

    close = functools.partial(np.testing.assert_allclose, atol=2e-5)
    jax.tree.map(close, after.params, by_hand(first.params))


def test_a_round_that_selects_nothing_leaves_the_model_as_it_was(tmp_path):
    nobody = lambda batch: jnp.zeros_like(batch.rewards.scored)  # noqa: E731
    _, ((before, after, metrics, _),) = play(tmp_path, 1, select_fn=nobody, begin_round=rounds.restart)
    worlds.assert_same(before.replace(step=after.step, reward=after.reward), after)
    assert int(after.step) == 1 and metrics["selection/rows"] == 0 and "loss" not in metrics
    assert int(after.reward[1]) == 2, "the reward's state goes from chunk to chunk"


def test_a_moved_reference_is_the_policy_that_sampled_the_round(tmp_path):
    """With greedy rows beside the pairs; one optimizer step a round starts where policy and reference are equal."""
    settings = dict(
        rollout_fn=functools.partial(with_greedy_row, rollout_fn=worlds.ROLLOUT), reward_fn=starts_evenly,
        select_fn=selection.with_role, begin_round=rounds.move_reference, reduction=sequence_mean_token_mean,
        losses=(preference.dpo, preference.optimism), rows_per_step=64, epochs=1,
    )  # fmt: skip
    parts, found = play(tmp_path, 2, **settings)
    assert parts.unit == 4
    for before, after, metrics, rows in found:
        worlds.assert_same(before.replace(reference=()), before.replace(params=after.reference, reference=()))
        assert differ(before.params, after.params)
        assert metrics["loss/optimism"] == pytest.approx(0.0, abs=1e-6)
        kept, greedy = rows.mask.any(axis=1).reshape(16, 4), rows.rollout.role.reshape(16, 4) == 1
        assert set(kept.sum(axis=1)) <= {0, 3} and (kept & greedy).sum() == kept.sum() / 3 > 0
        paired = kept.any(axis=1).mean()  # of the groups, all of the selected ones have a pair
        assert metrics["selection/prompts_share"] == pytest.approx(paired)
        assert metrics["loss/dpo"] == pytest.approx(np.log(2), abs=1e-5)


@pytest.mark.slow
def test_a_sharded_round_samples_the_same_tokens_and_learns_the_same(tmp_path):
    halves = functools.partial(meshes.mesh, devices=2)
    _, ((*_, state, _, rows),) = play(tmp_path / "one", 1)
    _, ((*_, shared, _, other),) = play(tmp_path / "two", 1, mesh=halves)
    np.testing.assert_array_equal(rows.rollout.tokens, other.rollout.tokens)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), state.params, jax.device_get(shared.params))


def forgets_the_optimizer(state, optimizer):
    return state.replace(opt_state=())


def test_mistakes_are_refused_before_compiling():
    teacher = start.teacher(model=Config(width=8, layers=1, heads=1, kv_heads=1, head_width=8, mlp_width=8),
                            start=start.random_parameters)  # fmt: skip
    pairs = dict(losses=(preference.dpo,), reduction=sequence_mean_token_mean)
    cases = [
        ({"prompts_per_round": 20}, "20 does not divide into chunks of prompts_per_step = 8"),
        ({"rows_per_step": 65}, "rows_per_step is 65, but a round has 64 rows"),
        ({"num_rounds": 0}, "num_rounds must be a whole number of at least 1"),
        ({"micro_batch_rows": 5}, "12 rows does not divide into micro_batch_rows = 5"),
        ({"sampling": Sampling(temperature=0.0)}, "greedy"),
        ({"select_fn": lambda batch: batch.rewards.outcome}, r"must return bool\[64\].*got float32\[64\]"),
        ({"select_fn": lambda batch: batch.mask}, r"must return bool\[64\].*got bool\[64, 7\]"),
        ({**pairs, "rows_per_step": 10}, "rows_per_step = 10 would split groups of 4"),
        ({**pairs, "micro_batch_rows": 6}, "micro_batch_rows = 6 would split groups of 4"),
        ({"begin_round": rounds.move_reference}, "no loss reads the reference"),
        ({"begin_round": forgets_the_optimizer}, "begin_round returns a state that differs in opt_state"),
        ({"begin_round": rounds.restart, "reference": teacher}, "must be start.own_start"),
        ({"losses": (policy.reinforce,), "group_size": 1, "advantage_fn": worlds.sums().advantage_fn},
         "every advantage would be 0"),
    ]  # fmt: skip
    for changes, words in cases:
        with pytest.raises(Refused, match=words):
            iterated.prepare(worlds.round_of_sums(**changes))
    one = dict(sampling=Sampling(temperature=0.0), group_size=1)  # one greedy completion a prompt, as in STaR
    assert iterated.prepare(worlds.round_of_sums(**one)).unit == 1


def test_what_nothing_needs_is_not_kept_and_what_a_round_needs_is():
    kept = lambda **changes: jax.tree.leaves(  # noqa: E731
        iterated.abstract_state(iterated.prepare(worlds.round_of_sums(**changes))).reference
    )
    assert not kept(losses=(supervised.next_token,)) and kept(begin_round=rounds.restart)


def test_the_description_says_what_a_round_is():
    text = iterated.describe(iterated.prepare(worlds.round_of_sums(begin_round=rounds.restart)))
    assert "16 prompts x 4 completions = 64 rows" in text and "sampled 8 prompts at a time" in text
    assert "12 rows an optimizer step: at most 12 steps" in text
    assert "restart: Training starts again from the reference" in text
