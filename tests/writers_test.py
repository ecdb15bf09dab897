"""Logs: every step once, also after a kill; valid JSON; an event file that TensorBoard reads, without TensorFlow."""

import io
import json
import logging
import math
import pathlib
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from mlrl import writers
from mlrl.types import Refused


def rows(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_a_step_is_one_line_with_step_first(tmp_path):
    log = writers.open_writers(tmp_path)
    log.write(1, {"reward": jnp.float32(0.5), "accuracy": np.float64(0.25), "compilations": 3})
    assert (tmp_path / "metrics.jsonl").read_text().startswith('{"step": 1, "reward": 0.5')  # flushed at once
    log.write(2, {"reward": math.nan, "loss": -math.inf})
    log.close()
    assert rows(tmp_path / "metrics.jsonl") == [
        {"step": 1, "reward": 0.5, "accuracy": 0.25, "compilations": 3},
        {"step": 2, "reward": None, "loss": None},
    ]


def test_samples_are_plain_json(tmp_path):
    log = writers.open_writers(tmp_path)
    row = {"step": 1, "completion": "é\ud800\n", "log_probs": np.float32([-0.5, np.nan]), "parts": {"exact": 1.0}}
    log.write_samples([row, row])
    log.close()
    found = rows(tmp_path / "samples.jsonl")
    assert len(found) == 2 and found[0]["log_probs"] == [-0.5, None] and found[0]["completion"] == "é\ud800\n"


def test_a_resumed_run_logs_every_step_once(tmp_path, caplog):
    log = writers.open_writers(tmp_path)
    for step in range(6):
        log.write(step, {"reward": float(step)})
        log.write_samples([{"step": step, "completion": "a"}, {"step": step, "completion": "b"}])
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')  # killed here
    log = writers.open_writers(tmp_path, resume_step=3)
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    log.write(4, {"reward": 40.0})
    log.close()
    assert [(row["step"], row["reward"]) for row in rows(tmp_path / "metrics.jsonl")][-2:] == [(3, 3.0), (4, 40.0)]
    assert [row["step"] for row in rows(tmp_path / "samples.jsonl")] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert not caplog.records
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("[1, 2]\n")
    with caplog.at_level(logging.WARNING, "mlrl"):
        writers.open_writers(tmp_path, resume_step=9).close()
    assert "metrics.jsonl:6 is not a JSON object" in caplog.text
    assert len(rows(tmp_path / "metrics.jsonl")) == 5
    writers.open_writers(tmp_path, resume_step=0).close()
    assert rows(tmp_path / "metrics.jsonl") == [] and rows(tmp_path / "samples.jsonl") == []


def test_a_metric_is_one_number(tmp_path):
    log = writers.open_writers(tmp_path)
    with pytest.raises(Refused, match=r"metric 'reward' must be one number a step, got \(3,\)"):
        log.write(0, {"reward": jnp.zeros(3)})
    with pytest.raises(Refused, match="metric 'note' must be one number a step, got str"):
        log.write(0, {"note": "hello"})
    log.close()


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="cannot write in"):
        writers.open_writers(tmp_path / "file" / "run")


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="this system has no /dev/full to write to")
def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = writers.open_writers(tmp_path)
    with pytest.raises(Refused, match="cannot write .*metrics.jsonl .No space left on device.: make room"):
        log.write(1, {"reward": 1.0})
    log.close()


def test_tensorboard_reads_the_events_and_hides_undone_steps(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = writers.open_writers(tmp_path)
    for step in range(4):
        log.write(step, {"reward": step / 2, "loss": math.nan})
    log.close()
    log = writers.open_writers(tmp_path, resume_step=2)
    log.write(3, {"reward": 30.0})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 30.0)]
    assert math.isnan(events.Scalars("loss")[0].value)


