"""Settings that are trained together are the runs that each would be alone."""

import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import worlds  # noqa: E402
from seeds_test import GIN  # noqa: E402
from worlds import assert_same, logged  # noqa: E402

from mlrl import chunks, main, optimizers, runs  # noqa: E402
from mlrl.loops import online, seeds, sweeps  # noqa: E402
from mlrl.losses import policy, regularizers  # noqa: E402
from mlrl.types import Refused  # noqa: E402

RECORDING = runs.Recording(save_every_steps=2, samples_every_steps=2, phases_every_steps=0)
SWEPT = GIN.replace("@graph.arithmetic\n", "@graph.random()\n") + """
from mlrl import optimizers
from mlrl import sampling
from mlrl.losses import policy
LR = 1e-3
CLIP = 0.2
optimizers.adamw.learning_rate = %LR
policy.ppo_clip.clip_high = %CLIP
sampling.Sampling.temperature = 1.0
online.Experiment.minibatches = 4
"""


def sums(strength, seed=0, **changes):
    """Everything that is a number depends on `strength`."""
    rate = optimizers.warmup_then_constant(peak=strength * 3e-2, warmup_steps=2)
    losses = (functools.partial(policy.ppo_clip, clip_low=strength / 50, clip_high=strength / 20),
              functools.partial(regularizers.entropy_bonus, entropy_coef=strength / 10))  # fmt: skip
    given = dict(num_steps=4, evaluations=(), recording=RECORDING, losses=losses, seed=seed,
                 optimizer=optimizers.adamw(learning_rate=rate))  # fmt: skip
    return worlds.sums(**{**given, **changes})


def variants_of(folder, strengths, chosen, **changes):
    return [
        seeds.Variant(online.prepare(sums(strength, **changes)), [sums(strength, seed, **changes) for seed in chosen],
                      [folder / f"S={strength}" / f"seed_{seed}" for seed in chosen], name=f"S={strength}")
        for strength in strengths
    ]  # fmt: skip


def together(folder, **changes):
    return seeds.train(variants_of(folder, (0.5, 1.0), (0, 1), **changes))


def alone(folder, experiment):
    with runs.Run(folder, experiment.recording) as run:
        return online.train(experiment, run)


def distance(state, other):
    each = jax.tree.map(lambda a, b: np.max(np.abs(np.asarray(a) - np.asarray(b))), state.params, other.params)
    return max(jax.tree.leaves(each))


