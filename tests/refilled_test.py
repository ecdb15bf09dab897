"""Rows that are decoded in refilled slots are the rows of the static sampler."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.refill import of_lengths, refilled_steps, static_steps
from mlrl import generation, meshes
from mlrl.generation import generate
from mlrl.loops import online
from mlrl.models.norms import LayerNorm
from mlrl.models.transformer import Config, Transformer, initialize
from mlrl.refilled import refilled
from mlrl.rollouts.single_turn import single_turn
from mlrl.sampling import GREEDY, Sampling
from mlrl.types import Prompts, Refused
from tests.loops import worlds

V, N, P, G, T = 23, 7, 6, 3, 10
ROWS = N * G
CONFIG = Config(vocabulary_size=V, width=16, layers=2, heads=2, kv_heads=1, head_width=8, mlp_width=24)
NEVER = (V + 1,)


def params_of(config):
    """Perturbed, so that no two logits are close."""
    leaves, structure = jax.tree.flatten(initialize(Transformer(config), jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return structure.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


@functools.cache
def params():
    return params_of(CONFIG)


def some_prompts(n=N):
    valid = jnp.arange(P)[None] >= P - jnp.asarray((6, 1, 3, 6, 2, 5, 4, 6))[:n, None]
    tokens = jax.random.randint(jax.random.key(2), (n, P), 0, V)
    return Prompts(tokens, valid, jnp.zeros(n, jnp.int32), jnp.arange(n), {})


@functools.cache
def program(sampler, model, **knobs):
    """Compiled once for all tests with the same knobs."""
    return jax.jit(functools.partial(sampler, model, **knobs))


def sample(sampler, *, config=CONFIG, prompts=None, eos_ids=(5, 9, 11), group_size=G, weights=None, **knobs):
    given = dict(max_completion_tokens=T, pad_id=0, group_size=group_size, policy_version=4) | knobs
    run = program(sampler, Transformer(config), eos_ids=eos_ids, **given)
    return run(weights or params(), prompts or some_prompts(), jax.random.key(3)).check()


def assert_same_rows(found, wanted):
    np.testing.assert_allclose(found.behavior_log_probs, wanted.behavior_log_probs, atol=1e-5)
    for field in dataclasses.fields(wanted):
        if field.name != "behavior_log_probs":
            np.testing.assert_array_equal(getattr(found, field.name), getattr(wanted, field.name), err_msg=field.name)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("slots, k", [(3, 1), (4, 3), slow(8, 4), (20, 16), slow(ROWS, 3)])
def test_any_slots_and_any_pace_sample_what_the_static_sampler_samples(slots, k):
    """Rows that do not divide over slots, k that does not divide T, k longer than a row; ends early, late, never."""
    wanted = sample(generate)
    lengths = np.asarray(wanted.action_mask.sum(1))
    assert lengths.min() == 1 and 2 < np.median(lengths) < T and 0 < int(wanted.truncated.sum()) < ROWS
    assert_same_rows(sample(refilled, slots=slots, check_every_steps=k), wanted)


@pytest.mark.parametrize("eos_ids", [NEVER, tuple(range(V))])
def test_rows_that_are_all_full_or_all_of_one_token(eos_ids):
    wanted = sample(generate, eos_ids=eos_ids)
    assert set(np.asarray(wanted.action_mask.sum(1))) == {T if eos_ids == NEVER else 1}
    assert_same_rows(sample(refilled, slots=4, check_every_steps=3, eos_ids=eos_ids), wanted)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.7, top_k=5), slow(Sampling(top_p=0.8))])
def test_greedy_and_filtered_rows(sampling):
    assert_same_rows(sample(refilled, slots=4, check_every_steps=3, sampling=sampling),
                     sample(generate, sampling=sampling))  # fmt: skip


@pytest.mark.parametrize("changes, eos_ids", [
    (dict(windows=(3, 0)), (5, 9, 11)),
    (dict(learned_positions=P + T, norm=LayerNorm, gated_mlp=False, mlp_bias=True), NEVER),
    (dict(experts=2, experts_per_token=1), (5, 9, 11)),
])  # fmt: skip
def test_models_of_other_kinds(changes, eos_ids):
    """A window counts back in time, whatever the order of the ring; a table of positions has no row to spare."""
    config = dataclasses.replace(CONFIG, **changes)
    given = dict(config=config, weights=params_of(config), eos_ids=eos_ids)
    wanted = sample(generate, **given)
    assert not np.isnan(wanted.behavior_log_probs).any()
    for k in (1, 4):
        assert_same_rows(sample(refilled, slots=4, check_every_steps=k, **given), wanted)
    if "windows" in changes:
        plain = sample(generate, **given | dict(config=CONFIG))
        assert (np.asarray(plain.tokens) != np.asarray(wanted.tokens)).any(), "the window makes no difference"


def model_steps(sampler, monkeypatch, **knobs):
    """(the rollout, how often it called the model after the prefill)."""
    calls = []

    class Counted(Transformer):
        def __call__(self, tokens, *rest):
            if tokens.shape[1] == 1:
                jax.debug.callback(lambda: calls.append(1))
            return super().__call__(tokens, *rest)

    monkeypatch.setitem(globals(), "Transformer", Counted)
    rollout = jax.block_until_ready(sample(sampler, **knobs))
    jax.effects_barrier()
    return rollout, len(calls)


def test_slots_are_refilled_and_so_fewer_steps_are_taken(monkeypatch):
    """One row in seven is long. Refilled, the steps are those of the schedule; static, the others wait for it."""
    lengths = np.asarray([T if row % 7 == 3 else 1 + row % 2 for row in range(ROWS)])
    monkeypatch.setattr(generation, "chooser", of_lengths(jnp.asarray(lengths)))
    rollout, steps = model_steps(refilled, monkeypatch, slots=7, check_every_steps=2)
    np.testing.assert_array_equal(rollout.action_mask.sum(1), lengths)
    assert steps == refilled_steps(lengths, 7, 2) == 14
    one, static = model_steps(generate, monkeypatch)
    assert static == static_steps(lengths, ROWS) == T - 1 and static_steps(lengths, 7) == 27
    assert_same_rows(rollout, one)


@pytest.mark.parametrize("sizes", [slow(dict(data=8)), dict(data=2, fsdp=2, tensor=2)])
def test_slots_on_a_mesh_sample_what_one_device_does(sizes):
    given = dict(prompts=some_prompts(8), eos_ids=(5, 9))
    wanted = sample(generate, **given)
    with meshes.use(meshes.mesh(**sizes)):
        assert_same_rows(sample(refilled, slots=8, check_every_steps=3, **given), wanted)


@pytest.mark.parametrize("knobs, words", [
    (dict(slots=2), "refilled.slots is 2, but a group has 3 rows: set it to 3 or more"),
    (dict(slots=0), "refilled.slots must be a whole number of at least 1, got 0"),
    (dict(check_every_steps=0), "refilled.check_every_steps must be a whole number of at least 1, got 0"),
    (dict(check_every_steps=2.0), "refilled.check_every_steps must be a whole number of at least 1, got 2.0"),
    (dict(max_completion_tokens=0), "refilled.max_completion_tokens must be a whole number of at least 1, got 0"),
    (dict(slots=12), "refilled.slots is 12, which does not divide over the 8 devices that rows are split over: set it"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused(knobs, words):
    with meshes.use(meshes.mesh()), pytest.raises(Refused, match=words):
        sample(refilled, prompts=some_prompts(8), **knobs)


def test_an_online_step_in_slots_trains_as_one_without():
    """On eight devices in one program, beside the static sampler on one."""

    def after_a_step(devices, **knobs):
        rollout_fn = functools.partial(single_turn, max_completion_tokens=3, **knobs)
        mesh = functools.partial(meshes.mesh, devices=devices)
        parts = online.prepare(worlds.sums(rollout_fn=rollout_fn, mesh=mesh, minibatches=1, evaluations=()))
        with meshes.use(mesh()):
            state = online.initial_state(parts)
            prompts = online.prompt_source(parts)(state, 0)
            before = jax.device_get(state.params)
            state, metrics, batch = jax.jit(functools.partial(online.whole_step, parts))(state, prompts)
            return before, jax.device_get((state.params, metrics, batch.rollout))

    slots = functools.partial(refilled, slots=8, check_every_steps=2)
    (before, (params, metrics, rollout)), (_, (alone, _, rows)) = after_a_step(8, sampler=slots), after_a_step(1)
    assert_same_rows(rollout, rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), params, alone)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params, before)
    assert metrics["grad_norm"] > 0 and max(jax.tree.leaves(moved)) > 1e-4


def test_slots_that_do_not_fit_are_refused_before_anything_is_compiled():
    def prepared(**knobs):
        rollout_fn = functools.partial(single_turn, sampler=functools.partial(refilled, **knobs))
        online.prepare(worlds.sums(rollout_fn=rollout_fn, mesh=meshes.mesh, minibatches=1))

    prepared(slots=16)
    with pytest.raises(Refused, match="refilled.slots is 12, which does not divide over the 8 devices"):
        prepared(slots=12)
    with pytest.raises(Refused, match="refilled.slots is 3, but a group has 4 rows"):
        prepared(slots=3)
