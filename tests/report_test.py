"""The report: one safe and self-contained page, whose numbers are those of the run folders."""

import html
import json
import math
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest

from mlrl import report
from mlrl.report import curves, reading
from mlrl.types import Refused

CONFIG = "from mlrl.loops import online\nSEED = {seed}\nExperiment.seed = %SEED\nadam.learning_rate = {rate}\n"
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \u2028 http://evil.example"


def make_run(folder, seed=0, rate=0.1, steps=12, offset=0.0, completion="12"):
    folder.mkdir(parents=True)
    (folder / "config.gin").write_text(CONFIG.format(seed=seed, rate=rate))
    lines, samples = [], []
    for step in range(1, steps + 1):
        lines.append({
            "step": step, "reward": step / steps + offset, "reward/exact": 0.5, "accuracy": step / steps,
            "grad_norm": None if step == 3 else 1.0, "length/mean": 4.0, "seconds/rollout": 1.0, "seconds/update": 2.0,
            "seconds/step": 4.0, "tokens_per_second": 1000.0, "somebody's own": 7.0,
        })  # fmt: skip
        samples.append({
            "step": step, "prompt": "1+1=", "completion": completion, "tokens": [completion, ""],
            "log_probs": [-0.51234567, None], "advantages": [1.0, -1.0], "reward": 1.0, "outcome": 1.0, "scored": True,
            "truncated": False, "parts": {"exact": 1.0},
        })  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    greedy = lambda step: {"value": step / 24 + offset, "low": step / 24 - 0.1, "high": 0.9}  # noqa: E731
    found = [{"step": step, "task": "sums", "metrics": {"greedy": greedy(step)}} for step in (0, steps)]
    (folder / "results.json").write_text(json.dumps({"evaluations": found}))
    return folder


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text()).group(1))


def panel(data, name):
    (found,) = [p for section in data["sections"] for p in section["panels"] if p["name"] == name]
    return found


def test_runs_that_differ_in_seeds_are_one_experiment_with_an_interval(tmp_path):
    folders = [make_run(tmp_path / f"quick-seed{seed}", seed=seed, offset=seed / 10) for seed in range(3)]
    folders.append(make_run(tmp_path / "slow", rate=0.01))
    page = report.write_report(folders, tmp_path / "out" / "report.html")
    assert page == tmp_path / "out" / "report.html"
    data = data_of(page)
    assert [(s["name"], len(s["runs"])) for s in data["studies"]] == [("quick", 3), ("slow", 1)]
    quick, slow = panel(data, "reward")["series"]
    assert quick["x"] == list(range(1, 13)) and quick["n"] == [3] * 12
    # rewards 1/12 + (0, 0.1, 0.2): mean 0.18333, std 0.1, t(2) = 4.30265, half 0.248414
    assert quick["mean"][0] == pytest.approx(0.183333, abs=1e-5)
    assert quick["high"][0] - quick["mean"][0] == pytest.approx(0.248414, abs=1e-5)
    assert slow["low"] == [None] * 12 and slow["mean"][-1] == 1.0
    assert data["differences"][0]["lines"] == ["-adam.learning_rate = 0.1", "+adam.learning_rate = 0.01"]


def test_the_page_needs_nothing_else_and_runs_nobodys_markup(tmp_path):
    folder = make_run(tmp_path / "a&b<i>", completion=EVIL)
    text = report.write_report([folder], tmp_path / "r.html").read_text()
    assert text.lower().count("<script") == 2 and text.lower().count("</script>") == 2
    assert "<img" not in text and "<title>a&amp;b&lt;i&gt; - mlrl report</title>" in text
    code = re.sub(r'<script type="application/json" id="data">.*?</script>', "", text)
    assert set(re.findall(r"https?://[^\"'\s)]*", code)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"(inner|outer|Adjacent)HTML|document\.write|\beval\(|fetch\(|@import|url\((?!#)", code)
    row = data_of(tmp_path / "r.html")["samples"][0]["rows"][0]
    assert row["completion"] == EVIL and row["tokens"] == [EVIL, ""] and row["log_probs"] == [-0.5123, None]


def test_everything_that_was_logged_is_drawn_once(tmp_path):
    data = data_of(report.write_report([make_run(tmp_path / "a")], tmp_path / "r.html"))
    drawn = [p["name"] for section in data["sections"] for p in section["panels"]]
    assert sorted(drawn) == sorted([
        "sums greedy", "reward", "accuracy", "reward/exact", "grad_norm", "length/mean", "tokens_per_second",
        "seconds/step", "somebody's own",
    ])  # fmt: skip
    assert panel(data, "grad_norm")["series"][0]["mean"][2] is None  # what was not finite is a gap
    greedy = panel(data, "sums greedy")["series"][0]
    assert (greedy["x"], greedy["mean"], greedy["low"], greedy["high"]) == ([0, 12], [0, 0.5], [-0.1, 0.4], [0.9, 0.9])
    assert data["studies"][0]["times"] == {"update": 24.0, "rollout": 12.0, "other": 12.0}
    assert data["evaluations"][0]["rows"][1] == ["12", "0.500 [0.400, 0.900]"]
    numbers = {n["name"]: n for n in data["studies"][0]["numbers"]}
    assert (numbers["sums greedy"]["before"], numbers["sums greedy"]["value"]) == (0, 0.5)
    assert numbers["accuracy"]["value"] == 1.0 and numbers["accuracy"]["low"] is None
    assert "reward" not in numbers  # it is the accuracy here