def test_each_is_the_run_that_it_is_alone_and_goes_on_bitwise(tmp_path):
    """In a process that rounds products before it adds to them. Where a processor need not, two programs round in other
    places, and were 1.4e-6 apart on one.
    """
    given = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_cpu_max_isa=AVX"}
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def check_each(tmp_path):
    states = together(tmp_path / "whole")  # both seeds of 0.5, then of 1.0
    single = alone(tmp_path / "alone", sums(1.0, 1))
    assert distance(states[3], single) < 1e-6
    assert distance(states[1], single) > 1e-3 and distance(states[2], single) > 1e-3  # another setting, another seed
    for line, same in zip(logged(tmp_path / "alone"), logged(tmp_path / "whole/S=1.0/seed_1"), strict=True):
        assert same == pytest.approx(line, rel=1e-4, abs=1e-5, nan_ok=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for later in (tmp_path / "parts").glob("*/*/checkpoints/4"):
        shutil.rmtree(later)
    for state, resumed in zip(states, together(tmp_path / "parts"), strict=True):
        assert_same(state, resumed)


@pytest.mark.parametrize(("changes", "words"), [
    ([{}, {"group_size": 2}], "32 or 16"),
    ([{}, {"num_steps": 5}], "num_steps is not the same"),
    ([{}, {"losses": (functools.partial(regularizers.kl_penalty, kl_coef=0.1), policy.ppo_clip)}],
     "states are of different shapes"),
], ids=["shapes", "steps", "reference"])  # fmt: skip
def test_what_is_not_one_program_is_refused(tmp_path, changes, words):
    made = [sums(1.0, **more) for more in changes]
    variants = [seeds.Variant(online.prepare(e), [e], [tmp_path / str(i)], name=f"S={i}") for i, e in enumerate(made)]
    with pytest.raises(Refused, match=f"S=0 and S=1 are not one program, since .*{words}.*--gin.NAME"):
        seeds.train(variants)


def test_lists_of_values_make_a_grid():
    assert sweeps.settings([]) == [{}]
    grid = sweeps.settings(["LR=1e-4, 3e-4", "f.x=(1, 2),'a,b'"])
    assert grid == [{"LR": a, "f.x": b} for a in ("1e-4", "3e-4") for b in ("(1, 2)", "'a,b'")]
    assert [sweeps.name_of(setting) for setting in grid[:2]] == ["LR=1e-4,f.x=(1,_2)", "LR=1e-4,f.x='a,b'"]


@pytest.mark.parametrize(("given", "words"), [
    (["LR"], "write --sweep NAME=VALUE,VALUE"), (["LR=1,"], "write --sweep"), (["=1,2"], "write --sweep"),
    (["LR=1"], "write --gin.LR=1"), (["LR=1,2,1"], "no two alike"), (["SEED=1,2"], "--seeds S"),
    (["LR=1,2", "LR=3,4"], "LR twice"),
])  # fmt: skip
def test_what_is_no_list_is_refused(given, words):
    with pytest.raises(Refused, match=words):
        sweeps.settings(given)


def test_the_command_line_trains_values_that_gin_binds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("e.gin").write_text(SWEPT)
    sweep = ["--sweep", "CLIP=0.0001,0.3", "--sweep", "sampling.Sampling.temperature=0.8,1.2"]
    assert main.main(["train", "e.gin", "--run_dir", "out", "--report", "--gin.LR=3e-2", *sweep]) == 0
    assert "report: out" in capsys.readouterr().out
    found = {path.name: logged(path / "seed_3")[-1] for path in pathlib.Path("out").iterdir() if path.is_dir()}
    assert len({(line["grad_norm"], line["entropy"]) for line in found.values()}) == 4
    page = pathlib.Path("out/report.html").read_text()
    for name in found:
        clip = name.split(",")[0].split("=")[1]
        assert f"\nCLIP = {clip}\n" in pathlib.Path("out", name, "seed_3", "config.gin").read_text()
        assert f"\nCLIP = {clip}\n" in pathlib.Path("out", name, "seed_3", "operative_config.gin").read_text()
        assert f'"name":"{name}/seed_3"' in page
    one = ["--gin.LR=3e-2", "--gin.CLIP=0.3", "--gin.sampling.Sampling.temperature=0.8"]
    assert main.main(["train", "e.gin", "--run_dir", "alone", *one]) == 0
    line = logged("alone")[-1]
    same = {name: found["CLIP=0.3,sampling.Sampling.temperature=0.8"][name] for name in line}
    assert same == pytest.approx(line, rel=1e-4, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize(("given", "words"), [
    (["--sweep", "NOT_A_MACRO=1,2"], "nothing uses the macro NOT_A_MACRO"),
    (["--sweep", "LR=1,2", "--profile_steps", "1"], "leave out --seeds and --sweep"),
    (["--sweep", "LR=1e-3,2e-3", "--gin.online.Experiment.steps_ahead=1"], "a step ahead .* --gin.LR=1e-3"),
])  # fmt: skip
def test_the_command_line_refuses_in_one_line(tmp_path, monkeypatch, capsys, given, words):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("e.gin").write_text(SWEPT)
    assert main.main(["train", "e.gin", "--run_dir", "out", *given]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(words, said), said
    assert not pathlib.Path("out").exists()


def test_sizes_found_by_timing_are_those_of_all(tmp_path):
    sizes = chunks.fastest(micro_batch_rows=(0, 8), turns=1, cache_folder=str(tmp_path / "cache"))
    variants = variants_of(tmp_path, (0.5, 1.0), (0,), sizes=sizes)
    for variant in variants:
        variant.folders[0].mkdir(parents=True)
    settled = seeds._settled(variants)
    said = [json.loads((tmp_path / f"S={s}" / "seed_0" / chunks.FILE).read_text()) for s in (0.5, 1.0)]
    assert said[0] == said[1]
    found = said[0]["sizes"]["micro_batch_rows"]
    assert {own.experiment.micro_batch_rows for variant in settled for own in variant.alone()} == {found}


if __name__ == "__main__":
    check_each(pathlib.Path(sys.argv[1]))
