"""Products counted in programs equal those of the formulas, and what they are made of by hand."""

import dataclasses
import functools
import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "loops"))

import worlds  # noqa: E402

from mlrl import meshes, scoring  # noqa: E402
from mlrl.costs import work  # noqa: E402
from mlrl.costs.flops import Products, products  # noqa: E402
from mlrl.loops import online  # noqa: E402
from mlrl.models.transformer import Config, Transformer, initialize  # noqa: E402
from mlrl.types import Rollout  # noqa: E402

GATED = dataclasses.replace(worlds.TINY, vocabulary_size=30, layers=2)
PLAIN = dataclasses.replace(GATED, gated_mlp=False, learned_positions=64, activation=nn.gelu, tied_head=False)
EXPERTS = dataclasses.replace(GATED, experts=4, experts_per_token=2)


def counted(function, *arguments):
    return products(jax.jit(function).trace(*arguments).jaxpr)


def forward_flops(c: Config, rows, columns, scored):
    """The formula of docs/pods.md."""
    mlp = (3 if c.gated_mlp else 2) * c.width * c.mlp_width
    if c.experts:
        mlp = c.experts_per_token * mlp + c.width * c.experts
    attention = c.width * (c.heads + 2 * c.kv_heads) * c.head_width + c.heads * c.head_width * c.width
    token = 2 * c.layers * (attention + mlp) + 4 * c.layers * c.heads * c.head_width * columns
    return rows * (columns * token + scored * 2 * c.width * c.vocabulary_size)


def test_products_by_hand():
    """[3,4] x [4,5] is 120 operations; in a scan of 7; in a loop from 2 to 9; in the dearer branch; or not needed."""
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    assert counted(jnp.matmul, a, b) == Products(120.0, 0.0, 0, 0)
    assert counted(lambda a, b: (a @ b, a)[1], a, b) == Products(0.0, 0.0, 0, 0)
    batched = counted(jnp.matmul, jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5)))
    assert batched.outside == 240.0
    scanned = lambda a, b: jax.lax.scan(lambda c, _: (c + (a @ b).sum(), None), 0.0, None, length=7)[0]  # noqa: E731
    assert counted(scanned, a, b).outside == 7 * 120
    two = lambda x, a, b: jax.lax.cond(x, lambda: (a @ b).sum(), lambda: (a @ b @ b.T).sum())  # noqa: E731
    assert counted(two, True, a, b).outside == 120 + 2 * 3 * 5 * 4

    def loop(a, b, stop):
        go_on = lambda carry: (carry[0] < stop) & (carry[1] < 1e9)  # noqa: E731
        turn = lambda carry: (carry[0] + 1, carry[1] + (a @ b).sum())  # noqa: E731
        return jax.lax.while_loop(go_on, turn, (jnp.int32(2), 0.0))[1]

    assert counted(functools.partial(loop, stop=9), a, b) == Products(0.0, 7 * 120.0, 7, 0)
    assert counted(loop, a, b, jnp.int32(9)) == Products(0.0, 120.0, 1, 1)  # nobody knows when it ends


def test_every_chip_counts_in_a_shard_map():
    mesh = meshes.mesh(devices=8)
    product = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(PartitionSpec("data"), PartitionSpec()),
                            out_specs=PartitionSpec("data"))  # fmt: skip
    assert counted(product, jnp.ones((16, 4)), jnp.ones((4, 5))).outside == 2 * 16 * 4 * 5


def rows_of(config, rows=4, columns=9):
    integers = jax.ShapeDtypeStruct((rows, columns), jnp.int32)
    numbers = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
    yes, row = jax.ShapeDtypeStruct((rows, columns), bool), jax.ShapeDtypeStruct((rows,), jnp.int32)
    model = Transformer(config)
    params = jax.eval_shape(functools.partial(initialize, model), jax.random.key(0))
    return model, params, Rollout(integers, yes, yes, numbers, integers, row, row, row, row)


@pytest.mark.parametrize("config", [GATED, PLAIN, EXPERTS], ids=["gated", "plain", "experts"])
def test_a_forward_and_a_backward_pass_are_those_of_the_formula(config):
    model, params, rollout = rows_of(config)
    score = functools.partial(scoring.score, model, first_column=4)
    forward = forward_flops(config, 4, 9, 5)
    assert counted(lambda p, r: score(p, r).log_probs, params, rollout).outside == pytest.approx(forward)
    loss = lambda p, r: score(p, r).log_probs.sum()  # noqa: E731
    assert counted(jax.value_and_grad(loss), params, rollout).outside == pytest.approx(3 * forward)
    in_chunks = lambda p, r: score(p, r, chunk_columns=1).log_probs.sum()  # noqa: E731
    again = 4 * 5 * 2 * config.width * config.vocabulary_size  # the head, once more
    assert counted(jax.value_and_grad(in_chunks), params, rollout).outside == pytest.approx(3 * forward + again)


@pytest.fixture(scope="module")
def parts():
    return online.prepare(worlds.sums(reward_fn=worlds.first_digit, micro_batch_rows=4, evaluations=()))


def test_a_rollout_is_a_prefill_and_turns_of_decoding(parts):
    """8 prompts of 4 columns, such as 1+2=; 32 rows of 3 tokens, of which the prefill chooses the first."""
    program = online.programs(parts)["rollout"]
    found = products(program.function.trace(*program.arguments).jaxpr)
    c = parts.model.config
    head = 2 * c.width * c.vocabulary_size
    assert found.outside == pytest.approx(forward_flops(c, 8, 4, 0) + 32 * head)
    assert found.turns == 2 and found.unknown_loops == 0
    turn = forward_flops(dataclasses.replace(c), 1, 1, 1) + 4 * c.layers * c.heads * c.head_width * (7 - 1)
    assert found.inside == pytest.approx(32 * 2 * turn)

    phases = work.phases(parts, "rollout", found, program.arguments)
    assert phases["prefill"] == work.Work(found.outside, 1)
    assert phases["decode"].weight_passes == 2
    assert phases["decode"].cache_bytes == 2 * 32 * (2 * 7 * c.kv_heads * c.head_width * 4)


def test_an_update_passes_through_the_weights_thrice_a_micro_batch(parts):
    phases = work.phases(parts, "update", Products(1.0, 0.0, 0, 0), online.programs(parts)["update"].arguments)
    assert phases == {"update": work.Work(1.0, 3 * 8, 0.0, 2)}
    assert work.runs(parts, ("rollout", "update")) == {"rollout": 1, "update": 1}
    assert work.runs(parts, ("rollout", "step")) == {"rollout": 0, "step": 1}


def test_a_round_runs_its_programs_many_times():
    class Parts:
        experiment = worlds.round_of_sums()

    assert work.runs(Parts, ("rollout", "annotate", "update")) == {
        "rollout": 2, "annotate": 2, "update": 12,  # 2 epochs of 64 rows by 12
    }  # fmt: skip
