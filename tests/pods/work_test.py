"""Operations by formula equal the products in the programs themselves, counted one by one."""

import dataclasses
import functools
import pathlib
import sys

import flax.linen as nn
import jax
import pytest
from jax.interpreters import partial_eval

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "loops"))

import worlds  # noqa: E402

from mlrl import scoring, stored  # noqa: E402
from mlrl.loops import iterated, offline, online  # noqa: E402
from mlrl.losses import policy, regularizers, values  # noqa: E402
from mlrl.models.transformer import Config  # noqa: E402
from mlrl.pods import flops, work  # noqa: E402
from mlrl.tasks import puzzles  # noqa: E402

GATED = worlds.TINY
PLAIN = dataclasses.replace(GATED, layers=2, gated_mlp=False, learned_positions=64, activation=nn.gelu, tied_head=False)
EXPERTS = dataclasses.replace(GATED, experts=4, experts_per_token=2)
CRITIC = dataclasses.replace(GATED, value_head=True, critic_layers=2)
SHARED = dataclasses.replace(GATED, value_head=True)
WITH_KL = (policy.ppo_clip, functools.partial(regularizers.kl_penalty, kl_coef=0.1))
WITH_VALUES = (policy.ppo_clip, values.clipped_value_loss)


def products(jaxpr, trips):
    """2 m n k for every matrix product in a jaxpr, loops `trips` times where nothing says how often."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, operands = equation.primitive.name, [v.aval for v in equation.invars]
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = functools.reduce(lambda n, axis: n * operands[0].shape[axis], contracted, 1)
            total += 2.0 * equation.outvars[0].aval.size * depth
        elif name.startswith("ragged_dot"):
            out = equation.outvars[0].aval  # [m,k] x [g,k,n] -> [m,n], or [m,k] x [m,n] -> [g,k,n]
            total += 2.0 * operands[0].size * out.shape[-1]
        times = {"scan": equation.params.get("length"), "while": trips}.get(name, 1)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                total += times * products(getattr(inner, "jaxpr", inner), trips)
    return total


def counted(program, trips):
    """All products of a program that its outputs depend on."""
    closed = jax.make_jaxpr(program.function)(*program.arguments)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return products(jaxpr, trips)


def by_formula(phases):
    return sum(one.flops for one in phases.values())


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(dict(model=PLAIN, old_log_probs=scoring.recomputed_log_probs), id="gpt2"),
        pytest.param(dict(model=EXPERTS, losses=WITH_KL, score_chunk_columns=1, minibatches=4, epochs=3), id="experts"),
        pytest.param(dict(model=CRITIC, losses=WITH_VALUES), id="critic"),
        pytest.param(dict(model=SHARED, losses=WITH_VALUES), id="value head", marks=pytest.mark.slow),
        pytest.param(dict(), id="plain", marks=pytest.mark.slow),
    ],
)
def test_every_product_of_an_online_step_is_in_the_formula(changes):
    parts = online.prepare(worlds.sums(**changes))
    programs = online.programs(parts)
    phases = work.phases(parts, programs)
    for name, program in programs.items():
        assert by_formula(phases[name]) == pytest.approx(counted(program, trips=2), rel=1e-6), name


def test_a_reward_on_the_host_divides_the_step():
    parts = online.prepare(worlds.sums(reward_fn=worlds.first_digit, micro_batch_rows=4))
    programs = online.programs(parts)
    phases = work.phases(parts, programs)
    assert {name: set(found) for name, found in phases.items()} == {
        "rollout": {"prefill", "decode"}, "update": {"annotate", "update"},
    }  # fmt: skip
    assert work.runs(parts, programs) == {"rollout": 1, "update": 1}
    assert by_formula(phases["update"]) == pytest.approx(counted(programs["update"], trips=0), rel=1e-6)
    decode, update = phases["rollout"]["decode"], phases["update"]["update"]
    columns = 4 + 3  # prompts such as 1+2=
    assert decode.weight_passes == 2 and decode.cache_bytes == 2 * (2 * 32 * columns * 1 * 8 * 4)
    assert update.weight_passes == 3 * 8 and update.optimizer_steps == 2


def test_the_offline_loop():
    task = puzzles.arithmetic(digits=1)
    parts = offline.prepare(offline.Experiment(task=task, num_steps=1, model=GATED, rows_per_step=8, minibatches=2,
                                               rows_fn=stored.demonstrations, mesh=worlds.ONE_DEVICE))  # fmt: skip
    programs = offline.programs(parts)
    phases = work.phases(parts, programs)
    assert by_formula(phases["update"]) == pytest.approx(counted(programs["update"], trips=0), rel=1e-6)


@pytest.mark.slow
def test_the_iterated_loop():
    parts = iterated.prepare(worlds.round_of_sums())
    programs = iterated.programs(parts)
    phases = work.phases(parts, programs)
    assert work.runs(parts, programs) == {"rollout": 2, "annotate": 2, "update": 12}  # 2 epochs of 64 rows by 12
    for name, program in programs.items():
        assert by_formula(phases[name]) == pytest.approx(counted(program, trips=2), rel=1e-6), name


def test_the_formula_in_numbers():
    """A layer of width 4: 2 query heads and 1 of keys and values of width 2, MLP 8 wide; 10 ids."""
    config = Config(vocabulary_size=10, width=4, layers=1, heads=2, kv_heads=1, head_width=2, mlp_width=8)
    assert flops.of_token(config, 1) == 2 * (4 * 4 * 2 + 4 * 4 + 3 * 4 * 8)
    assert flops.of_attention(config, 1, 5) == 4 * 2 * 2 * 5
    assert flops.of_head(config) == 80
    found = flops.sampling(config, prompts=2, prompt_columns=3, rows=4, completion_columns=2)
    assert found == {"prefill": 2 * 3 * (288 + 48) + 4 * 80, "decode": 4 * 1 * (288 + 80 + 80)}
    assert flops.learning(config, rows=1, columns=5, scored=2, with_values=False, chunked=False) == 3 * (
        5 * (288 + 80) + 2 * 80
    )

