"""The sampler and the scorer agree, whatever the rows look like."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl.generation import generate
from mlrl.models.transformer import Config, Transformer, initialize
from mlrl.sampling import GREEDY, Sampling, top_k_filter, top_p_filter
from mlrl.scoring import score
from mlrl.types import Prompts, Refused

V, N, P, T = 23, 6, 7, 9
MODEL = Transformer(Config(vocabulary_size=V, width=32, layers=2, heads=4, kv_heads=2, head_width=8, mlp_width=48))


@functools.cache
@jax.jit
def params():
    """Perturbed, so that no norm is 1 and no two logits are close."""
    start = initialize(MODEL, jax.random.key(0))
    leaves, structure = jax.tree.flatten(start)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return structure.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


def some_prompts(lengths=(7, 1, 3, 7, 2, 5)) -> Prompts:
    valid = jnp.arange(P)[None] >= P - jnp.asarray(lengths)[:, None]
    tokens = jax.random.randint(jax.random.key(2), (N, P), 0, V)
    return Prompts(tokens, valid, jnp.zeros(N, jnp.int32), jnp.arange(N), {})


@functools.cache
def program(function, **knobs):
    """Compiled once for all tests with the same knobs."""
    return jax.jit(functools.partial(function, MODEL, **knobs))


def sample(key=3, *, prompts=None, eos_ids=(5,), pad_id=0, **knobs):
    run = program(generate, max_completion_tokens=T, eos_ids=eos_ids, pad_id=pad_id, **knobs)
    return run(params(), prompts or some_prompts(), jax.random.key(key)).check()


def largest_gap(rollout, temperature=1.0, **knobs):
    scores = program(score, temperature=temperature, **knobs)(params(), rollout)
    return float(jnp.max(jnp.abs(jnp.where(rollout.action_mask, scores.log_probs - rollout.behavior_log_probs, 0.0))))


@pytest.mark.parametrize("temperature, eos_ids, pad_id", [
    (1.0, (5,), 0), (1.0, (5,), 5), (1.0, (5, 9, 11), 9), (1.0, (V + 1,), 0), (0.7, (5, 9, 11), 9),
    *(pytest.param(0.7, *ids, marks=pytest.mark.slow) for ids in (((5,), 0), ((5,), 5), ((V + 1,), 0))),
])  # fmt: skip
def test_scorer_reproduces_the_sampler(eos_ids, pad_id, temperature):
    """With one EOS, pad == EOS, several EOS ids, and rows that never stop; prompts of unequal length throughout."""
    rollout = sample(eos_ids=eos_ids, pad_id=pad_id, group_size=4, sampling=Sampling(temperature=temperature))
    assert largest_gap(rollout, temperature, first_column=P) < 1e-5
    assert largest_gap(rollout, temperature, first_column=P, chunk_columns=4) < 1e-5
    assert largest_gap(rollout, temperature) < 1e-5


def test_ratio_of_a_fresh_rollout_is_exactly_one_when_recomputed_and_one_to_1e_5_when_recorded():
    rollout = sample(group_size=4)
    forward = lambda: program(score, temperature=1.0, first_column=P)(params(), rollout).log_probs
    again = jnp.exp(forward() - forward())
    assert bool(jnp.all(again == 1.0))
    recorded = jnp.exp(forward() - rollout.behavior_log_probs)
    np.testing.assert_allclose(np.where(rollout.action_mask, recorded, 1.0), 1.0, atol=1e-5)


def test_masks_come_from_recorded_lengths():
    rollout = sample(eos_ids=(5,), pad_id=5, group_size=8)
    for tokens, action, truncated in zip(*map(np.asarray, (rollout.tokens, rollout.action_mask, rollout.truncated))):
        completion, acted = tokens[P:], action[P:]
        stops = np.flatnonzero(completion == 5)
        length = acted.sum()
        assert not action[:P].any() and acted[:length].all() and not acted[length:].any()
        if truncated:
            assert length == T and 5 not in completion
        else:
            assert length == stops[0] + 1  # the first EOS is an action, what follows is not
    assert 0 < int(rollout.truncated.sum()) < rollout.truncated.shape[0], "the test needs rows of both kinds"


def test_completions_do_not_depend_on_padding_or_on_the_other_rows():
    prompts = some_prompts()
    whole = sample(prompts=prompts)
    wider = jax.tree.map(lambda x: x, prompts).replace(
        tokens=jnp.pad(prompts.tokens, ((0, 0), (4, 0)), constant_values=7),
        valid=jnp.pad(prompts.valid, ((0, 0), (4, 0))),
    )
    np.testing.assert_array_equal(whole.tokens[:, P:], sample(prompts=wider).tokens[:, P + 4 :])
    two = jax.tree.map(lambda x: x[:2], prompts)
    np.testing.assert_array_equal(whole.tokens[:2], sample(prompts=two).tokens)


def test_a_group_is_the_same_prompt_with_different_draws():
    rollout = sample(group_size=4, eos_ids=(V + 1,))
    np.testing.assert_array_equal(rollout.group, np.repeat(np.arange(N), 4))
    completions = np.asarray(rollout.tokens[:, P:]).reshape(N, 4, T)
    assert all(len({tuple(c) for c in group}) == 4 for group in completions)


def test_greedy_is_the_argmax_of_the_scorer():
    rollout = sample(sampling=GREEDY, eos_ids=(V + 1,))
    hot = sample(sampling=Sampling(temperature=1e-4), eos_ids=(V + 1,))
    np.testing.assert_array_equal(rollout.tokens, hot.tokens)
    assert largest_gap(rollout) < 1e-5


def test_sampled_frequencies_are_the_distribution():
    """A chi-square statistic over the first token of 4,000 draws stays below the 99.9% quantile (22 degrees)."""
    prompts = jax.tree.map(lambda x: x[:1], some_prompts())
    rollout = sample(prompts=prompts, group_size=4000, eos_ids=(V + 1,))
    one = jax.tree.map(lambda x: x[:1], rollout)
    tokens = jnp.tile(one.tokens, (V, 1)).at[:, P].set(jnp.arange(V))
    every = one.replace(tokens=tokens, valid=jnp.tile(one.valid, (V, 1)))
    said = program(score, temperature=1.0, first_column=P)(params(), every).log_probs
    p = np.exp(np.asarray(said[:, P], np.float64))
    counts = np.bincount(np.asarray(rollout.tokens[:, P]), minlength=V)
    big = p * 4000 >= 5
    expected = np.append(p[big], p[~big].sum()) * 4000
    found = np.append(counts[big], counts[~big].sum())
    assert ((found - expected) ** 2 / np.maximum(expected, 1e-9)).sum() < 48.3


def test_filters_by_hand():
    log_p = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    np.testing.assert_allclose(jnp.exp(top_k_filter(log_p, 2)), [[0.625, 0.375, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(jnp.exp(top_p_filter(log_p, 0.7)), [[0.625, 0.375, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(jnp.exp(top_p_filter(log_p, 0.01)), [[1, 0, 0, 0]], atol=1e-6)
    assert top_k_filter(log_p, 0) is log_p and top_p_filter(log_p, 1.0) is log_p


def test_filtered_log_probs_are_those_of_the_filtered_distribution():
    rollout = sample(sampling=Sampling(top_k=3), group_size=4)
    full = program(score, temperature=1.0, first_column=P)(params(), rollout).log_probs
    assert float(jnp.min(jnp.where(rollout.action_mask, rollout.behavior_log_probs - full, 0.0))) >= -1e-5
    assert float(jnp.max(jnp.where(rollout.action_mask, rollout.behavior_log_probs - full, 0.0))) > 1e-3


def test_entropy_and_chunked_gradients():
    rollout = sample(group_size=2)

    def total(p, chunk):
        scores = score(MODEL, p, rollout, first_column=P, chunk_columns=chunk)
        return jnp.sum(jnp.where(rollout.action_mask, scores.log_probs + scores.entropy, 0.0))

    value_and_grad = jax.jit(jax.value_and_grad(total), static_argnums=1)
    plain, chunked = value_and_grad(params(), 0), value_and_grad(params(), 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), plain, chunked)
    scores = program(score, temperature=1.0)(params(), rollout)
    assert float(scores.entropy.min()) >= 0.0 and float(scores.entropy.max()) <= np.log(V) + 1e-5


def test_bfloat16_keeps_fp32_log_probs():
    import dataclasses

    model = Transformer(dataclasses.replace(MODEL.config, dtype="bfloat16"))
    rollout = sample()
    scores = jax.jit(functools.partial(score, model, first_column=P))(params(), rollout)
    assert scores.log_probs.dtype == jnp.float32
    gap = jnp.abs(scores.log_probs - rollout.behavior_log_probs)[rollout.action_mask]
    assert largest_gap(rollout) < float(jnp.max(gap)) < 1.0


@pytest.mark.parametrize("grow_at", [(1,), (3, 4, 100), pytest.param((T,), marks=pytest.mark.slow)])
def test_caches_that_grow_change_nothing(grow_at):
    wanted = sample(group_size=2, eos_ids=(V + 1,))
    found = sample(group_size=2, eos_ids=(V + 1,), grow_at=grow_at)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.behavior_log_probs, wanted.behavior_log_probs, atol=1e-5)
    ended = sample(group_size=2, grow_at=grow_at)
    np.testing.assert_array_equal(ended.tokens, sample(group_size=2).tokens)


def test_caches_are_no_longer_than_what_was_written_needs():
    run = functools.partial(generate, MODEL, max_completion_tokens=T, eos_ids=(5,), pad_id=0, grow_at=(2, 4))
    text = jax.jit(run).lower(params(), some_prompts(), jax.random.key(0)).as_text()
    c = MODEL.config
    for columns in (P + 2, P + 4, P + T):
        assert f"tensor<{N}x{c.kv_heads}x{c.head_width}x{columns}xf32>" in text


@pytest.mark.parametrize("grow_at", [(4, 2), (0, 3), 5])
def test_lengths_that_caches_cannot_grow_by_are_refused(grow_at):
    with pytest.raises(Refused, match="grow_at"):
        sample(grow_at=grow_at)
