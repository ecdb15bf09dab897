"""Keys and values in 8 bits: close to those in fp32, a quarter of the memory, and nothing a learner reads."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl import scoring
from mlrl.costs.flops import products
from mlrl.costs.work import phases
from mlrl.generation import generate
from mlrl.loops import online, stages
from mlrl.losses import policy
from mlrl.models import transformer
from mlrl.models.attention import attend, to_int8
from mlrl.models.transformer import Config, Transformer, cache_bytes
from mlrl.refilled import refilled
from mlrl.sampling import GREEDY
from mlrl.types import Refused
from tests.generation_test import MODEL, P, T, params, some_prompts
from tests.loops import worlds

INT8 = Transformer(dataclasses.replace(MODEL.config, cache_dtype="int8"))


@functools.cache
def program(function, model, **knobs):
    """Compiled once for all tests with the same knobs."""
    return jax.jit(functools.partial(function, model, **knobs))


def sample(model, function=generate, weights=None, **knobs):
    run = program(function, model, max_completion_tokens=T, eos_ids=(5,), pad_id=0, **knobs)
    return run(weights or params(), some_prompts(), jax.random.key(3)).check()


def test_integers_are_within_half_a_step_and_zeros_stay_zeros():
    x = jax.random.normal(jax.random.key(0), (2, 3, 8, 5)).at[0, 0, :, 0].set(0.0)
    integers, scale = to_int8(x, -2)
    assert integers.dtype == jnp.int8 and scale.shape == (2, 3, 1, 5)
    assert jnp.all(jnp.abs(x - integers * scale) <= scale / 2 + 1e-7) and not jnp.any(integers[0, 0, :, 0])


def test_scales_taken_times_logits_and_weights_are_those_of_keys_and_values():
    keys = jax.random.split(jax.random.key(0), 3)
    queries = jax.random.normal(keys[0], (2, 4, 3, 2, 8))
    (k, of_k), (v, of_v) = (
        to_int8(jax.random.normal(key, shape), axis)
        for key, shape, axis in ((keys[1], (2, 3, 8, 5), -2), (keys[2], (2, 3, 5, 8), -1)))  # fmt: skip
    mask = jnp.ones((2, 4, 5), bool).at[:, 0, 2:].set(False)
    found = attend(queries, k, v, mask, scale=0.3, cap=2.0, scales=(of_k, of_v))
    wide = attend(queries, k * of_k, v * of_v, mask, scale=0.3, cap=2.0)
    np.testing.assert_allclose(found, wide, atol=1e-5)


def test_log_probs_are_near_those_of_fp32_and_greedy_tokens_mostly_equal():
    rows = sample(INT8, group_size=4)
    said = program(scoring.score, MODEL)(params(), rows).log_probs
    gap = np.where(rows.action_mask, said - rows.behavior_log_probs, 0.0)
    assert 1e-5 < np.abs(gap).max() < 0.05
    greedy, exact = (sample(model, sampling=GREEDY) for model in (INT8, MODEL))
    assert (greedy.tokens[:, P:] == exact.tokens[:, P:]).mean() > 0.9


@pytest.mark.parametrize("changes", [
    {"scan_layers": True}, {"windows": (0, 3)}, {"dtype": "bfloat16"},
    pytest.param({"attention_cap": 2.0}, marks=pytest.mark.slow),  # `attend` is tested with a cap above
], ids=lambda changes: next(iter(changes)))  # fmt: skip
def test_models_of_other_kinds(changes):
    model = Transformer(dataclasses.replace(INT8.config, **changes))
    weights = transformer.initialize(model, jax.random.key(0))
    rows = sample(model, weights=weights, group_size=2)
    exact = program(scoring.score, transformer.in_own_dtype(model), first_column=P)(weights, rows).log_probs
    assert np.abs(np.where(rows.action_mask, exact - rows.behavior_log_probs, 0.0)).max() < 0.05


def test_growing_caches_and_slots_sample_the_same():
    rows = sample(INT8, group_size=4)
    for other in (sample(INT8, group_size=4, grow_at=(2, 5)),
                  sample(INT8, refilled, group_size=4, slots=5, check_every_steps=2)):  # fmt: skip
        np.testing.assert_array_equal(other.tokens, rows.tokens)
        np.testing.assert_allclose(other.behavior_log_probs, rows.behavior_log_probs, atol=1e-5)


def test_bytes_are_counted_with_their_scales():
    config = Config(layers=3, kv_heads=2, head_width=32, cache_dtype="int8")
    assert cache_bytes(config, 5, 7) == 3 * 5 * 7 * 2 * (2 * 32 + 2 * 4)
    assert cache_bytes(dataclasses.replace(config, cache_dtype=""), 5, 7) == 3 * 5 * 7 * 2 * 2 * 32 * 4
    assert cache_bytes(dataclasses.replace(config, cache_dtype="bfloat16"), 5, 7) == 3 * 5 * 7 * 2 * 2 * 32 * 2


def sums(cache_dtype, **changes):
    return worlds.sums(model=dataclasses.replace(worlds.TINY, cache_dtype=cache_dtype), **changes)


def test_a_learner_reads_prompts_as_without_them():
    parts = [online.prepare(sums(dtype)) for dtype in ("", "int8")]
    prompts, rollout, rewards = stages.abstract_rows(parts[0])
    jaxprs = [str(jax.make_jaxpr(functools.partial(online.learn, part))(
        online.abstract_state(part), prompts, rollout, rewards)) for part in parts]  # fmt: skip
    assert "i8[" not in jaxprs[1] and len(jaxprs[0]) == len(jaxprs[1])
    program = online.programs(parts[1])["rollout"]
    assert "i8[" in str(program.function.trace(*program.arguments).jaxpr)


def test_the_costs_of_decoding_and_the_words_of_a_check_count_them():
    found = []
    for dtype in ("", "int8"):
        parts = online.prepare(sums(dtype))
        program = online.programs(parts)["rollout"]
        counted = products(program.function.trace(*program.arguments).jaxpr)
        made = phases(parts, "rollout", counted, program.arguments)
        found.append(made["decode"].cache_bytes)
    assert found[1] / found[0] == (8 + 4) / (4 * 8)  # a head of 8: integers and a scale, for floats
    assert "KV cache" in online.describe(parts)


def test_a_loss_that_takes_the_ratio_to_be_one_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, logger="mlrl"):
        online.prepare(sums("int8"))
        online.prepare(sums("", losses=(policy.reinforce,)))
        assert not caplog.records
        online.prepare(sums("int8", losses=(policy.reinforce,)))
    (record,) = caplog.records
    assert "cache_dtype is 'int8'" in record.getMessage() and "\n" not in record.getMessage()


def test_another_dtype_is_refused():
    with pytest.raises(Refused, match="cache_dtype must be"):
        Config(cache_dtype="int4")
