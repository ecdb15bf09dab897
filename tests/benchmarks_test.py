"""The benchmarks measure what they say: the baselines do mlrl's arithmetic, and the soak test sees growth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import decode_baseline, run, soak, update_baseline
from mlrl.generation import generate
from mlrl.models.transformer import Transformer, initialize
from mlrl.types import Prompts


@pytest.fixture(scope="module")
def rollout_and_params():
    model, key = Transformer(run.CONFIG), jax.random.key(0)
    params = initialize(model, key)
    tokens = jax.random.randint(key, (4, 6), 0, run.CONFIG.vocabulary_size)
    zeros = jnp.zeros((4,), jnp.int32)
    prompts = Prompts(tokens=tokens, valid=jnp.ones_like(tokens, bool), source=zeros, index=zeros, example=())
    sample = jax.jit(lambda p: generate(model, p, prompts, key, max_completion_tokens=5, eos_ids=(-1,), pad_id=0))
    return sample(params), params


def test_the_update_baseline_scores_as_the_sampler_does(rollout_and_params):
    rollout, params = rollout_and_params
    log_probs = jax.jit(lambda p, tokens: update_baseline.log_probs(p, tokens, prompt_tokens=6))
    found = log_probs(run.bare(params), rollout.tokens)
    np.testing.assert_allclose(found, rollout.behavior_log_probs[:, 6:], atol=1e-5)


def test_the_decode_baseline_samples_what_its_own_logits_say(rollout_and_params, monkeypatch):
    """With the draw replaced by an argmax, decoding from a cache equals scoring whole rows."""
    rollout, params = rollout_and_params
    monkeypatch.setattr(jax.random, "categorical", lambda key, logits: jnp.argmax(logits, axis=-1))
    weights, prompts = run.bare(params), rollout.tokens[:, :6]
    tokens = jax.jit(lambda w, p: decode_baseline.decode(w, p, jax.random.key(0), new_tokens=4))(weights, prompts)
    length, x = 10, weights["embedding"][jnp.concatenate([prompts, tokens], axis=1)]
    for w in weights["layers"]:
        x, _ = decode_baseline.layer(w, x, jnp.arange(length), jnp.tril(jnp.ones((length, length), bool)), None, 0)
    logits = decode_baseline.norm(x, weights["norm"]) @ weights["embedding"].T
    np.testing.assert_array_equal(tokens, jnp.argmax(logits, axis=-1)[:, 5:-1])


def test_micro_batches_leave_the_baseline_s_step_as_it_is(rollout_and_params):
    rollout, params = rollout_and_params
    optimizer = run.optax.sgd(1.0)
    weights = run.bare(params)
    old, advantages = rollout.behavior_log_probs[:, 6:], jnp.arange(20.0).reshape(4, 5)
    step = lambda rows: jax.jit(
        lambda w: update_baseline.step(w, optimizer.init(w), rollout.tokens, old, advantages, optimizer=optimizer,
                                       prompt_tokens=6, micro_batch_rows=rows))(weights)  # fmt: skip
    whole, split = step(0), step(2)
    np.testing.assert_allclose(whole[2], -9.5, rtol=1e-5)  # on-policy: minus the mean advantage
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), whole[0], split[0])


def soaked(growth, compiled):
    seen = [(step, 100.0 + growth * step) for step in range(0, 501, 5)]
    rows = [{"step": step, "compilations": 3 + (step >= 300) * compiled} for step in range(1, 501)]
    return soak.verdict(seen, rows)


def test_the_soak_test_tells_growth_and_compilations_from_their_absence():
    assert soaked(0.0, 0)["growth_share"] == pytest.approx(0.0, abs=1e-9)
    assert soaked(0.0, 0)["compilations_after"] == {}
    grown = soaked(0.02, 1)
    assert grown["mib_per_100_steps"] == pytest.approx(2.0)
    assert grown["growth_share"] > soak.MOST_GROWTH
    assert grown["compilations_after"]["300"] == 1


def test_a_comparison_is_judged_by_its_goal():
    fast, slow = [1.0, 1.1, 0.9], [2.0, 2.2, 1.8]
    decode = run.measured("decode", {"mlrl": slow, "baseline": fast}, work=10, unit="per_second", goal=0.85)
    assert decode["ratio"] == pytest.approx(0.5) and not decode["met"]
    update = run.measured("update", {"mlrl": fast, "baseline": slow}, work=10, unit="per_second", goal=1.15)
    assert update["ratio"] == pytest.approx(0.5) and update["met"]
