"""Frozen reward models in a run: trained by one run, asked by the rewards of another, whole in its state."""

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

from mlrl import checkpoints, meshes, reductions, runs, scoring, stored  # noqa: E402
from mlrl.loops import iterated, offline, online, start, states  # noqa: E402
from mlrl.losses import policy, reward_models  # noqa: E402
from mlrl.models.transformer import Config, Transformer, initialize  # noqa: E402
from mlrl.rewards import combinators, graph, learned  # noqa: E402
from mlrl.tasks import pairs, puzzles  # noqa: E402
from mlrl.types import Refused  # noqa: E402

# Not of the policy's shape.
JUDGE = dataclasses.replace(worlds.TINY, width=24, value_head=True)
QUIET = runs.Recording(save_every_steps=0, samples_every_steps=0)


def finished(loop, experiment, folder):
    with runs.Run(folder, experiment.recording) as run:
        return loop.train(experiment, run)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """The run folder of a reward model of sums."""
    folder = tmp_path_factory.mktemp("judge")
    finished(offline, offline.Experiment(
        task=pairs.against_corrupted(puzzles.arithmetic(digits=1)), num_steps=3, losses=(reward_models.bradley_terry,),
        rows_fn=stored.candidates, model=JUDGE, rows_per_step=16, reduction=reductions.sequence_mean_token_mean,
        optimizer=offline.optimizers.adamw(learning_rate=1e-2), mesh=worlds.ONE_DEVICE, recording=QUIET,
    ), folder)  # fmt: skip
    return str(folder)


def judged(judge, **changes):
    """Sums whose reward is the reward model's, with the truth beside it."""
    reward = combinators.weighted_sum([graph.arithmetic, learned.score], [0.0, 1.0])
    frozen = (start.reward_model(model=JUDGE, run_dir=judge),)
    settings = dict(reward_fn=reward, reward_models=frozen, num_steps=3, evaluations=(), recording=QUIET)
    return worlds.sums(**{**settings, **changes})


def test_rows_earn_what_the_trained_model_says_of_them(judge):
    parts = online.prepare(judged(judge))
    state = online.initial_state(parts)
    prompts = online.prompt_source(parts)(state, 0)
    _, _, batch = jax.jit(functools.partial(online.whole_step, parts))(state, prompts)
    model = Transformer(dataclasses.replace(JUDGE, vocabulary_size=parts.model.config.vocabulary_size))
    shapes = jax.eval_shape(functools.partial(initialize, model), jax.random.key(0))
    params = checkpoints.restore_params(pathlib.Path(judge, "checkpoints"), shapes)
    assert float(jnp.abs(params["value"]["kernel"]).max()) > 0, "the value head starts at zero and was trained"
    values = scoring.score(model, params, batch.rollout).values
    expected = reductions.row_last(values, batch.rollout.action_mask)
    np.testing.assert_allclose(batch.rewards.tokens.sum(axis=1), expected, atol=1e-5)
    assert float(jnp.std(expected)) > 0
    np.testing.assert_array_equal(np.isin(batch.rewards.outcome, (0.0, 1.0)), True)  # the verifier's


def test_it_stays_as_it_is_and_a_run_with_it_resumes(judge, tmp_path):
    first = online.initial_state(online.prepare(judged(judge))).reward_models
    whole = finished(online, judged(judge), tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, first, whole.reward_models)
    finished(online, judged(judge, num_steps=1), tmp_path / "parts")
    worlds.assert_same(whole, finished(online, judged(judge), tmp_path / "parts"))


def test_rounds_ask_it_too(judge, tmp_path):
    given = judged(judge)
    experiment = worlds.round_of_sums(reward_fn=given.reward_fn, reward_models=given.reward_models, num_rounds=1)
    state = finished(iterated, experiment, tmp_path)
    assert int(state.step) == 1 and len(state.reward_models) == 1
    (line,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][1:]
    assert line["reward/score"] != 0


