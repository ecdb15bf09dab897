"""The offline loop on stored preferences: what it learns from, what it refuses, what it measures."""

import dataclasses
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import worlds  # noqa: E402

from mlrl import advantages, packing, reductions, runs, scoring, stored, vocabularies  # noqa: E402
from mlrl.evaluation import Evaluation  # noqa: E402
from mlrl.evaluation_stored import StoredEvaluation  # noqa: E402
from mlrl.evaluation_stored import pairs as judged_pairs  # noqa: E402
from mlrl.evaluation_stored import steps as judged_steps  # noqa: E402
from mlrl.loops import checks, offline, online  # noqa: E402
from mlrl.losses import policy, preference, reward_models  # noqa: E402
from mlrl.rewards import graph  # noqa: E402
from mlrl.tasks import pairs, preferences, puzzles, tables  # noqa: E402
from mlrl.types import Refused  # noqa: E402

DATA = pathlib.Path(__file__).resolve().parents[2].parent / "shared" / "data"
SUMS = pairs.against_corrupted(puzzles.arithmetic(digits=1))
HELD_OUT = pairs.against_corrupted(puzzles.arithmetic(digits=1, split="test"), name="held_out")
VALUED = dataclasses.replace(worlds.TINY, value_head=True)


def dpo(**changes):
    settings = dict(
        task=SUMS, num_steps=1, losses=(preference.dpo,), rows_fn=stored.candidates, model=worlds.TINY, rows_per_step=8,
        reduction=reductions.sequence_mean_token_mean, rollout_fn=worlds.ROLLOUT, mesh=worlds.ONE_DEVICE,
        recording=runs.Recording(save_every_steps=0, samples_every_steps=0),
    )  # fmt: skip
    return offline.Experiment(**{**settings, **changes})


def trained(experiment, folder):
    with runs.Run(folder, experiment.recording) as run:
        offline.train(experiment, run)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, json.loads((folder / "results.json").read_text())["evaluations"] if experiment.evaluations else []


def test_dpo_learns_to_tell_pairs_apart_and_its_judgement_is_measured(tmp_path):
    experiment = dpo(
        num_steps=30, losses=(functools.partial(preference.dpo, beta=1.0),), rows_per_step=32, minibatches=2,
        evaluations=(StoredEvaluation(SUMS, functools.partial(
            judged_pairs, reward_fn=functools.partial(preference.implicit_reward, beta=1.0)), prompts=32),),
        optimizer=offline.optimizers.adamw(learning_rate=3e-3),
    )  # fmt: skip
    lines, results = trained(experiment, tmp_path)
    before, after = (entry["metrics"] for entry in results)
    assert before["accuracy"]["value"] == 0.5 and before["log_loss"]["value"] == pytest.approx(np.log(2))  # all ties
    assert after["accuracy"]["value"] > 0.6 and after["log_loss"]["value"] < before["log_loss"]["value"]
    assert set(after) == {"accuracy", "log_loss", "brier", "calibration_error"}
    assert all(set(r) == {"value", "low", "high", "prompts"} for r in after.values())
    assert lines[-1]["loss/dpo"] < np.log(2) < lines[1]["loss/dpo"] + 0.01


def test_kto_s_sign_and_reference_point_are_of_the_policy_before_the_update():
    experiment = dpo(losses=(preference.kto,), rows_fn=stored.ratings, advantage_fn=advantages.kto)
    parts = offline.prepare(experiment)
    assert {"Batch.old_log_probs", "Batch.reference_log_probs"} <= parts.reads and parts.unit_rows == 1
    state = offline.initial_state(parts)
    moved = state.replace(params=jax.tree.map(lambda x: 1.5 * x, state.params))  # apart from the reference
    rows = jax.jit(lambda: offline._rows(parts, state.key, 0))()
    _, metrics, batch = jax.jit(functools.partial(offline.learn, parts))(moved, rows)
    np.testing.assert_array_equal(jnp.sign(batch.advantages.sum(axis=1)), [1, -1] * 4)
    score = jax.jit(lambda params: scoring.score(parts.model, params, rows.rollout).log_probs)
    now, then = score(moved.params), score(state.params)
    delta = np.where(batch.mask, now - then, 0.0).sum(axis=1)
    point = max(0.0, delta.mean())
    np.testing.assert_allclose(np.asarray(batch.returns)[np.asarray(batch.mask)], point, atol=1e-5)
    signed = np.asarray([1, -1] * 4) * 0.1 * (delta - point)
    np.testing.assert_allclose(metrics["loss/kto"], (1 - 1 / (1 + np.exp(-signed))).mean(), rtol=1e-4)


def test_labelled_steps_teach_a_process_reward_model():
    chains = pairs.against_corrupted(puzzles.arithmetic(digits=1, operands=3, scratchpad=True), separator=",")
    experiment = dpo(
        task=chains, losses=(reward_models.step_labels,), rows_fn=stored.labelled_steps, model=VALUED,
        reduction=reductions.token_mean, evaluations=(StoredEvaluation(chains, judged_steps, prompts=16),),
    )  # fmt: skip
    parts = offline.prepare(experiment)
    state = offline.initial_state(parts)
    rows = jax.jit(lambda: offline._rows(parts, state.key, 0))()
    after, metrics, _ = jax.jit(functools.partial(offline.learn, parts))(state, rows)
    assert float(metrics["loss/reward_model"]) == pytest.approx(np.log(2), abs=0.2) and metrics["grad_norm"] > 0
    evaluate = offline.evaluator(parts, experiment.evaluations)
    assert evaluate(after.params, 0, 1)[chains.name]["accuracy"]["prompts"] == 16


