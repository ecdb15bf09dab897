"""The drills can fail, and say so; a few trials of each, as CI does; the rest is `make drills`."""

import json
import pathlib
import sys
import time

import pytest

from drills import __main__ as door
from drills import (
    damage,
    experiments,
    files,
    kills,
    learning,
    mutations,
    page,
    programs,
    rewards,
    soak,
    trials,
)
from drills.trials import Drill, Outcome


def counting(outcomes):
    """A drill whose trials come out as given; and the numbers of those that were made."""
    made = []

    class Prepared:
        def __enter__(self):
            return lambda number: made.append(number) or outcomes[number]()

        def __exit__(self, *_):
            pass

    return Drill("counting", "It counts.", len(outcomes), 1, 0.2, lambda seed, steps: Prepared()), made


def test_trials_that_fail_raise_or_hang_are_counted_and_can_be_repeated(monkeypatch):
    said = []
    drill, _ = counting([lambda: Outcome("a", "fine"), lambda: Outcome("a", "lost", "it is gone"), lambda: 1 / 0,
                         lambda: time.sleep(5)])  # fmt: skip
    monkeypatch.setattr(trials, "commit", lambda: "abc")
    records = trials.run(drill, range(4), 7, say=said.append)
    assert [record["came"] for record in records] == ["fine", "lost", "raised", "hung"]
    assert "  again: python -m drills counting --seed 7 --only 1" in said
    found = page.recorded(drill, records, "a machine")
    assert found["kinds"]["a"] == {"trials": 2, "right": 1, "came": {"fine": 1, "lost": 1}, "minutes": 0.0}
    text = page.markdown({"counting": found})
    assert "| counting | a | 2 | 1 | 1 fine, 1 lost | 0.0 | a machine | abc |" in text
    assert "| counting | all | 4 (4) | 1 |" in text and text.count("python -m drills counting --seed 7 --only") == 3


def test_a_limit_holds_against_handlers_that_catch_all():
    def catches():
        for _ in range(50):
            try:
                time.sleep(0.1)
            except Exception:
                pass
        return Outcome("a", "fine")

    assert trials.judged(lambda _: catches(), 0, 0.2).came == "hung"


def test_a_cut_drill_goes_on_and_other_code_begins_again(tmp_path, monkeypatch):
    drill, made = counting([lambda: Outcome("a", "fine")] * 4)
    kept = tmp_path / "kept" / "counting.jsonl"
    trials.run(drill, range(2), 0, kept=kept)
    with kept.open("a") as file:
        file.write('{"number": 2, "se')  # cut in the middle of a line
    assert len(trials.run(drill, range(4), 0, kept=kept)) == 4 and made == [0, 1, 2, 3]
    trials.run(drill, range(1), 1, kept=kept)
    monkeypatch.setattr(trials, "sources", lambda: "other code")
    trials.run(drill, range(1), 0, kept=kept)
    assert made == [0, 1, 2, 3, 0, 0]


def test_the_page_is_that_of_the_results():
    results = json.loads(door.RESULTS.read_text())
    assert door.PAGE.read_text() == page.markdown(results)
    assert set(results) <= set(door.NAMES)


def test_mistakes_are_those_of_their_seed_and_most_change_something():
    lines = experiments.TEXTS["host"]
    found = [mutations.text(trials.chance("test", seed), lines) for seed in range(50)]
    assert found == [mutations.text(trials.chance("test", seed), lines) for seed in range(50)]
    assert len(set(found)) > 40
    value = {"a": [1, {"b": "c"}], "d": None}
    changed = [mutations.json_value(trials.chance("test", seed), value) for seed in range(50)]
    assert value == {"a": [1, {"b": "c"}], "d": None} and sum(one != value for one in changed) > 40


def short(drill, count, **how):
    """A few trials of a drill; all came out as they must."""
    records = trials.run(drill, range(count), 0, **how)
    assert [record for record in records if record["wrong"]] == []
    return records


def test_mutated_files_are_accepted_rightly_or_refused():
    came = {record["came"] for record in short(files.FILES, 12)}
    assert came == {"accepted", "refused"}


def test_what_is_read_otherwise_than_it_is_written_is_noticed(tmp_path, monkeypatch):
    (folder, *_) = files.rows.write(tmp_path)
    assert files.rows.use(folder) == ""
    read = files.rows.tables.read_jsonl
    monkeypatch.setattr(files.rows.tables, "read_jsonl", lambda path: read(path)[1:])
    assert "rows of" in files.rows.use(folder)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the walls are those of Linux")
def test_hostile_programs_and_rewards_do_no_harm():
    short(programs.PROGRAMS, 8)
    short(rewards.REWARDS, 4)


@pytest.mark.slow
def test_damaged_checkpoints_cost_nothing():
    short(damage.DAMAGE, 5)


@pytest.mark.slow
def test_killed_runs_go_on_to_the_same_bits():
    short(kills.KILLS, 2)


@pytest.mark.slow
def test_a_run_with_broken_rewards_learns_and_says_so():
    short(learning.LEARNING, 1, steps=learning.LEARNING.steps[1])


@pytest.mark.slow
def test_a_short_run_is_flat():
    short(soak.SOAK, 2, steps=soak.SOAK.steps[1])


def soaked(growth=0.0, compiled=0, opened=0, slower=1.0):
    seen = [(step, 1000.0 + growth * step, 20 + opened * (step > 300)) for step in range(0, 501, 5)]
    rows = [{"step": step, "compilations": 3 + (step >= 300) * compiled,
             "tokens_per_second": 100.0 * (slower if step > 300 else 1.0)} for step in range(1, 501)]  # fmt: skip
    return soak.verdict(seen, rows)


def test_the_soak_tells_growth_compilations_and_slowness_from_their_absence():
    assert soaked()["growth_share"] == pytest.approx(0.0, abs=1e-9) and soak.complaints(soaked()) == []
    for change, words in (({"growth": 0.2}, "memory grew by"), ({"compiled": 1}, "compiled after"),
                          ({"opened": 1}, "grew from 20 to 21"), ({"slower": 0.5}, "fell to 50%")):  # fmt: skip
        (said,) = soak.complaints(soaked(**change))
        assert words in said
    assert soaked(compiled=1)["compilations_after"]["300"] == 1


def test_damage_changes_what_it_says(tmp_path):
    for kind in damage.KINDS:
        last = tmp_path / kind / "4" / "state"
        last.mkdir(parents=True)
        (last / "data").write_bytes(bytes(64))
        said = damage.damage(trials.chance(kind), kind, tmp_path / kind)
        assert said.startswith("4/state")
        assert not (last / "data").is_file() or (last / "data").read_bytes() != bytes(64)


def test_the_command_refuses_a_drill_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["drills", "nothing"])
    with pytest.raises(SystemExit):
        door.main()
    assert "there is no drill nothing: there are kills, " in capsys.readouterr().err
    assert pathlib.Path(door.HERE, "__main__.py").is_file() and set(door.NAMES) >= {"kills", "files", "soak"}
