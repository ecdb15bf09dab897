"""The online loop: it learns, a control does not, and it stops, shards and compiles as it says."""

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

from mlrl import meshes, optimizers, runs, scoring  # noqa: E402
from mlrl.costs.work import of_step  # noqa: E402
from mlrl.loops import describe, online, stages  # noqa: E402
from mlrl.losses import policy, regularizers, values  # noqa: E402
from mlrl.models.transformer import Config  # noqa: E402
from mlrl.rewards import graph  # noqa: E402
from mlrl.sampling import Sampling  # noqa: E402
from mlrl.types import Refused  # noqa: E402

QUIET = runs.Recording(save_every_steps=0, samples_every_steps=0)


def first_token_is_an_even_digit(rollout, prompts):
    """1 where the completion starts with 0, 2, 4, 6 or 8: ids 3, 5, ... of the puzzles' characters."""
    first = rollout.tokens[:, prompts.tokens.shape[1]]
    digit = first - worlds.sums().task.vocabulary.encode("0")[0]
    return ((digit >= 0) & (digit < 10) & (digit % 2 == 0)).astype(jnp.float32)


def train(folder, **changes):
    experiment = worlds.sums(**{"recording": QUIET, "evaluations": (), **changes})
    with runs.Run(folder, experiment.recording) as run:
        state = online.train(experiment, run)
    lines = [json.loads(line) for line in pathlib.Path(folder, "metrics.jsonl").read_text().splitlines()]
    return state, lines


def test_a_reward_is_learned_and_a_random_one_is_not(tmp_path):
    fast = optimizers.adamw(learning_rate=1e-2)
    _, lines = train(tmp_path / "a", reward_fn=first_token_is_an_even_digit, num_steps=40, optimizer=fast)
    start, end = (np.mean([line["reward"] for line in part]) for part in (lines[1:4], lines[-3:]))
    assert start < 0.6 and end > 0.9
    controlled = online.prepare(worlds.sums(reward_fn=graph.random(rate=0.5)))
    assert controlled.reward.in_graph
    _, lines = train(tmp_path / "b", reward_fn=graph.random(rate=0.5), num_steps=40, optimizer=fast)
    assert abs(np.mean([line["reward"] for line in lines[-10:]]) - 0.5) < 0.1


def test_after_the_first_step_nothing_is_compiled_any_more(tmp_path):
    for name, reward in (("graph", worlds.noisy_verifier()), ("host", worlds.first_digit)):
        _, lines = train(tmp_path / name, reward_fn=reward, num_steps=6)
        counts = [line["compilations"] for line in lines[2:]]
        assert len(set(counts)) == 1, f"{name}: {counts}"


def of_host_rewards(**changes):
    """Old log-probs are recomputed, and a reference is read: models have something to say of the rows."""
    losses = (policy.ppo_clip, functools.partial(regularizers.kl_penalty, kl_coef=0.1))
    return worlds.sums(**{"reward_fn": worlds.first_digit, "losses": losses, "num_steps": 3, "evaluations": (),
                          "old_log_probs": scoring.recomputed_log_probs, **changes})  # fmt: skip


def test_models_are_asked_about_rows_before_the_host_has_rewarded_them(tmp_path, monkeypatch):
    order, judge = [], stages.reward_rows

    def noted(parts, compiled=online.jitted):
        programs = compiled(parts)
        annotate = programs["annotate"]
        return programs | {"annotate": lambda *given: order.append("annotate") or annotate(*given)}

    monkeypatch.setattr(online, "jitted", noted)
    monkeypatch.setattr(stages, "reward_rows", lambda *given: order.append("reward") or judge(*given))
    overlapped, lines = train(tmp_path / "a", **vars(of_host_rewards()))
    assert order == ["annotate", "reward"] * 3

    def afterwards(parts, compiled=noted):
        programs = compiled(parts)
        annotate, update = programs["annotate"], programs["update"]
        late = lambda state, *rest: update(state, *rest[:3], annotate(*rest[3]))  # noqa: E731
        return programs | {"annotate": lambda *given: given, "update": late}

    monkeypatch.setattr(online, "jitted", afterwards)
    order.clear()
    in_turn, _ = train(tmp_path / "b", **vars(of_host_rewards()))
    assert order == ["reward", "annotate"] * 3
    worlds.assert_same(overlapped, in_turn)