PLAIN = dict(rows_fn=stored.demonstrations)
CROOKED = dict(rows_fn=lambda *args: _with_group(stored.candidates(*args), [0, 1, 0, 1, 2, 3, 2, 3]))


def _with_group(batch, group):
    return batch.replace(rollout=batch.rollout.replace(group=jnp.asarray(group, jnp.int32)))


@pytest.mark.parametrize(
    "changes, words",
    [
        (PLAIN, "every group has one row: set Experiment.rows_fn = @stored.candidates"),
        (PLAIN | dict(losses=(reward_models.bradley_terry,), model=VALUED), "every group has one row"),
        (CROOKED, "rows_fn mixes them"),
        (dict(rows_per_step=7), "7 rows do not divide into them"),
        (dict(minibatches=8), "compares the 2 rows of a group, and a minibatch of 1 rows"),
        (dict(micro_batch_rows=1), "a micro-batch of 1 rows does not hold whole groups"),
        (dict(losses=(reward_models.bradley_terry,)), "no value head"),
        (dict(losses=(reward_models.step_labels,), rows_fn=stored.labelled_steps), "no value head"),
        (dict(losses=(preference.kto,)), "Batch.advantages, which stored rows do not have: set"),
        (dict(losses=(policy.ppo_clip,)), "Batch.advantages, which stored rows do not have"),
        (dict(losses=(preference.kto,), advantage_fn=advantages.kto, old_log_probs=scoring.sampler_log_probs),
         "nobody sampled stored rows"),
        (dict(losses=(preference.kto,), advantage_fn=advantages.gae), "no value head"),
        (dict(task=puzzles.arithmetic(digits=1)), "no stored completions"),
        (dict(evaluations=(StoredEvaluation(puzzles.arithmetic(digits=1), prompts=4),)), "no stored completions"),
        (dict(losses=(preference.simpo,), evaluations=(StoredEvaluation(HELD_OUT, prompts=4),)), "reads the reference"),
        (dict(evaluations=(StoredEvaluation(HELD_OUT, judged_steps, prompts=4),)), "no value head"),
    ],
)  # fmt: skip
def test_what_cannot_teach_is_refused_before_compiling(changes, words):
    with pytest.raises(Refused, match=words):
        offline.prepare(dpo(**changes))


def test_online_pairs_need_company():
    alone = worlds.sums(losses=(preference.dpo,), group_size=1, advantage_fn=advantages.reinforce)
    with pytest.raises(Refused, match="every group has one row: set Experiment.group_size to 2 or more"):
        online.prepare(alone)
    with pytest.raises(Refused, match="compares the 4 rows of a group, and a minibatch of 2 rows"):
        online.prepare(worlds.sums(losses=(preference.dpo,), minibatches=16))
    assert online.prepare(worlds.sums(losses=(preference.dpo,))).unit_rows == 4
    assert online.prepare(worlds.sums()).unit_rows == 1


def test_groups_are_read_from_the_rows():
    assert checks.rows_of_a_group(np.asarray([0, 0, 0, 1, 1, 1])) == 3
    assert checks.rows_of_a_group(np.asarray([4, 4])) == 2 and checks.rows_of_a_group(np.asarray([0, 1])) == 1
    for mixed in ([0, 1, 0, 1], [0, 0, 1], [0, 0, 1, 2], [0, 0, 1, 1, 0, 0]):
        with pytest.raises(Refused, match="side by side"):
            checks.rows_of_a_group(np.asarray(mixed))


def test_what_a_step_is_in_words():
    assert "8 stored rows of 7 columns, 4 prompts" in offline.describe(offline.prepare(dpo()))


def test_a_step_of_dpo_on_real_dialogues(tmp_path):
    path = DATA / "hh_rlhf" / "harmless_base_test.jsonl.gz"
    if not path.exists():
        pytest.skip(f"there is no {path}")
    task = preferences.read(
        path, vocabularies.byte_level(), row_fn=preferences.hh_rlhf, max_prompt_tokens=64, max_target_tokens=48,
        on_long_prompt=tables.drop_long, on_long_target=tables.drop_long,
    )  # fmt: skip
    held_out = Evaluation(puzzles.arithmetic(digits=1, split="test", vocabulary=task.vocabulary), graph.arithmetic, 4)
    lines, results = trained(dpo(task=task, evaluations=(held_out, StoredEvaluation(task, prompts=4))), tmp_path)
    assert lines[-1]["loss/dpo"] == pytest.approx(np.log(2)) and lines[-1]["grad_norm"] > 0
    assert {entry["task"] for entry in results} == {task.name, held_out.task.name}


def test_packed_rows_train_as_padded_ones():
    def learned(**changes):
        parts = offline.prepare(dpo(**changes))
        state = offline.initial_state(parts)
        rows = jax.jit(lambda: offline._rows(parts, state.key, 0))()
        room = bool(packing.lay_out(rows.rollout.valid, 6, 16).fits)
        return room, jax.jit(functools.partial(offline.learn, parts))(state, rows)[1]

    room, found = learned(score_fn=functools.partial(packing.score, rows=6, columns=16))
    wanted = learned()[1]
    assert room
    for name in ("loss", "grad_norm", "entropy"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, err_msg=name)
