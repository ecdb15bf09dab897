"""Runs with adapters: they learn over one frozen base, resume, begin from each other, and end as plain weights."""

import dataclasses
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import worlds  # noqa: E402

from mlrl import checkpoints, optimizers, runs, selection  # noqa: E402
from mlrl.loops import describe, iterated, offline, online, rounds, start  # noqa: E402
from mlrl.losses import policy, preference, regularizers  # noqa: E402
from mlrl.models import lora  # noqa: E402
from mlrl.models.transformer import Transformer, initialize, without_adapters  # noqa: E402
from mlrl.types import Refused  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_once")
QUIET = runs.Recording(save_every_steps=0, samples_every_steps=0)
LORA = dataclasses.replace(worlds.TINY, lora_rank=4, lora_alpha=8.0)
INT8 = dataclasses.replace(LORA, param_dtype="int8")
FAST = optimizers.adamw(learning_rate=2e-2)
LOSSES = (policy.ppo_clip, functools.partial(regularizers.kl_penalty, kl_coef=0.01))


def even_digit(rollout, prompts):
    """1 where the completion starts with an even digit."""
    digit = rollout.tokens[:, prompts.tokens.shape[1]] - worlds.sums().task.vocabulary.encode("0")[0]
    return ((digit >= 0) & (digit < 10) & (digit % 2 == 0)).astype(jnp.float32)


def opinionated(model, key):
    """Random parameters with a larger embedding: under a frozen head of the usual size no token can become likely."""
    params = start.random_parameters(model, key)
    return params | {"embedding": jax.tree.map(lambda x: 20 * x, params["embedding"])}


def sums(**changes):
    settings = dict(
        model=INT8, start=opinionated, reward_fn=even_digit, optimizer=FAST, evaluations=(), recording=QUIET,
        losses=LOSSES,
    )  # fmt: skip
    return worlds.sums(**settings | changes)


def changed(parts, model, **changes):
    """The parts of another experiment, which are not checked again."""
    config = dataclasses.replace(model, vocabulary_size=parts.model.config.vocabulary_size)
    experiment = dataclasses.replace(parts.experiment, model=model, **changes)
    reference = experiment.reference.model(Transformer(config))
    return dataclasses.replace(parts, experiment=experiment, model=Transformer(config), reference_model=reference)


