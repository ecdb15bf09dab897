"""Where parameters come from: another run, a teacher; and what a student learns of one."""

import dataclasses
import functools
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import worlds  # noqa: E402

from mlrl import advantages, optimizers, runs  # noqa: E402
from mlrl.loops import offline, online, start  # noqa: E402
from mlrl.losses import distillation, policy, values  # noqa: E402
from mlrl.models.transformer import Config  # noqa: E402
from mlrl.types import Refused  # noqa: E402

QUIET = runs.Recording(save_every_steps=0, samples_every_steps=0)
WIDE = dataclasses.replace(worlds.TINY, width=24)


def unlike(model, key):
    """Random parameters, larger than usual: a teacher with opinions."""
    return jax.tree.map(lambda x: 3.0 * x, start.random_parameters(model, key))


def finished(loop, experiment, folder):
    with runs.Run(folder, experiment.recording) as run:
        state = loop.train(experiment, run)
    return state, [json.loads(line) for line in pathlib.Path(folder, "metrics.jsonl").read_text().splitlines()]


def test_a_run_starts_where_another_ended_and_its_value_head_at_random(tmp_path):
    state, _ = finished(online, worlds.sums(num_steps=1, evaluations=(), recording=QUIET), tmp_path)
    from_there = start.from_run(run_dir=str(tmp_path))
    parts = online.prepare(worlds.sums())
    jax.tree.map(np.testing.assert_array_equal, from_there(parts.model, jax.random.key(1)), state.params)
    of_seed = start.from_run(run_dir=str(tmp_path.parent / "{seed}"), seed=tmp_path.name)
    jax.tree.map(np.testing.assert_array_equal, of_seed(parts.model, jax.random.key(1)), state.params)
    valued = online.prepare(worlds.sums(model=dataclasses.replace(worlds.TINY, value_head=True)))
    assert "value" in from_there(valued.model, jax.random.key(1))
    other = online.prepare(worlds.sums(model=WIDE))
    with pytest.raises(Refused, match="float32.16.*but this run has it as float32.24"):
        from_there(other.model, jax.random.key(1))
    with pytest.raises(Refused, match="holds no complete checkpoint to start from"):
        start.from_run(run_dir=str(tmp_path / "nowhere"))


def test_a_value_head_of_the_same_shape_is_taken_over(tmp_path):
    valued = dataclasses.replace(worlds.TINY, value_head=True)
    experiment = worlds.sums(num_steps=1, evaluations=(), recording=QUIET, model=valued, advantage_fn=advantages.gae,
                             losses=(policy.ppo_clip, values.clipped_value_loss))  # fmt: skip
    state, _ = finished(online, experiment, tmp_path)
    from_there, model = start.from_run(run_dir=str(tmp_path)), online.prepare(experiment).model
    assert float(abs(state.params["value"]["kernel"]).max()) > 0
    jax.tree.map(np.testing.assert_array_equal, from_there(model, jax.random.key(1)), state.params)
    with_critic = online.prepare(worlds.sums(model=dataclasses.replace(valued, critic_layers=1))).model
    assert "value" not in from_there(with_critic, jax.random.key(1)), "a critic is no value head: it starts at random"


def test_a_student_comes_to_speak_like_its_teacher_offline(tmp_path):
    """Whole distributions, on stored rows; the teacher is wider than the student."""
    base = worlds.sums()
    experiment = offline.Experiment(
        task=base.task, num_steps=60, losses=(distillation.match,), model=worlds.TINY, rows_per_step=16,
        reference=start.teacher(model=WIDE, start=unlike), optimizer=optimizers.adamw(learning_rate=2e-2),
        mesh=worlds.ONE_DEVICE, recording=QUIET,
    )  # fmt: skip
    state, lines = finished(offline, experiment, tmp_path)
    first, last = lines[1]["divergence/teacher"], lines[-1]["divergence/teacher"]
    assert first > 0.1 and last < 0.5 * first
    assert state.reference["embedding"]["embedding"].shape[1] == 24


def test_on_policy_distillation_of_the_likeliest_tokens_and_kdrl_run(tmp_path):
    teacher = start.teacher(model=WIDE, start=unlike)
    reverse = functools.partial(distillation.match, divergence=distillation.reverse_kl)
    experiment = worlds.sums(reference=teacher, reference_tokens=4, losses=(reverse,), minibatches=1, num_steps=2,
                             evaluations=(), recording=QUIET)  # fmt: skip
    _, lines = finished(online, experiment, tmp_path / "tokens")
    assert lines[1]["divergence/teacher"] > 0 and lines[1]["grad_norm"] > 0
    parts = online.prepare(worlds.sums(reference=teacher, losses=(policy.ppo_clip, distillation.teacher_kl)))
    assert parts.reference_model.config.width == 24 and "Scores.logits" not in parts.reads


def test_a_teacher_of_another_vocabulary_is_refused():
    other = start.teacher(model=Config(vocabulary_size=999), start=unlike)
    with pytest.raises(Refused, match="the teacher has 999 ids and the policy"):
        online.prepare(worlds.sums(reference=other))