@pytest.mark.slow  # the test above compares the same in runs
def test_what_models_said_before_the_update_is_what_they_say_in_it():
    parts = online.prepare(of_host_rewards())
    state, prompts = _state(parts), online.prompt_source(parts)(_state(parts), 0)
    rollout = jax.jit(functools.partial(online.sample_rows, parts))(state, prompts)
    rewards, _ = stages.reward_rows(parts, state, rollout, prompts)
    said = jax.jit(functools.partial(online.annotations, parts))(state, prompts, rollout)
    assert jnp.isfinite(said["reference_log_probs"]).all() and jnp.isfinite(said["old_log_probs"]).all()
    learn = jax.jit(functools.partial(online.learn, parts))
    for a, b in zip(jax.tree.leaves(learn(state, prompts, rollout, rewards)[0].params),
                    jax.tree.leaves(learn(state, prompts, rollout, rewards, said)[0].params), strict=True):  # fmt: skip
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(("changes", "first"), [
    ({}, True), ({"max_attempts": 2}, False), ({"steps_ahead": 1}, False),
    ({"losses": (policy.ppo_clip,), "old_log_probs": scoring.sampler_log_probs}, False),
], ids=["asked", "attempts", "ahead", "nothing to ask"])  # fmt: skip
def test_models_are_asked_first_where_rows_stay_and_something_reads_it(changes, first):
    parts = online.prepare(of_host_rewards(**changes))
    programs = online.programs(parts)
    assert ("annotate" in programs) == first
    assert of_step(parts, programs).flops > 0


def test_a_step_with_its_reward_in_the_graph_is_one_program():
    parts = online.prepare(worlds.sums())
    assert parts.reward.in_graph
    state, prompts = online.abstract_state(parts), jax.eval_shape(online.prompt_source(parts), _state(parts), 0)
    text = jax.jit(functools.partial(online.whole_step, parts)).lower(state, prompts).as_text()
    assert "callback" not in text and text.count("func.func public @main") == 1


def _state(parts):
    return online.initial_state(parts)


@pytest.mark.slow  # whole_steps_test and refilled_test compare eight devices with one
def test_a_sharded_step_samples_the_same_tokens_and_learns_the_same():
    def step(devices):
        experiment = worlds.sums(mesh=functools.partial(meshes.mesh, devices=devices))
        parts = online.prepare(experiment)
        with meshes.use(experiment.mesh()):
            state = online.initial_state(parts)
            prompts = online.prompt_source(parts)(state, 0)
            return jax.device_get(jax.jit(functools.partial(online.whole_step, parts))(state, prompts)[::2])

    (one, one_batch), (many, many_batch) = step(1), step(2)
    np.testing.assert_array_equal(one_batch.rollout.tokens, many_batch.rollout.tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one.params, many.params)


def a_loss_that_breaks(scores, batch):
    """Not a number from the third step on, when the policy version says so."""
    broken = jnp.where(jnp.max(batch.rollout.policy_version) >= 2, jnp.nan, 0.0)
    return jnp.sum(batch.weights * jnp.where(batch.mask, scores.log_probs, 0.0)) + broken, {}


def test_a_loss_that_stays_nan_stops_the_run_with_its_batch_and_good_parameters(tmp_path):
    recording = runs.Recording(save_every_steps=1, max_bad_updates=3)
    with pytest.raises(runs.Stopped, match="3 updates in a row.*bad_batch_"):
        train(tmp_path, losses=(a_loss_that_breaks,), minibatches=1, recording=recording)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_updates"] for line in lines[1:]] == [0.0, 0.0, 1.0, 1.0, 1.0]
    (dump,) = tmp_path.glob("bad_batch_*.npz")
    assert np.load(dump)["rollout.tokens"].shape == (32, 7)
    after = worlds.sums(recording=recording, evaluations=(), num_steps=5, losses=(policy.ppo_clip,))
    with runs.Run(tmp_path, recording) as run:
        state = online.train(after, run)  # goes on from the last good parameters
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def closer_to_the_reference(models, rollout, prompts):
    """Minus how far the policy has moved from where it started."""
    moved = models.score(rollout).log_probs - models.reference(rollout).log_probs
    return -jnp.sum(jnp.where(rollout.action_mask, moved, 0.0), axis=1)