def test_a_supervised_run_is_read_for_its_loss(tmp_path):
    (tmp_path / "sft").mkdir()
    lines = ['{"step": 1, "loss": 2.0}', '{"step": 2, "loss": NaN}', '{"step": 3, "lo']  # the last is being written
    (tmp_path / "sft" / "metrics.jsonl").write_text("\n".join(lines))
    data = data_of(report.write_report([tmp_path / "sft"], tmp_path / "r.html"))
    assert [(s["title"], [p["name"] for p in s["panels"]]) for s in data["sections"]] == [("Learning", ["loss"])]
    assert panel(data, "loss")["series"][0]["mean"] == [2.0, None]
    assert [(n["name"], n["value"]) for n in data["studies"][0]["numbers"]] == [("loss", 2.0)]
    assert "sft: 2 steps" in report.summary_table(tmp_path / "sft")


def test_of_many_evaluations_the_greedy_ones_and_the_means_are_final_numbers(tmp_path):
    item = [reading.Evaluated(0, 0.25), reading.Evaluated(9, 0.5)]
    names = ("sums greedy", "sums mean@4", "sums pass@4", "sums maj@4")
    metrics = {"reward": {1: 1.0}, "accuracy": {1: 1.0}, "seconds/step": {1: 2.0}}
    run = reading.RunLog(tmp_path, metrics, {name: item for name in names}, [], "")
    study = reading.Study("a", [run])
    assert [n["name"] for n in curves.final_numbers(study)] == ["sums greedy", "sums mean@4", "accuracy"]
    assert [p["name"] for p in curves.panels([study])[0]["panels"]] == [
        "sums greedy", "reward", "accuracy", "sums mean@4", "sums pass@4", "sums maj@4"]  # fmt: skip
    assert curves.times(study) == {"whole step": 2.0}


def test_long_runs_are_averaged_in_bins(tmp_path):
    run = reading.RunLog(tmp_path, {"reward": {step: float(step % 2) for step in range(1, 2001)}}, {}, [], "")
    binned = curves.curve([run], "reward")
    assert len(binned["x"]) == 500 and set(binned["mean"]) == {0.5} and binned["x"][:2] == [2.5, 6.5]


def test_many_samples_are_thinned_out(tmp_path):
    rows = [{"step": step, "tokens": ["x"] * 1000, "log_probs": [0.0], "advantages": [0.0]} for step in range(1000)]
    run = reading.RunLog(tmp_path, {"reward": {0: 0.0}}, {}, rows, "")
    (kept,) = curves.samples([run])
    steps = [row["step"] for row in kept]
    assert sum(len(row["tokens"]) for row in kept) <= curves.MAX_SAMPLED_TOKENS
    assert len(steps) == 150 and steps[0] == 0 and steps[-1] == 999


def test_lengths_are_compared_between_the_start_and_the_end(tmp_path):
    rows = [{"step": s, "tokens": ["x"] * (10 if s < 5 else 3)} for s in range(1, 10)]
    found = curves.lengths([reading.RunLog(tmp_path, {}, {}, rows, "")])
    assert found["rows"] == {"first third": 3, "last third": 3}
    assert found["shares"]["first third"][10] == 1.0 and found["shares"]["last third"][3] == 1.0
    assert curves.lengths([reading.RunLog(tmp_path, {}, {}, [], "")]) is None


def test_interval_is_students():
    mean, low, high = curves.interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * np.std([1, 2, 3, 4], ddof=1) / 2
    assert mean == 2.5 and high - mean == pytest.approx(half, rel=1e-5) and mean - low == pytest.approx(half, rel=1e-5)
    assert curves.interval([5.0, math.nan])[0] == 5.0 and math.isnan(curves.interval([5.0, math.nan])[1])
    assert all(math.isnan(x) for x in curves.interval([]))


def test_names_of_experiments():
    assert reading._common_name(["quick-seed0", "quick-seed1", "quick-seed10"]) == "quick"
    assert reading._common_name(["grpo_s1", "grpo_s2"]) == "grpo"
    assert reading._common_name(["a", "b"]) == "a" and reading._common_name(["only-seed3"]) == "only-seed3"