def train(loop, experiment, folder):
    with runs.Run(folder, experiment.recording) as run:
        state = loop.train(experiment, run)
    return state, worlds.logged(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 24 steps: its experiment, its parts, its last state, its log and its folder."""
    folder, experiment = tmp_path_factory.mktemp("trained"), sums()
    state, lines = train(online, experiment, folder)
    return experiment, online.prepare(experiment), state, lines, folder


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_adapters_learn_and_the_base_does_not_move(trained):
    experiment, parts, state, lines, _ = trained
    assert lines[1]["reward"] < 0.5 and np.mean([line["reward"] for line in lines[-3:]]) > 0.8
    first = online.initial_state(parts)
    same(first.frozen, state.frozen)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), first.params, state.params)
    assert all(jax.tree.leaves(moved))


def test_the_state_holds_the_base_once_and_moments_of_the_adapters_alone(trained):
    _, parts, state, _, _ = trained
    whole = lora.policy(state)
    off = functools.partial(initialize, without_adapters(parts.model))
    base = describe.size(jax.eval_shape(off, jax.random.key(0)))
    adapters = describe.size(state.params)
    assert {path[-1] for path in traverse_util.flatten_dict(state.params)} == {"lora_a", "lora_b"}
    assert describe.size(whole) == adapters + describe.size(state.frozen)
    assert base <= describe.size(state.frozen) <= base + 4 * 4  # and four scales
    assert describe.size(state.reference) == adapters
    assert 2 * adapters <= describe.size(state.opt_state) <= 2 * adapters + 64
    held = {id(leaf) for leaf in jax.tree.leaves(state)}
    of_reference = jax.tree.leaves(lora.reference(state))
    assert all(id(leaf) in held for leaf in of_reference), "the reference is made of the state's own arrays"
    shared = {id(leaf) for leaf in jax.tree.leaves(whole)} & set(map(id, of_reference))
    assert shared == {id(leaf) for leaf in jax.tree.leaves(state.frozen)}
    told = describe.the_model(parts.model.config, state)
    assert f"{adapters // 4:,} of the parameters are trained, with adapters of rank 4 on qkv, out, gate_up" in told


def test_the_reference_says_what_the_start_said(trained):
    """The trained policy's own reference and the base with its adapters off: both are the policy before step one."""
    _, parts, state, _, _ = trained
    first = online.initial_state(parts)
    off = changed(parts, INT8, reference=start.frozen_base())
    assert online.initial_state(off).reference == {}
    prompts = online.prompt_source(parts)(state, 0)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time
    def annotated(state, first):
        rollout = online.sample_rows(parts, state, prompts)
        rewards, _ = online.stages.reward_rows(parts, state, rollout, prompts)
        score = functools.partial(online.stages.score, parts, prompts.tokens.shape[1])
        batch = online.unannotated(rollout, rewards)
        said = [online.stages.annotate(p, s, batch, score).reference_log_probs
                for p, s in ((parts, state), (off, state.replace(reference={})))]  # fmt: skip
        return said, *(score(parts.model, lora.policy(s), rollout).log_probs for s in (first, state))

    (own, base), before, after = annotated(state, first)
    np.testing.assert_allclose(own, before, atol=1e-6)
    np.testing.assert_allclose(base, before, atol=1e-6)
    assert jnp.abs(after - before).max() > 0.5


def test_n_steps_are_k_and_the_rest_bitwise(trained, tmp_path):
    _, _, state, lines, _ = trained
    train(online, sums(num_steps=9), tmp_path)
    resumed, others = train(online, sums(), tmp_path)
    worlds.assert_same(state, resumed)
    assert lines == others


def test_a_run_goes_on_with_the_adapters_of_another(trained, tmp_path):
    experiment, parts, state, _, folder = trained
    from_there = start.from_run(run_dir=str(folder))
    same(from_there(parts.model, jax.random.key(1)), lora.policy(state))
    for other in (dict(lora_rank=2), dict(lora_rank=0, param_dtype="float32"), dict(lora_kernels=("out",))):
        with pytest.raises(Refused, match="has adapters on down, gate_up, out, qkv, and this model has them on"):
            from_there(changed(parts, dataclasses.replace(INT8, **other)).model, jax.random.key(1))


def test_adapters_over_what_a_run_without_any_ended_with(trained, tmp_path):
    _, parts, *_ = trained
    state = online.initial_state(changed(parts, worlds.TINY))
    manager = checkpoints.open_manager(tmp_path / "checkpoints")
    checkpoints.save(manager, 0, state)
    checkpoints.close(manager)
    for model in (LORA, INT8):
        like = changed(parts, model).model
        begun = start.from_run(run_dir=str(tmp_path))(like, jax.random.key(1))
        flat = traverse_util.flatten_dict(lora.split(begun)[0])
        assert len(flat) == 8 and all(x.any() == (path[-1] == "lora_a") for path, x in flat.items())
        same(begun, lora.adapted(state.params, like, jax.random.key(1)))
        if model is LORA:
            same(lora.merge(begun, like.config)[0], state.params)


def test_a_warm_start_trains_adapters_that_the_run_goes_on_with_from_a_reference_of_its_own(trained):
    _, parts, *_ = trained
    warm = offline.Experiment(task=parts.experiment.task, num_steps=1, rows_per_step=8, rollout_fn=worlds.ROLLOUT,
                              optimizer=FAST, mesh=worlds.ONE_DEVICE, model=worlds.TINY)  # fmt: skip
    parts = changed(parts, INT8, start=offline.warm_start(experiment=warm))
    state = online.initial_state(parts)
    b = state.params["attentions_0"]["qkv"]["lora_b"]
    assert b.any() and state.frozen["mlps_0"]["down"]["kernel"]["int8"].dtype == jnp.int8
    same(state.reference, state.params)
    shapes = lambda s: jax.tree.map(lambda x: (x.shape, x.dtype), s)  # noqa: E731
    assert shapes(state) == shapes(online.abstract_state(parts))


def test_a_critic_is_trained_whole_in_fp32_and_may_begin_as_the_merged_policy(trained):
    model = dataclasses.replace(INT8, value_head=True, critic_layers=1)
    parts = changed(trained[1], model, start=start.critic_from_policy())
    state = online.initial_state(parts)
    assert set(state.params) == {"attentions_0", "mlps_0", "critic"}
    assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {"float32"}
    whole, _ = lora.merge(lora.policy(state), parts.model.config)
    same({name: part for name, part in whole["critic"].items() if name != "value"},
         {name: part for name, part in whole.items() if name not in ("critic", "head")})  # fmt: skip


def test_rounds_move_the_reference_of_adapters_and_restart_from_it(tmp_path):
    """Iterated DPO: a round's reference is the policy that sampled it."""
    experiment = worlds.round_of_sums(
        model=LORA, reward_fn=even_digit, optimizer=FAST, losses=(preference.dpo,), select_fn=selection.keep_all,
        begin_round=rounds.move_reference, num_rounds=2, recording=runs.Recording(save_every_steps=1),
    )  # fmt: skip
    state, _ = train(iterated, experiment, tmp_path)
    manager = checkpoints.open_manager(tmp_path / "checkpoints", read_only=True)
    before = checkpoints.restore(manager, state, step=1)
    checkpoints.close(manager)
    same(state.reference, before.params)
    same(state.frozen, before.frozen)
    back = rounds.restart(state, FAST)
    same(back.params, state.reference)
    assert not any(x.any() for x in jax.tree.leaves(back.opt_state) if x.ndim)


def test_an_int8_teacher_of_a_policy_without_adapters(trained):
    """A teacher is frozen whole: its weights may be int8, and those of a policy that is trained whole may not."""
    narrow = dataclasses.replace(worlds.TINY, width=24, param_dtype="int8")
    teacher = start.teacher(model=narrow, start=start.random_parameters)
    parts = changed(trained[1], worlds.TINY, reference=teacher)
    state = online.initial_state(parts)
    assert state.reference["mlps_0"]["down"]["kernel"]["int8"].shape == (24, 24) and state.frozen == ()
    with pytest.raises(Refused, match="'int8', which freezes all weights: set Config.lora_rank"):
        online.prepare(sums(model=dataclasses.replace(worlds.TINY, param_dtype="int8")))


def test_what_adapters_cannot_do_is_refused():
    with pytest.raises(Refused, match="its adapters off, and it has none: set Config.lora_rank"):
        online.prepare(sums(model=worlds.TINY, reference=start.frozen_base()))
    for begin in (rounds.restart, rounds.move_reference):
        given = dict(model=LORA, begin_round=begin, reference=start.frozen_base(), losses=(preference.dpo,))
        with pytest.raises(Refused, match="a reference with parameters of its own: set Experiment.reference = "):
            iterated.prepare(worlds.round_of_sums(**given))


def test_the_parameters_of_a_checkpoint_can_be_told_without_reading_them(trained):
    _, _, state, _, folder = trained
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shapes(checkpoints.parameters(folder / "checkpoints")) == shapes(lora.policy(state))
