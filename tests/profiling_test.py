"""What was compiled and why, traces of steps, and shares of a peak."""

import dataclasses
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "loops"))

import worlds  # noqa: E402

from mlrl import main, profiling, runs  # noqa: E402
from mlrl.costs.devices import Peak, peak_of  # noqa: E402
from mlrl.costs.work import Cost, of_step  # noqa: E402
from mlrl.loops import online  # noqa: E402
from mlrl.refilled import refilled  # noqa: E402
from mlrl.rollouts.single_turn import single_turn  # noqa: E402
from mlrl.types import Refused  # noqa: E402

SLOTS = functools.partial(refilled, slots=8)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_a_program_that_is_compiled_again_is_named_with_the_shape_that_changed(tmp_path, caplog):
    path = tmp_path / "compilations.jsonl"
    doubled = jax.jit(lambda numbers: 2 * numbers)
    numbers = [jnp.ones(n) for n in (3, 4)]
    with profiling.CompileLog(path).opened() as log:
        doubled(numbers[0])
        assert lines_of(path) == [], "fast ones before the first step are left out"
        log.after(7)
        doubled(numbers[1])
    (line,) = lines_of(path)
    assert line["step"] == 7 and line["program"] == "<lambda>" and line["seconds"] > 0
    assert "at numbers, now f32[4] and before f32[3]" in line["why"]
    assert not [record for record in caplog.records if "TRACING" in record.getMessage()]
    doubled(jnp.ones(5))
    assert len(lines_of(path)) == 1, "a log that is closed hears nothing"
    assert not jax.config.jax_explain_cache_misses


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    recording = runs.Recording(count_flops=True, phases_every_steps=1)
    with runs.Run(folder, recording, profile=profiling.Steps(2, 3)) as run:
        online.train(worlds.sums(num_steps=4, recording=recording, evaluations=()), run)
    return folder


def test_a_run_logs_what_it_compiles_and_nothing_after_the_first_step(run):
    found = lines_of(run / "compilations.jsonl")
    assert "whole_step" in {line["program"] for line in found}
    assert all(line["step"] == 0 for line in found), found


def test_the_steps_that_were_asked_for_are_traced(run):
    (trace,) = (run / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000


def test_a_run_logs_flops_by_formula(run):
    line = lines_of(run / "metrics.jsonl")[-1]
    assert "mfu" not in line, "nobody knows the peak of a CPU"
    flops = line["flops_per_second"] * line["seconds/step"]
    tokens = 32 * (4 + 3)  # rows of prompt and completion; sampled once, and learned from forward and backward
    parameters = 16 * 24 * 3 + 16 * (2 + 2) * 8 + 16 * 16 + 16 * 14  # of the tiny model's products
    assert 1 * 2 * parameters * tokens < flops < 6 * 2 * parameters * tokens


def test_a_run_logs_what_decoding_reads_by_formula(run):
    timed = [line for line in lines_of(run / "metrics.jsonl") if "seconds/rollout" in line]
    assert timed
    for line in timed:
        assert "bandwidth_share" not in line, "nobody knows the peak of a CPU"
        read = line["decode_bytes_per_second"] * line["seconds/rollout"]
        vocabulary = worlds.sums().task.vocabulary.size
        parameters = 16 * 24 * 3 + 16 * (2 + 2) * 8 + 16 * 16 + 16 * vocabulary + 3 * 16  # of one layer; and norms
        caches = 32 * (4 + 3) * 2 * 8  # rows, columns, keys and values, one head
        turns = 2 * line["length/max"] / 3
        assert read == pytest.approx(4 * (parameters + caches) * turns)


def test_bandwidth_by_hand():
    cost = Cost(100.0, 40.0, 9, devices=4, decode_bytes=80.0, rollout_devices=2)
    line = {"length/max": 5.0, "seconds/rollout": 4.0}
    found = profiling.bandwidth(cost, line, Peak(20.0, 50.0))
    assert found == {"decode_bytes_per_second": 10.0, "bandwidth_share": pytest.approx(0.1)}
    assert profiling.bandwidth(cost, line, None) == {"decode_bytes_per_second": 10.0}
    for nothing in ((None, line), (cost, {}), (Cost(1.0), line)):
        assert profiling.bandwidth(*nothing, Peak(20.0, 50.0)) == {}


@pytest.mark.parametrize(("changes", "factor"), [
    ({}, 1.0), ({"steps_ahead": 1}, 0.0), ({"max_attempts": 2}, 0.0),
    ({"rollout_fn": functools.partial(single_turn, max_completion_tokens=3, sampler=SLOTS)}, 0.0),
], ids=["plain", "ahead", "attempts", "slots"])  # fmt: skip
def test_bytes_are_counted_where_the_formula_holds(changes, factor):
    parts = online.prepare(worlds.sums(evaluations=(), **changes))
    found = of_step(parts, online.programs(parts))
    assert (found.decode_bytes > 0) == bool(factor)


def test_narrow_caches_and_weights_are_read_as_they_are():
    def read(**config):
        parts = online.prepare(worlds.sums(model=dataclasses.replace(worlds.TINY, **config), evaluations=()))
        return of_step(parts, online.programs(parts)).decode_bytes

    caches = 2 * 32 * 7 * 2 * 8 * 4
    assert read() - read(cache_dtype="int8") == pytest.approx(caches * (1 - 12 / 32))
    assert read(dtype="bfloat16") == pytest.approx(read() / 2)


def test_shares_by_hand():
    line = {"length/max": 6.0}
    found = profiling.shares(Cost(100.0, 40.0, 9, devices=4), line, 2.0, Peak(20.0, 1.0))
    assert found == {"flops_per_second": pytest.approx(62.0), "mfu": pytest.approx(62.0 / 80.0)}
    assert profiling.shares(None, line, 2.0, Peak(20.0, 1.0)) == {}
    assert profiling.shares(Cost(100.0), {}, 2.0, None) == {"flops_per_second": 50.0}


def test_peaks_are_those_of_a_jax_device():
    assert peak_of("TPU v4") == Peak(275e12 / 2, 600e9) and peak_of("NVIDIA H200").bandwidth == 4.8e12
    assert peak_of("cpu") is None


@pytest.mark.parametrize("text", ["0:2", "5:4", "x", "3:", ""])
def test_steps_that_are_none_are_refused(text):
    with pytest.raises(Refused, match="give the first and the last step"):
        profiling.Steps.parse(text)


def test_seeds_are_not_traced_together(capsys):
    experiment = str(pathlib.Path(__file__).resolve().parents[1] / "experiments/quickstart/grpo.gin")
    assert main.main(["train", experiment, "--seeds", "2", "--profile_steps", "2"]) == 2
    assert "leave out --seeds" in capsys.readouterr().err
