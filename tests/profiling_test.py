"""What was compiled and why, traces of steps, and shares of a peak."""

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
from mlrl.costs.work import Cost  # noqa: E402
from mlrl.loops import online  # noqa: E402
from mlrl.types import Refused  # noqa: E402


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
    recording = runs.Recording(count_flops=True, phases_every_steps=0)
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
