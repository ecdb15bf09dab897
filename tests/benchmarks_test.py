"""The benchmarks measure what they say: the sides do the same arithmetic, take turns, and are judged by their goals."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import benchmarks.run as door
from benchmarks import (
    cases,
    comparing,
    decode_baseline,
    growth,
    measuring,
    table,
    update_baseline,
    weights,
)
from benchmarks.peers import protocol, shapes
from mlrl.generation import generate
from mlrl.models.transformer import Transformer, initialize
from mlrl.types import Prompts


@pytest.fixture(scope="module")
def rollout_and_params():
    model, key = Transformer(measuring.CONFIG), jax.random.key(0)
    params = initialize(model, key)
    tokens = jax.random.randint(key, (4, 6), 0, measuring.CONFIG.vocabulary_size)
    zeros = jnp.zeros((4,), jnp.int32)
    prompts = Prompts(tokens=tokens, valid=jnp.ones_like(tokens, bool), source=zeros, index=zeros, example=())
    sample = jax.jit(lambda p: generate(model, p, prompts, key, max_completion_tokens=5, eos_ids=(-1,), pad_id=0))
    return sample(params), params


def test_the_update_baseline_scores_as_the_sampler_does(rollout_and_params):
    rollout, params = rollout_and_params
    log_probs = jax.jit(lambda p, tokens: update_baseline.log_probs(p, tokens, prompt_tokens=6))
    found = log_probs(cases.bare(params), rollout.tokens)
    np.testing.assert_allclose(found, rollout.behavior_log_probs[:, 6:], atol=1e-5)


def test_the_decode_baseline_samples_what_its_own_logits_say(rollout_and_params, monkeypatch):
    """With the draw replaced by an argmax, decoding from a cache equals scoring whole rows."""
    rollout, params = rollout_and_params
    monkeypatch.setattr(jax.random, "categorical", lambda key, logits: jnp.argmax(logits, axis=-1))
    weights, prompts = cases.bare(params), rollout.tokens[:, :6]
    tokens = jax.jit(lambda w, p: decode_baseline.decode(w, p, jax.random.key(0), new_tokens=4))(weights, prompts)
    length, x = 10, weights["embedding"][jnp.concatenate([prompts, tokens], axis=1)]
    for w in weights["layers"]:
        x, _ = decode_baseline.layer(w, x, jnp.arange(length), jnp.tril(jnp.ones((length, length), bool)), None, 0)
    logits = decode_baseline.norm(x, weights["norm"]) @ weights["embedding"].T
    np.testing.assert_array_equal(tokens, jnp.argmax(logits, axis=-1)[:, 5:-1])


def test_micro_batches_leave_the_baseline_s_step_as_it_is(rollout_and_params):
    rollout, params = rollout_and_params
    optimizer = optax.sgd(1.0)
    weights = cases.bare(params)
    old, advantages = rollout.behavior_log_probs[:, 6:], jnp.arange(20.0).reshape(4, 5)
    step = lambda rows: jax.jit(
        lambda w: update_baseline.step(w, optimizer.init(w), rollout.tokens, old, advantages, optimizer=optimizer,
                                       prompt_tokens=6, micro_batch_rows=rows))(weights)  # fmt: skip
    whole, split = step(0), step(2)
    np.testing.assert_allclose(whole[2], -9.5, rtol=1e-5)  # on-policy: minus the mean advantage
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), whole[0], split[0])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Weights of the tiny models, by the name of their rows."""
    made = {}
    for rows in ("tiny", "tinytail"):
        made[rows] = str(tmp_path_factory.mktemp("weights") / rows)
        weights.write(made[rows], shapes.MODELS["tiny"], shapes.ROWS[rows])
    return made


@pytest.fixture(scope="module")
def decoding(folders):
    """mlrl's turns of decode, by the name of the rows."""
    model = shapes.MODELS["tiny"]
    return {rows: cases.mlrl("decode", model, shapes.ROWS[rows], folders[rows], SETTINGS) for rows in folders}


def lengths_of(turn):
    """How long the rows are that are sampled in a few turns."""
    return np.concatenate([turn(number).action_mask.sum(axis=1) for number in range(40)])


