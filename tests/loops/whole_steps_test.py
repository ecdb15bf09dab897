"""Whole online steps on meshes equal those of one device, and each device holds its part."""

import pathlib
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from steps_on_meshes import MESHES, ROLLOUTS, SIZES, SLOTS  # noqa: E402

QUICK = ("all_three",)  # make test-all runs the others
OTHERS = [name for name in (*MESHES, *SLOTS, *ROLLOUTS) if name not in QUICK]


def run(folder, *names):
    """What steps_on_meshes made, by name, and what the compiler said."""
    out = folder / "out.pickle"
    command = [sys.executable, str(HERE / "steps_on_meshes.py"), str(out), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return pickle.loads(out.read_bytes()), done.stderr


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return run(tmp_path_factory.mktemp("quick"), "one", *QUICK)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return run(tmp_path_factory.mktemp("others"), "one", "one_experts", "one_scanned", *OTHERS)


def check(found, said, name):
    of_its_model = f"one_{name}" if f"one_{name}" in found else "one"
    (sampled, trained, held), (wanted, alone, whole) = found[name], found[of_its_model]
    for (tokens, log_probs, metrics), (same_tokens, same_log_probs, same_metrics) in zip(sampled, wanted):
        np.testing.assert_array_equal(tokens, same_tokens)
        np.testing.assert_allclose(log_probs, same_log_probs, atol=1e-5)
        for metric in same_metrics:
            np.testing.assert_allclose(metrics[metric], same_metrics[metric], rtol=1e-4, atol=1e-5, err_msg=metric)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), trained, alone)
    assert len({float(metrics["grad_norm"]) for *_, metrics in sampled}) == len(sampled), "nothing was learned"
    parameters_split = bool({"fsdp", "tensor", "expert"} & set(SIZES[name]))
    for part, (here, everywhere) in held.items():
        assert everywhere == whole[part][1] and (here < everywhere) == parameters_split, part
    before, _, after = said.partition("compiling what must not")
    assert "Involuntary full rematerialization" in before, "the compiler's warnings are not seen"
    assert "Involuntary" not in after, after[:2000]


@pytest.mark.parametrize("name", QUICK)
def test_a_step_on_a_mesh_is_that_of_one_device(quick, name):
    check(*quick, name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", OTHERS)
def test_a_step_on_any_mesh_is_that_of_one_device(others, name):
    check(*others, name)
