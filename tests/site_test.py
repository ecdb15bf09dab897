"""The site: every module is on a page of the reference, links outside of docs/ have a place, and all of it builds."""

import pathlib
import re
import subprocess
import sys

import pytest

REPO = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def make_site():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPO / "docs")
        import make_site

        yield make_site


def test_every_module_is_on_one_page_of_the_reference(make_site):
    parts = " ".join(parts for _, parts in make_site.REFERENCE.values()).split()
    shown = [path for part in parts for path in make_site.files_of(part)]
    there = sorted(path for path in (REPO / "mlrl").rglob("*.py") if path.name != "__main__.py")
    assert sorted(shown) == there
    menu = (REPO / "mkdocs.yml").read_text()
    assert set(re.findall(r"reference/(\w+)\.md", menu)) == set(make_site.REFERENCE)


def test_a_docstring_is_shown_as_it_is_written(make_site):
    page = make_site.reference("losses")
    assert "### ppo_clip {#mlrl.losses.policy.ppo_clip}" in page
    assert "clip_high: how far above 1 it may rise; 0.28 in DAPO." in page
    assert "(clip(V, V_old +- value_clip) - return)^2))" in page and "<pre" in page
    text = make_site.as_written("Takes `x`.\n\n    x < y   [B,L]")
    assert text == '<p>Takes <code>x</code>.</p>\n<pre class="docstring">    x &lt; y   [B,L]</pre>\n'
    assert make_site.split_arguments("a: dict[str, int], *, b: tuple[int, int]=(1, 2)") == [
        "a: dict[str, int]", "*", "b: tuple[int, int]=(1, 2)",
    ]  # fmt: skip


@pytest.mark.parametrize("path, uri", [
    ("README.md", "index.md"), ("docs/step.md", "step.md"), ("docs/report.png", "report.png"),
    ("experiments/README.md", "experiments/README.md"), ("mlrl/axes.py", "mlrl/axes.py.md"), ("LICENSE", "LICENSE.md"),
    ("drills", "drills.md"),
])  # fmt: skip
def test_a_file_has_a_place_and_is_found_from_it(make_site, path, uri):
    assert make_site.place(path) == uri
    assert path.endswith(".png") or make_site.origin(uri) == path


def test_links_are_followed_out_of_the_documents(make_site):
    found = make_site.linked(["docs/your_own_method.md"])
    assert {"experiments/laser/README.md", "experiments/laser/pareto.png", "mlrl/rewards/lengths.py"} <= found
    assert not any(path.startswith("docs/") for path in found)


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the site needs mkdocs: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "step.html").read_text()
    assert 'href="mlrl/types.py.html"' in page and "step.svg" in page
    assert "my_rewards.py</code>" in (tmp_path / "index.html").read_text()
    assert "```" not in (tmp_path / "own_reward.html").read_text()
    assert (tmp_path / "reference" / "losses.html").is_file() and not (tmp_path / "make_knobs.py").exists()