def test_what_was_logged_is_kept_where_files_are_stored_only_as_they_are_closed(tmp_path, monkeypatch):
    """As in a bucket that is mounted: what is in `stored` is what a machine that vanishes leaves behind."""
    stored, opened = {}, pathlib.Path.open

    def opening(path, mode="r", **more):
        file = opened(path, mode, **more)
        if mode in ("a", "ab"):
            close = file.close
            monkeypatch.setattr(file, "close", lambda: (close(), stored.update({path.name: path.read_bytes()})))
        return file

    monkeypatch.setattr(pathlib.Path, "open", opening)
    log = writers.open_writers(tmp_path)
    for step in (1, 2):
        log.write(step, {"reward": 0.25})
        log.write_samples([{"step": step}])
        log.settle()
        texts = {name.partition(".tfevents")[0]: content for name, content in stored.items()}
        assert texts["metrics.jsonl"].count(b"0.25") == texts["samples.jsonl"].count(b"step") == step
        assert texts["events.out"].count(b"reward") == step
    log.close()


def test_writing_does_not_import_tensorflow(tmp_path):
    code = (
        "import sys; from mlrl import writers\n"
        f"log = writers.open_writers({str(tmp_path)!r}); log.write(0, {{'a': 1.0}}); log.close()\n"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(__file__).resolve().parent.parent)


def test_wandb_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    writers.open_writers(tmp_path).close()
    with pytest.raises(Refused, match="pip install wandb"):
        writers.open_writers(tmp_path, wandb=True)
    logged, run = [], types.SimpleNamespace(finish=lambda: logged.append("finished"))
    run.log = lambda values, step: logged.append((step, values))
    fake = types.SimpleNamespace(init=lambda **knobs: logged.append(knobs) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "config.gin").write_text("SEED = 1\n")
    for resume_step in (0, 5):
        log = writers.open_writers(tmp_path, wandb=True, resume_step=resume_step)
        log.write(resume_step + 1, {"reward": 1.0})
        log.close()
    first, *_, again, _, _ = logged
    assert logged[1:3] == [(1, {"reward": 1.0}), "finished"]
    assert first["id"] == again["id"] and first["resume"] == "allow" and first["config"] == {"config.gin": "SEED = 1\n"}


class Terminal(io.StringIO):
    def isatty(self):
        return True


METRICS = {"reward": 0.5, "accuracy": 0.25, "tokens_per_second": 12345.0}


def test_progress_in_plain_lines():
    out = io.StringIO()
    bar = writers.progress_bar(3, stream=out, every_seconds=0.0, title="warm start")
    for step in (1, 2, 3):
        bar.update(step, METRICS | ({"eval/sums/greedy": 0.75} if step == 3 else {}))
    bar.close()
    first, *_, evaluation, last = out.getvalue().splitlines()
    assert first.startswith("warm start: step 1/3  reward 0.500  accuracy 0.250  12.3k tokens/s")
    assert evaluation == "warm start: evaluation after step 3: sums/greedy 0.750"
    assert last.endswith("0s left")


def test_plain_lines_are_seldom_and_the_last_one_is_certain():
    out = io.StringIO()
    bar = writers.progress_bar(50, stream=out, every_seconds=1e6)
    for step in range(1, 51):
        bar.update(step, {"loss": 2.0})
    assert out.getvalue() == "step 50/50  loss 2.000  0s left\n"


def test_progress_on_a_terminal_and_quiet():
    out = Terminal()
    bar = writers.progress_bar(4, first_step=2, stream=out)
    bar.update(3, METRICS | {"eval/sums/greedy": 0.75})
    bar.update(4, METRICS)
    bar.close()
    assert "4/4" in out.getvalue() and "reward 0.500" in out.getvalue() and "evaluation after step 3" in out.getvalue()
    assert "goes on after step 2 of 4" in out.getvalue()
    out = Terminal()
    bar = writers.progress_bar(4, stream=out, quiet=True)
    bar.update(4, METRICS | {"eval/sums/greedy": 0.75})
    bar.close()
    assert out.getvalue() == ""


@pytest.mark.parametrize("seconds, text", [(5.4, "5s"), (65, "1m05s"), (7260, "2h01m"), (math.nan, "?")])
def test_clock(seconds, text):
    assert writers._clock(seconds) == text
