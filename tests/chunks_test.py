"""The fastest of a few sizes is found by timing, kept, and never learned from at another size afterwards."""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "loops"))

import worlds  # noqa: E402
from worlds import assert_same, logged  # noqa: E402

from mlrl import chunks, meshes, runs, selection  # noqa: E402
from mlrl.chunks import Sizes, Whole  # noqa: E402
from mlrl.loops import iterated, offline, online, sizing  # noqa: E402
from mlrl.types import Refused  # noqa: E402

SECONDS = {0: 3.0, 8: 1.0, 4: 2.0}


def timer(seconds_of, calls=()):
    def turn_of(sizes):
        def turn():
            calls.append(sizes)
            return seconds_of(sizes)

        return turn

    return turn_of


def by_rows(sizes):
    return SECONDS[sizes.micro_batch_rows] + (0.5 if sizes.score_chunk_columns == 0 else 0.0)


def test_the_least_median_wins_field_after_field():
    candidates = {"micro_batch_rows": (0, 8, 4), "score_chunk_columns": (0, 64)}
    choice = chunks.search(Sizes(), candidates, timer(by_rows, []), 3)
    assert choice.sizes == Sizes(8, 64, 0)
    assert [(line["micro_batch_rows"], line["score_chunk_columns"]) for line in choice.tried] == [
        (0, 0), (8, 0), (4, 0), (8, 64)]  # fmt: skip
    assert choice.tried[1]["seconds"] == 1.5


def test_one_slow_turn_of_the_fastest_does_not_decide():
    given = {0: iter([1.0, 9.0, 1.1]), 8: iter([1.2, 1.2, 1.2])}
    seconds_of = lambda sizes: next(given[sizes.micro_batch_rows])  # noqa: E731
    assert chunks.search(Sizes(), {"micro_batch_rows": (0, 8)}, timer(seconds_of, []), 3).sizes == Sizes()


def test_what_is_clearly_slower_gets_one_turn():
    calls, seconds = [], {8: 1.0, 4: 1.4, 0: 1.6}
    seconds_of = lambda sizes: seconds[sizes.micro_batch_rows]  # noqa: E731
    chunks.search(Sizes(), {"micro_batch_rows": (8, 4, 0)}, timer(seconds_of, calls), 3)
    assert [sizes.micro_batch_rows for sizes in calls] == [8, 8, 8, 4, 4, 4, 0]


def test_what_does_not_fit_is_passed_over_and_nothing_fitting_is_refused():
    def fits_below(limit):
        def turn_of(sizes):
            if not 0 < sizes.micro_batch_rows <= limit:
                raise MemoryError
            return lambda: 1.0

        return turn_of

    candidates = {"micro_batch_rows": (0, 8, 4)}
    choice = chunks.search(Sizes(), candidates, fits_below(4), 2)
    assert choice.sizes == Sizes(4)
    assert [line["seconds"] for line in choice.tried] == [None, None, 1.0]
    with pytest.raises(Refused, match="fits in memory"):
        chunks.search(Sizes(), candidates, fits_below(0), 2)


@pytest.mark.parametrize(("given", "whole", "tried"), [
    ((), Whole(48, 1, 5, 20), (0, 24, 12, 6)),
    ((), Whole(24, 4, 5, 20), (0, 12)),
    ((48, 24), Whole(48, 1, 5, 20), (0, 24)),
    ((7,), Whole(48, 1, 5, 20), "has 7, into which a minibatch of 48 rows"),
    ((6,), Whole(48, 4, 5, 20), "leave out what is no multiple"),
])  # fmt: skip
def test_candidates_divide_the_minibatch(given, whole, tried):
    candidates = chunks.fastest(micro_batch_rows=given).candidates
    if isinstance(tried, str):
        with pytest.raises(Refused, match=tried):
            candidates(whole)
    else:
        assert candidates(whole) == {"micro_batch_rows": tried}


def test_chunks_that_hold_everything_are_tried_once():
    found = chunks.fastest(micro_batch_rows=(0,)).candidates(Whole(8, 1, 600, 50_000))
    assert found == {"score_chunk_columns": (0, 128), "score_chunk_vocabulary": (0, 8192)}


@pytest.mark.parametrize("bad", [{"turns": 0}, {"micro_batch_rows": 8}, {"score_chunk_columns": (-1,)}])
def test_nonsense_is_refused(bad):
    with pytest.raises(Refused, match="fastest"):
        chunks.fastest(**bad)


def sums(cache, **changes):
    sizes = chunks.fastest(micro_batch_rows=(0, 8, 4), score_chunk_columns=(0, 2), turns=1, cache_folder=str(cache))
    return worlds.sums(**{"num_steps": 4, "evaluations": (), "sizes": sizes, **changes})


def trained(folder, experiment, loop=online):
    with runs.Run(folder, experiment.recording) as run:
        return loop.train(experiment, run)


def test_a_run_measures_and_says_so_and_the_next_takes_it_from_the_cache(tmp_path, monkeypatch):
    first = trained(tmp_path / "a", sums(tmp_path / "cache"))
    said = json.loads((tmp_path / "a" / chunks.FILE).read_text())
    assert said["from"] == "measured" and len(said["tried"]) == 4
    assert all(line["seconds"] > 0 for line in said["tried"])
    monkeypatch.setattr(chunks, "search", None)
    second = trained(tmp_path / "b", sums(tmp_path / "cache"))
    again = json.loads((tmp_path / "b" / chunks.FILE).read_text())
    assert again["from"] == "cache" and again["sizes"] == said["sizes"]
    assert_same(first, second)
    # It is the run that has these sizes as set, bit for bit.
    as_set = sums(tmp_path / "cache", sizes=chunks.as_set(), **said["sizes"])
    assert_same(first, trained(tmp_path / "c", as_set))
    assert not (tmp_path / "c" / chunks.FILE).exists()


