"""Absolute Zero as a run: the buffer of proposals is state, and resumes with the rest."""

import dataclasses
import functools
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "loops"))

from worlds import ONE_DEVICE, TINY, assert_same, logged  # noqa: E402

from mlrl import advantages, optimizers, runs, scoring  # noqa: E402
from mlrl.loops import online  # noqa: E402
from mlrl.losses import policy  # noqa: E402
from mlrl.rewards import absolute_zero  # noqa: E402
from mlrl.rollouts.propose_and_solve import propose_and_solve  # noqa: E402
from mlrl.rollouts.single_turn import single_turn  # noqa: E402
from mlrl.sampling import Sampling  # noqa: E402
from mlrl.tasks import triplets  # noqa: E402


def proposing(prompts, reward_state, task):
    """`recall`, and what the buffer held then, for the test to look at."""
    counts.append(np.asarray(reward_state["count"]).tolist())
    return absolute_zero.recall(prompts, reward_state, task)


counts = []


def always_valid(model, params, prompts, key, **given):
    """A sampler that copies the reference of a deduction prompt: a proposal that is valid, whatever the weights."""
    rollout = single_turn(model, params, prompts, key, max_completion_tokens=8, **given)
    copied = np.array([*triplets.VOCABULARY.encode("x=x+1#2"), triplets.VOCABULARY.eos_ids[0]])
    width = prompts.tokens.shape[1]
    if given["group_size"] > 1:
        return rollout
    mask = rollout.action_mask.at[:, width:].set(True)
    return rollout.replace(tokens=rollout.tokens.at[:, width:].set(copied), action_mask=mask,
                           valid=rollout.valid.at[:, width:].set(True))  # fmt: skip


EXPERIMENT = online.Experiment(
    task=dataclasses.replace(triplets.propose(prompt_tokens=20), rates=(1.0, 0.0, 0.0)),
    reward_fn=absolute_zero.absolute_zero(width=20, capacity=16), prompts_fn=proposing, num_steps=4, model=TINY,
    losses=(policy.ppo_clip,), prompts_per_step=2, group_size=3, mesh=ONE_DEVICE, forward=scoring.whole_rows(),
    rollout_fn=functools.partial(propose_and_solve, rollout_fn=always_valid), sampling=Sampling(),
    advantage_fn=advantages.task_relative, optimizer=optimizers.adamw(learning_rate=1e-2),
    recording=runs.Recording(save_every_steps=2, samples_rows=1),
)  # fmt: skip


def train(folder, **changes):
    experiment = dataclasses.replace(EXPERIMENT, **changes)
    with runs.Run(folder, experiment.recording) as run:
        return online.train(experiment, run)


def test_the_buffer_grows_is_read_and_resumes_bitwise(tmp_path):
    counts.clear()
    whole = train(tmp_path / "whole")
    assert counts == [[1, 1, 1], [3, 1, 1], [5, 1, 1], [7, 1, 1]]
    assert np.asarray(whole.reward["count"]).tolist() == [9, 1, 1]
    assert triplets.texts_of(np.asarray(whole.reward["texts"])[0, :3]) == ["x=x#1", "x=x+1#2", "x=x+1#2"]
    lines = logged(tmp_path / "whole")
    assert [line["reward/propose/valid"] for line in lines[1:]] == [1.0] * 4
    assert [line["reward/propose/new"] for line in lines[1:]] == [0.5, 0.0, 0.0, 0.0]
    assert lines[-1]["unreadable_share"] == 0.0
    train(tmp_path / "parts", num_steps=2)
    assert_same(whole, train(tmp_path / "parts"))