def test_seeds_are_no_difference_but_other_things_are(tmp_path):
    runs = [reading.read_run(make_run(tmp_path / "a" / str(i), seed=i, rate=rate)) for i, rate in enumerate((1, 1, 2))]
    assert [[run.name for run in study.runs] for study in reading.grouped(runs)] == [["0", "1"], ["2"]]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("metrics.jsonl", '{"step": 1, "reward": 1}\n{"step": 2, "rew\n{"step": 3}\n', "metrics.jsonl:2 is not JSON"),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl:1 is not an object with a step"),
        ("metrics.jsonl", '{"step": 1', "has no metrics yet"),
        ("results.json", '{"evaluations": [{"task": "sums"}]}', "results.json is malformed"),
        ("results.json", "{", "results.json is malformed"),
    ],
)  # fmt: skip
def test_malformed_files_are_named(tmp_path, name, text, message):
    folder = make_run(tmp_path / "a")
    (folder / name).write_text(text)
    with pytest.raises(Refused, match=message) as refusal:
        report.write_report([folder], tmp_path / "r.html")
    assert "\n" not in str(refusal.value) and not (tmp_path / "r.html").exists()


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(Refused, match="is not a run folder: it has no metrics.jsonl"):
        report.write_report([tmp_path], tmp_path / "r.html")
    with pytest.raises(Refused, match="at least one run folder"):
        report.write_report([], tmp_path / "r.html")
    folder = make_run(tmp_path / "a")
    with pytest.raises(Refused, match="cannot write"):
        report.write_report([folder], folder / "metrics.jsonl" / "r.html")


def test_the_summary_is_a_short_table(tmp_path):
    lines = report.summary_table(make_run(tmp_path / "a")).splitlines()
    assert lines[0] == "a: 12 steps in 48s"
    assert lines[1] == "  sums greedy        step 0: 0.000 [-0.100, 0.900]  step 12: 0.500 [0.400, 0.900]"
    assert lines[2].split() == ["reward", "first", "0.083", "last", "1.000"]
    assert lines[-1].split() == ["tokens_per_second", "first", "1,000", "last", "1,000"]
    assert len({line.index("last") for line in lines[2:]}) == 1  # in columns


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def opened(page, folder, width, script):
    """The page as a browser has it once its scripts have run, and `script` after them."""
    watched = pathlib.Path(folder, "watched.html")
    watch = f"<script>addEventListener('error', e => document.title = 'FAILED ' + e.message);{script}</script><style>"
    watched.write_text(page.read_text().replace("<style>", watch, 1))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
               "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=10000",
               "--allow-file-access-from-files", f"--window-size={width},800",
               f"--user-data-dir={folder / 'profile'}", "--dump-dom", watched.as_uri()]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine to open the page in")
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desk"])
def test_runs_lie_over_each_other_on_a_phone_and_on_a_desk(tmp_path, width):
    folders = [make_run(tmp_path / f"quick-seed{seed}", seed=seed, offset=seed / 10) for seed in range(3)]
    folders.append(make_run(tmp_path / "slow", rate=0.01))
    page = report.write_report(folders, tmp_path / "r.html")
    # A window is never narrower than a browser's least: a frame is as narrow as it is told.
    frame = tmp_path / "frame.html"
    frame.write_text(f'<style></style><body><iframe src="{page.as_uri()}" width="{width}" height="800"></iframe>')
    script = """addEventListener('load', () => setTimeout(() => {
        const page = frames[0].document, plot = page.querySelectorAll('svg[role="img"]')[1], box = page.documentElement;
        document.title = JSON.stringify({wide: box.scrollWidth - box.clientWidth, width: box.clientWidth,
          inside: plot.getBoundingClientRect().right <= box.clientWidth, words: page.body.textContent,
          bands: plot.querySelectorAll('path[opacity="0.18"]').length,
          lines: plot.querySelectorAll('path[stroke-width="1.8"]').length})}, 500))"""
    dom = opened(frame, tmp_path, 1400, script)
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", dom, re.S)[1]))
    words = found.pop("words")
    assert width - 20 <= found.pop("width") <= width
    assert found == {"wide": 0, "inside": True, "bands": 1, "lines": 2}  # rewards: one run alone has no interval
    assert "-adam.learning_rate = 0.1" in words and "+adam.learning_rate = 0.01" in words


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine to open the page in")
def test_a_real_browser_draws_it_without_a_complaint(tmp_path):
    page = report.write_report([make_run(tmp_path / "a", completion=EVIL)], tmp_path / "r.html")
    dom = opened(page, tmp_path, 1280, "ResizeObserver.prototype.observe = () => {}")  # drawn before any frame
    assert "<title>a - mlrl report</title>" in dom
    assert dom.count('role="img"') == 5  # greedy, reward, accuracy, grad_norm with its gap, lengths
    assert 'class="mono">length/mean</span> 4<' in dom  # what never changes is told in words
    assert "Where the time went" in dom and "&lt;/script&gt;&lt;script&gt;alert(1)" in dom