def kept(folder, cache, about, chosen):
    folder.mkdir()
    found = chunks.kept(folder, chunks.fastest(cache_folder=str(cache)), about, lambda: chunks.Choice(chosen, []))
    assert Sizes(**json.loads((folder / chunks.FILE).read_text())["sizes"]) == found
    return found


def test_other_shapes_are_measured_anew(tmp_path):
    assert kept(tmp_path / "a", tmp_path, {"rows": 8}, Sizes(4)) == Sizes(4)
    assert kept(tmp_path / "b", tmp_path, {"rows": 16}, Sizes(2)) == Sizes(2)
    assert kept(tmp_path / "c", tmp_path, {"rows": 8}, Sizes(1)) == Sizes(4)
    assert len(json.loads((tmp_path / "mlrl_chunks.json").read_text())) == 2


def test_another_machine_measures_anew(tmp_path, monkeypatch):
    kept(tmp_path / "a", tmp_path, {}, Sizes(4))
    monkeypatch.setattr(chunks, "machine", lambda: {"cpu": "another"})
    assert kept(tmp_path / "b", tmp_path, {}, Sizes(2)) == Sizes(2)


def test_an_update_is_about_its_shapes_and_numbers():
    about = [sizing.about_update(online.prepare(worlds.sums(**changes)), {}, Whole(16, 1, 3, 20), online._updating)
             for changes in ({}, {"seed": 3}, {"prompts_per_step": 4}, {"epochs": 2})]  # fmt: skip
    assert about[0] == about[1] and about[0] != about[2] and about[0] != about[3]


def test_a_resumed_run_keeps_its_sizes_whatever_the_cache_says(tmp_path):
    recording = runs.Recording(save_every_steps=2)
    whole = trained(tmp_path / "a", sums(tmp_path / "one", recording=recording))
    said = json.loads((tmp_path / "a" / chunks.FILE).read_text())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / chunks.FILE).write_text(json.dumps(said))
    trained(tmp_path / "b", sums(tmp_path / "two", num_steps=2, recording=recording))
    resumed = trained(tmp_path / "b", sums(tmp_path / "two", recording=recording))
    assert not (tmp_path / "two").exists()
    assert_same(whole, resumed)
    assert logged(tmp_path / "a") == logged(tmp_path / "b")


@pytest.mark.parametrize("damage", ["{", "[1]", ""])
def test_a_damaged_cache_is_no_cache(tmp_path, damage):
    (tmp_path / "mlrl_chunks.json").write_text(damage)
    assert kept(tmp_path / "a", tmp_path, {}, Sizes(4)) == Sizes(4)
    assert len(json.loads((tmp_path / "mlrl_chunks.json").read_text())) == 1


def test_a_cache_that_cannot_be_written_does_not_stop_a_run(tmp_path):
    (tmp_path / "file").write_text("")
    assert kept(tmp_path / "a", tmp_path / "file", {}, Sizes(4)) == Sizes(4)


def test_a_micro_batch_that_does_not_divide_is_refused_before_compiling():
    with pytest.raises(Refused, match="minibatch of 16 rows"):
        online.prepare(worlds.sums(sizes=chunks.fastest(micro_batch_rows=(5,))))


def test_the_other_loops_search_too(tmp_path):
    sizes = chunks.fastest(turns=1, cache_folder=str(tmp_path))
    given = worlds.sums()
    stored = offline.Experiment(task=given.task, num_steps=1, model=worlds.TINY, rows_per_step=16, mesh=given.mesh,
                                rollout_fn=given.rollout_fn, sizes=sizes)  # fmt: skip
    trained(tmp_path / "offline", stored, offline)
    rounds = worlds.round_of_sums(num_rounds=1, sizes=sizes, select_fn=selection.keep_all)
    trained(tmp_path / "iterated", rounds, iterated)
    for name, count in (("offline", 4), ("iterated", 3)):
        assert len(json.loads((tmp_path / name / chunks.FILE).read_text())["tried"]) == count


def test_rows_that_are_timed_are_full_and_begin_with_their_prompts():
    parts = online.prepare(worlds.sums())
    with meshes.use(parts.experiment.mesh()):
        program = online._updating(parts)
        prompts, rollout, rewards = sizing.full_rows(program.arguments[1:], 1, 20)
        _, _, batch = program.function(sizing.random_state(parts), prompts, rollout, rewards)
    same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)  # noqa: E731
    assert all(map(same, jax.tree.leaves((prompts, rollout, rewards)), jax.tree.leaves(program.arguments[1:])))
    width = prompts.tokens.shape[1]
    assert rollout.valid.all() and np.array_equal(rollout.action_mask[:, width:], batch.mask[:, width:])
    assert batch.mask.sum() == rollout.tokens.shape[0] * (rollout.tokens.shape[1] - width)  # all can be read
    np.testing.assert_array_equal(rollout.tokens[:, :width], prompts.tokens[rollout.group])


def test_an_experiment_says_what_leaves_its_programs_alone():
    experiment = worlds.sums()
    same = dataclasses.replace(experiment, seed=5, num_steps=9, micro_batch_rows=4)
    assert sizing._numbers(experiment) == sizing._numbers(same)
    assert sizing._numbers(experiment) != sizing._numbers(dataclasses.replace(experiment, epochs=2))