def test_weights_say_how_rows_end(decoding):
    assert set(lengths_of(decoding["tiny"])) == {6}
    share, six = 0.3, np.arange(6)
    wanted = float(np.sum((1 - share) ** six))  # the mean of a geometric length, cut at 6
    assert lengths_of(decoding["tinytail"]).mean() == pytest.approx(wanted, rel=0.1)


def test_bare_rows_end_as_mlrl_s_do(folders, decoding):
    turn = cases.baseline("step", shapes.MODELS["tiny"], shapes.ROWS["tinytail"], folders["tinytail"], SETTINGS)
    found = np.concatenate([turn(number)[2] for number in range(40)])
    assert found.mean() == pytest.approx(lengths_of(decoding["tinytail"]).mean(), rel=0.15)
    assert found.min() == 1 and found.max() == 6


SETTINGS = shapes.Settings(4)
CASES = [("prefill", "tiny"), ("scoring", "tiny"), ("update", "tinytail"), ("step", "tiny")]  # decode: see `decoding`


@pytest.mark.parametrize("case,rows", CASES)
def test_every_case_runs_on_both_sides(case, rows, folders):
    for side in cases.SIDES.values():
        turn = side(case, shapes.MODELS["tiny"], shapes.ROWS[rows], folders[rows], SETTINGS)
        for number in range(2):
            assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(turn(number)) if x.dtype == float)


def test_early_ends_are_refilled_and_cut_to_buckets(folders, decoding, monkeypatch):
    """As the heavy tail's, whose rows are more than the slots; and the rows are those of a plain sampler."""
    given = (shapes.MODELS["tiny"], shapes.ROWS["tinytail"], folders["tinytail"], SETTINGS)
    plain = decoding["tinytail"](0)
    monkeypatch.setattr(cases, "SLOTS", 4)
    monkeypatch.setattr(cases, "BUCKETS", (2, 4))
    assert cases.experiment(*given).length_buckets == (2, 4, 6)
    assert cases.experiment(*given).rollout_fn.keywords["sampler"].func is cases.refilled
    np.testing.assert_array_equal(cases.mlrl("decode", *given)(0).action_mask, plain.action_mask)
    _, metrics = cases.mlrl("step", *given)(0)
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0


def test_both_sides_score_alike(decoding):
    rollout = decoding["tiny"](0)
    params = weights.made(shapes.MODELS["tiny"], shapes.ROWS["tiny"])
    found = update_baseline.log_probs(cases.bare(params), rollout.tokens, prompt_tokens=4)
    np.testing.assert_allclose(found, rollout.behavior_log_probs[:, 4:], atol=1e-4)


FAKE = """
import sys
sys.path.insert(0, "benchmarks/peers")
import protocol
turns = protocol.Turns()
print("this goes elsewhere")
def turn(number):
    if number > {most}:
        raise ValueError("no more of this")
turns.serve(turn, fake="1.0")
"""


def fake(most):
    return protocol.Worker([sys.executable, "-c", FAKE.format(most=most)], folder=door.HERE.parent)


def test_workers_take_turns_and_a_lost_one_is_left_out():
    found, missing = comparing.in_turns(lambda side, rows: fake(rows), {"mlrl": 9, "TRL": 1, "tunix": -1}, repeats=3)
    assert set(found) == {"mlrl"} and len(found["mlrl"]["turns"]) == 3
    assert found["mlrl"]["about"]["fake"] == "1.0" and found["mlrl"]["turns"][0]["peak_mib"] > 1
    assert missing == dict.fromkeys(("TRL", "tunix"), "ValueError: no more of this")


def test_one_side_works_while_the_others_wait():
    asked = []

    class Noted:
        def __init__(self, side):
            self.side = side

        def ready(self):
            return {}

        def turn(self):
            asked.append(self.side)
            return {"seconds": 1.0}

        def close(self):
            asked.append(f"end of {self.side}")

    comparing.in_turns(lambda side, rows: Noted(side), {"mlrl": 1, "TRL": 1}, repeats=2)
    assert asked == ["mlrl", "TRL", "mlrl", "TRL", "end of mlrl", "end of TRL"]


