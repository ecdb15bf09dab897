"""mlrl compile without a compiler for TPUs: what it refuses, survives and says; the CPU's compiler stands in."""

import functools
import importlib.util
import json
import pathlib
import sys

import jax
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "loops"))

import worlds  # noqa: E402

from mlrl import main, meshes  # noqa: E402
from mlrl.costs.chips import CHIPS  # noqa: E402
from mlrl.loops import online  # noqa: E402
from mlrl.pods import ahead, command, topologies  # noqa: E402
from mlrl.types import Refused  # noqa: E402

GIB = 2**30


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """said(topology, *more): the line that `mlrl compile` ends in; nothing is ever compiled here."""
    (tmp_path / "my.gin").write_text("# An experiment that is never read.\n")
    monkeypatch.chdir(tmp_path)

    def run(topology, *more, experiment="my.gin"):
        assert main.main(["compile", experiment, "--topology", topology, *more]) == 2
        line = capsys.readouterr().err
        assert line.startswith("mlrl: ") and line.count("\n") == 1, line
        return line

    return run


def test_mistakes_end_in_one_line(said, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'jax[tpu]'" in said("v5p:2x2x1")
    assert "'v5p' is no topology" in said("v5p")
    assert "'v5p:4' is no topology" in said("v5p:4")
    assert "no TPU 'v9'" in said("v9:4x4")
    assert "compile.slices must be a whole number of at least 1" in said("v5p:4x4x4", "--slices", "0")
    assert "there is no file yours.gin" in said("v5p:4x4x4", experiment="yours.gin")


@pytest.mark.parametrize("name, chips, words", [
    ("v5p-64", 32, "v5p's names count cores, two a chip: write v5p:2x4x4,"), ("v4-8", 4, "write v4:2x2x1,"),
    ("v5litepod-256", 256, "has 256 chips: write v5e:16x16,"), ("v6e-16", 16, "has 16 chips: write v6e:4x4,"),
    ("v5p-96", 48, "write how they lie, as"),
])  # fmt: skip
def test_the_name_that_a_cloud_gives_a_slice_is_told_its_topology(said, name, chips, words):
    line = said(name)
    assert f"{name} has {chips} chips" in line and words in line


@pytest.fixture
def child(monkeypatch):
    """child(code): results of compile_elsewhere, where the process that compiles runs `code`; its file is `file`."""
    monkeypatch.setattr(topologies, "require_libtpu", lambda: None)
    start = "import json, os, pathlib, sys\nfile = pathlib.Path(sys.argv[-1])\n"
    add = "def add(**line):\n  with file.open('a') as f: print(json.dumps(line), file=f)\n"
    return lambda code: command.compile_elsewhere([sys.executable, "-c", start + add + code], "v5p:2x2x1", 1)


def test_a_compiler_that_ends_its_process_leaves_the_other_programs(child):
    crashing, fine = child(
        "if not file.exists():\n  add(program='rollout', chips=4); os.abort()\n"
        "add(program='update', chips=4); add(program='update', chips=4, fits=True, runs=1, predicted_seconds=2.0)\n"
    )
    assert crashing == {"program": "rollout", "chips": 4, "fits": False,
                        "said": "the compiler was ended by SIGABRT: no result"}  # fmt: skip
    assert fine["fits"]
    found = command.summary("v5p:2x2x1", 1, [crashing, fine])
    assert not found["fits"] and found["predicted_seconds"] is None


def test_what_the_process_refuses_is_refused(child):
    with pytest.raises(Refused, match="^8 rows do not divide$"):
        child("sys.stderr.write('a warning\\nmlrl: 8 rows do not divide\\n'); sys.exit(2)")
    with pytest.raises(Refused, match="was ended by SIGKILL: hm"):
        child("sys.stderr.write('hm'); sys.stderr.flush(); os.kill(os.getpid(), 9)")
    with pytest.raises(Refused, match="gave 3: it said nothing"):
        child("sys.exit(3)")


def test_what_the_compiler_refuses_is_read():
    """The two forms in which it runs out of memory, as it wrote them, and another refusal."""
    whole = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (18.31G) exceeds available HBM (15.75G)."  # noqa: E501
    found = ahead.refusal(whole, CHIPS["v5e"])
    assert found["needed_bytes"] == 18.31 * GIB and found["missing_bytes"] == pytest.approx(2.56 * GIB)
    part = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.10G of 15.75G hbm. Exceeded hbm capacity by 4.35G."  # noqa: E501
    assert ahead.refusal(part, CHIPS["v5e"])["missing_bytes"] == pytest.approx(4.35 * GIB)
    assert ahead.refusal(whole, CHIPS["v4"])["needed_bytes"] == 2 * 18.31 * GIB  # two devices to a chip
    assert ahead.refusal("\nINTERNAL: a bug\nmore", CHIPS["v5e"]) == {"said": "INTERNAL: a bug"}


class Update:
    """A loop of which only the update is compiled."""

    @staticmethod
    def programs(parts):
        return {"update": online.programs(parts)["update"]}


def compile_on(tmp_path, name, loop=online, evaluations=(), **axes):
    """Results by program, and the state's bytes, of tiny programs on the 8 CPU devices as if they were a v5e:2x4."""
    experiment = worlds.sums(reward_fn=worlds.first_digit, minibatches=1, evaluations=evaluations,
                             mesh=functools.partial(meshes.mesh, **axes))  # fmt: skip
    with meshes.on(jax.devices()[:8]):
        parts = online.prepare(experiment)
        ahead.compile_all(loop, parts, "v5e:2x4", tmp_path / name)
    state = online.abstract_state(parts)
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    return {r["program"]: r for r in ahead.read(tmp_path / name)}, size(state.params), size(state.opt_state)


def test_programs_are_compiled_for_the_whole_mesh(tmp_path):
    found, params, moments = compile_on(tmp_path, "data", evaluations=(worlds.EVALUATION,))
    measures = [name for name in found if name not in ("rollout", "update")]
    assert measures == ["evaluation of held_out, 8 rows", "evaluation of held_out, 16 rows"]
    for name in measures:  # of no step
        assert found[name]["runs"] == 0 and found[name]["predicted_phases"].keys() == {"prefill", "decode"}
    update, rollout = found["update"], found["rollout"]
    assert update["chips"] == 8 and update["mesh"]["data"] == 8
    assert update["arguments_bytes"] == pytest.approx(params + moments, rel=0.1)  # a whole copy on each, and rows
    assert update["state_bytes"] == params + moments and update["weights_bytes"] == params
    assert rollout["beside_bytes"] == pytest.approx(moments, rel=0.1)  # sampling does not read Adam's moments
    assert update["output_bytes"] < params  # the new state takes the place of the old one
    reduced = 2 * params * 7 / 8
    assert reduced <= update["sent_bytes"]["all-reduce"] < 3 * reduced  # gradients of prompts and of rows; metrics
    assert rollout["predicted_phases"].keys() == {"prefill", "decode"}
    for result in found.values():
        sizes = [result[f"{part}_bytes"] for part in ("arguments", "temporaries", "output", "code", "beside", "spare")]
        assert result["fits"] and sum(sizes) == CHIPS["v5e"].hbm_bytes

    split, *_ = compile_on(tmp_path, "fsdp", Update, data=1, fsdp=8)
    assert split["update"]["arguments_bytes"] < 0.4 * update["arguments_bytes"]
    assert split["update"]["weights_bytes"] == params  # gathered before they are multiplied with

    words = command.text(command.summary("v5e:2x4", 1, list(found.values())))
    assert "8 chips of v5e" in words and "mesh: data 8" in words and "predicted to take at least" in words
    json.dumps(command.summary("v5e:2x4", 1, list(found.values())), allow_nan=False)


def test_a_mesh_that_leaves_out_chips_is_refused(tmp_path):
    with pytest.raises(Refused, match="mesh has 4 of the 8 devices of v5e:2x4"):
        compile_on(tmp_path, "none", devices=4)
    assert not (tmp_path / "none").exists()


def test_the_text_says_what_does_not_fit_or_is_not_known():
    about = {"chips": 4, "runs": 1, "mesh": {"data": 1, "fsdp": 4}, "fits": False}
    refused = about | {"program": "rollout", "said": "...", "needed_bytes": 20 * GIB, "missing_bytes": 4.25 * GIB}
    aborted = about | {"program": "update", "said": "the compiler was ended by SIGABRT: no result"}
    lines = command.text(command.summary("v5e:2x2", 1, [refused, aborted])).splitlines()
    assert lines[0] == "v5e:2x2: 4 chips of v5e, each with 15.8 GiB for programs; mesh: fsdp 4"
    assert "rollout      does not fit: needs 20 GiB, 4.25 GiB too much" in lines
    assert "update       the compiler was ended by SIGABRT: no result" in lines
    assert "predicted" not in " ".join(lines)