def test_a_reward_on_the_host_stands_beside_it(judge, tmp_path):
    both = combinators.weighted_sum([worlds.first_digit, learned.score], [1.0, 1.0])
    finished(online, judged(judge, reward_fn=both, num_steps=1), tmp_path)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["reward/score"] != 0 and "reward/first_digit" in line


def test_it_is_split_over_a_mesh_as_the_policy_is(judge):
    split = functools.partial(meshes.mesh, data=1, fsdp=8)
    parts = online.prepare(judged(judge, mesh=split, prompts_per_step=8))
    with meshes.use(split()):
        (params,) = online.initial_state(parts).reward_models
    kernel = params["mlps_0"]["down"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[1] == kernel.shape[1] // 8
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shapes((params,)) == shapes(states.abstract_state(parts).reward_models)


@pytest.mark.parametrize(("change", "words"), [
    (dict(reward_fn=graph.arithmetic), r"no reward asks reward model 0 of the 1 in Experiment.reward_models"),
    (dict(reward_models=()), "learned.score asks reward model 0, and the experiment has 0"),
    (dict(reward_models=(start.own_start,)), r"Experiment.reward_models\[0\] must be a FrozenModel, as @start"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_compiling(judge, change, words):
    with pytest.raises(Refused, match=words):
        online.prepare(judged(judge, **change))


def test_a_model_that_cannot_judge_is_refused(judge, tmp_path):
    with pytest.raises(Refused, match="holds no complete checkpoint of a reward model: train it first"):
        start.reward_model(model=JUDGE, run_dir=str(tmp_path))
    with pytest.raises(Refused, match="set Config.value_head of start.reward_model.model"):
        start.reward_model(model=worlds.TINY, run_dir=judge)
    other = start.reward_model(model=dataclasses.replace(JUDGE, vocabulary_size=999), run_dir=judge)
    with pytest.raises(Refused, match="the reward model has 999 ids and the policy"):
        online.prepare(judged(judge, reward_models=(other,)))
    wider = start.reward_model(model=dataclasses.replace(JUDGE, width=32), run_dir=judge)
    with pytest.raises(Refused, match="float32.24.*but this run has it as float32.32"):
        online.initial_state(online.prepare(judged(judge, reward_models=(wider,))))


def test_a_folder_s_classifier_judges_a_run(tmp_path):
    """transformers' kind of reward model, in bfloat16, read behind the EOS."""
    from safetensors.numpy import load_file, save_file

    from mlrl.models import pretrained

    config = dataclasses.replace(worlds.TINY, vocabulary_size=puzzles.arithmetic(digits=1).vocabulary.size)
    pretrained.write(tmp_path, initialize(Transformer(config), jax.random.key(3)), config)
    file, settings = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    score = np.random.default_rng(0).normal(size=(1, config.width)).astype(np.float32)
    save_file(load_file(file) | {"score.weight": score}, file)
    name = settings["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")
    (tmp_path / "config.json").write_text(json.dumps(settings | {"architectures": [name]}))
    frozen = (start.pretrained_reward_model(path=str(tmp_path), base=Config(param_dtype="bfloat16")),)
    reward = functools.partial(learned.score, read=learned.behind_last_action)
    experiment = worlds.sums(reward_fn=reward, reward_models=frozen, num_steps=1, evaluations=(), recording=QUIET)
    state = finished(online, experiment, tmp_path / "run")
    assert state.reward_models[0]["embedding"]["embedding"].dtype == jnp.bfloat16
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["reward/score"] != 0


def test_losses_of_the_whole_method_see_it(judge):
    """rlhf.gin's parts: PPO's loss on advantages of the learned reward less a KL."""
    from mlrl import advantages

    credit = functools.partial(advantages.kl_in_reward, advantage_fn=advantages.gae, kl_coef=0.1)
    valued = dataclasses.replace(worlds.TINY, value_head=True)
    parts = online.prepare(judged(judge, advantage_fn=credit, losses=(policy.ppo_clip,), model=valued))
    assert {"Batch.values", "Batch.reference_log_probs", "TrainState.reward_models[0]"} <= parts.reads