def test_the_fastest_micro_batch_is_taken():
    class Timed:
        def __init__(self, rows):
            self.rows = rows

        def ready(self):
            return {}

        def turn(self):
            return {"seconds": {16: 3.0, 32: 1.0, 64: 2.0}[self.rows]}

        def close(self):
            pass

    assert comparing.fastest(lambda side, rows: Timed(rows), "TRL", (16, 32, 64)) == 32


def summary(**seconds):
    turn = lambda s: {"seconds": s, "cpu_seconds": s, "peak_mib": 100.0 * s}
    found = {side.replace("_", " "): {"about": {}, "turns": list(map(turn, times))} for side, times in seconds.items()}
    return comparing.summarized(found, dict.fromkeys(found, shapes.Settings(16)))


def test_a_comparison_is_judged_by_the_median_of_paired_ratios():
    sides = summary(mlrl=[1.0, 2.0, 4.0], TRL=[2.0, 4.0, 4.0], bare_JAX=[1.0, 1.0, 1.0])
    found = comparing.ratios("step", "full", "d128x2", sides)
    assert found["TRL"]["ratio"] == pytest.approx(0.5) and found["TRL"]["met"]  # by medians alike, but not by means
    assert found["bare JAX"]["goal_at_most"] is None and found["bare JAX"]["met"] is None
    assert not comparing.ratios("step", "tail", "d128x2", sides)["TRL"]["met"]
    assert comparing.goal("step", "full", "d256x4", "TRL") == 0.75
    assert comparing.goal("step", "tail", "d256x4", "tunix") == 0.20


def test_the_table_says_what_was_met_and_what_is_missing():
    sides = summary(mlrl=[1.0], TRL=[4.0], tunix=[4.0])
    case = {"case": "step", "rows": "tail", "model": "d128x2", "repeats": 1, "sides": sides,
            "ratios": comparing.ratios("step", "tail", "d128x2", sides)}  # fmt: skip
    text = table.as_markdown({"machine": measuring.machine(), "ceiling_flops": 1e9, "cases": [case], "quick": False,
                              "missing": {"somebody": "was not there"}})  # fmt: skip
    trl, tunix = (line for line in text.splitlines() if line.startswith("| step"))
    assert "| 0.25 (0.25-0.25) | at most 0.25 | met |" in trl
    assert "| at most 0.20 | MISSED | 100 / 400 |" in tunix
    assert "Left out: somebody: was not there" in text and "Not measured: GPUs" in text


def test_growth_is_measured_beside_formulas():
    point = growth.TINY["rows"][0]
    twice = point._replace(rows=2 * point.rows)
    one, two = (growth.large_arrays(p, 1000) for p in (point, twice))
    assert one <= two < 2 * one
    lines = growth.lines_of("rows", [point, twice], [
        {"seconds": 1.0, "flops": 1e9, "mib": 10.0, "bytes": 2**20}, "it was lost"])  # fmt: skip
    assert lines[3] == "| 4 | 1.000 | 1.0 | 1.0 G | 1.0 | 1.0 | 10 | 1 |" and "it was lost" in lines[4]


def test_growth_s_groups_of_one_are_an_experiment():
    parts = growth.online.prepare(growth.experiment(growth.TINY["rows"][0]._replace(group=1)))
    rollout = growth.online.stages.abstract_rows(parts)[1]
    assert parts.experiment.group_size == 1 and rollout.tokens.shape[0] == growth.TINY["rows"][0].rows


def test_the_table_of_the_readme_is_that_of_the_last_measurement():
    root = pathlib.Path(door.HERE).parent
    measured = json.loads((root / "benchmarks" / "results.json").read_text())["cases"]
    steps = [case for case in measured if case["case"] == "step"]
    shares = [" | ".join(f"{one['ratios'][other]['ratio']:.2f}" for other in door.ALL) for one in steps]
    lines = [f"| {one['rows']} | {one['model']} | {share} |" for one, share in zip(steps, shares, strict=True)]
    said = (root / "README.md").read_text()
    assert len(lines) == 4 and all(line in said for line in lines)