def test_a_reward_may_ask_the_policy_and_its_reference(tmp_path):
    state, lines = train(tmp_path, reward_fn=closer_to_the_reference, num_steps=2)
    assert lines[1]["reward"] == pytest.approx(0.0, abs=1e-4) and jax.tree.leaves(state.reference)
    assert not jax.tree.leaves(online.abstract_state(online.prepare(worlds.sums())).reference)


def test_what_cannot_work_together_is_refused_before_compiling():
    cases = [
        ({"losses": ()}, "losses is empty"),
        ({"losses": (policy.ppo_clip, values.value_loss)}, "no value head"),
        ({"sampling": Sampling(top_p=0.9)}, "two different distributions"),
        ({"sampling": Sampling(temperature=0.0)}, "greedy"),
        ({"minibatches": 5}, "32 rows do not divide into minibatches = 5"),
        ({"group_size": 1}, "every advantage would be 0"),
        ({"num_steps": 0}, "num_steps must be a whole number of at least 1"),
        ({"model": Config(vocabulary_size=5)}, "vocabulary_size is 5"),
        ({"mesh": functools.partial(meshes.mesh, devices=3)}, "do not divide over 3 devices"),
        ({"mesh": functools.partial(meshes.mesh, devices=99)}, "only 8 devices"),
        ({"mesh": functools.partial(meshes.mesh, data=1, expert=8)}, "mesh.expert is 8, but the model has no experts"),
        ({"mesh": functools.partial(meshes.mesh, data=1, tensor=8), "prompts_per_step": 6, "minibatches": 1,
          "rollout_mesh": meshes.rearranged}, "6 prompts or rows a step do not divide over 8 devices"),
    ]
    for changes, words in cases:
        with pytest.raises(Refused, match=words):
            online.prepare(worlds.sums(**changes))
    online.prepare(worlds.sums(sampling=Sampling(top_p=0.9), old_log_probs=scoring.recomputed_log_probs))


def test_the_description_says_what_a_step_is():
    text = online.describe(online.prepare(worlds.sums()))
    assert "8 prompts x 4 completions = 32 rows" in text
    assert "1 epoch(s) x 2 minibatch(es) = 2 optimizer step(s) of 16 rows" in text
    assert "nothing is clipped" not in text
    assert "arithmetic 1" in text  # the reward of a demonstration
    assert "the policy that sampled is 1, so that nothing is clipped" in online.describe(
        online.prepare(worlds.sums(minibatches=1)))  # fmt: skip


@pytest.mark.parametrize("chunks, columns, vocabulary", [
    ({}, 3, 24), ({"score_chunk_columns": 2}, 2, 24), ({"score_chunk_columns": 8, "score_chunk_vocabulary": 4}, 3, 4)])
def test_the_description_counts_the_logits_that_are_there_at_once(chunks, columns, vocabulary):
    model = dataclasses.replace(worlds.TINY, vocabulary_size=24)
    experiment = worlds.sums(model=model, **chunks)
    state = online.abstract_state(online.prepare(experiment))
    told = lambda reads: describe.the_memory(  # noqa: E731
        experiment, model, state, rows=32, columns=8, scored=3, update_rows=1600, reads=reads)
    counted = lambda columns, vocabulary: (  # noqa: E731
        f"logits of an update (fp32) {describe.mebibytes(4 * 1600 * columns * vocabulary)}")
    assert counted(columns, vocabulary) in told({"Batch.values"})
    assert counted(3, 24) in told({"Scores.logits"})  # a distribution is read whole


def test_a_reward_that_turns_nan_in_the_run_stops_it(tmp_path):
    def fades(rollout, prompts):
        return jnp.where(rollout.policy_version >= 2, jnp.nan, 1.0)

    with pytest.raises(runs.Stopped, match="step 3 has no reward for 100% of its rows .unscored/fades."):
        train(tmp_path, reward_fn=fades, num_steps=6)
