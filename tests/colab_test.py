"""The notebooks run from their first cell to their last, in a tiny form, and show what they say they show."""

import pathlib
import re

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebook's test needs nbformat: pip install nbclient")
nbclient = pytest.importorskip("nbclient", reason="the notebook's test needs nbclient: pip install nbclient")

REPO = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((REPO / "colab").glob("*.ipynb"))


@pytest.fixture(scope="module", params=["quickstart"])
def executed(request, tmp_path_factory):
    notebook = REPO / "colab" / f"{request.param}.ipynb"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("runs")))
        patch.setenv("MLRL_TINY", "1")
        patch.setenv("PYTHONPATH", str(REPO))
        # One device, and programs that compile fast: they run for two steps.
        patch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
                     "--xla_cpu_use_fusion_emitters=false")  # fmt: skip
        cells = nbformat.read(notebook, as_version=4)
        client = nbclient.NotebookClient(cells, timeout=240, resources={"metadata": {"path": str(notebook.parent)}})
        yield client.execute()  # a cell that fails fails here, with its trace


def cell_with(notebook, words):
    (found,) = (cell for cell in notebook.cells if cell.cell_type == "code" and words in cell.source)
    return found


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures(cell):
    return [output for output in cell.outputs if "image/png" in output.get("data", {})]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs(notebook):
    cells = nbformat.read(notebook, as_version=4).cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells if cell.cell_type == "code")


def test_the_install_cell_does_nothing_where_mlrl_is(executed):
    assert cell_with(executed, "pip").outputs == []


def test_every_stage_trains(executed):
    for words in ("run(offline, warm_up)", "run(online, experiment)"):
        assert "step 2/2" in printed(cell_with(executed, words)), words


def test_curves_are_drawn_inline(executed):
    assert len(pictures(cell_with(executed, '"entropy")'))) == 1


def test_sampled_rows_are_shown_with_their_rewards(executed):
    lines = printed(cell_with(executed, "samples.jsonl")).splitlines()
    assert len(lines) == 8
    assert all(re.search(r"\d\+\d=.* reward [\d.]+   advantage [+-][\d.]+$", line) for line in lines), lines


@pytest.mark.parametrize("executed", ["own_reward"], indirect=True)
def test_own_rewards_are_tried_and_train(executed):
    right, spoiled = printed(cell_with(executed, "spoiled = ")).splitlines()
    assert right.split("reward")[1] == " [1. 1. 1. 1.]  outcome [1. 1. 1. 1.]"
    assert spoiled.endswith("outcome [0. 0. 0. 0.]")
    assert "'13': {'reward': 0.5, 'outcome': 0.0}" in printed(cell_with(executed, "def close"))
    assert "step 2/2" in printed(cell_with(executed, "train(right_digits)"))
    assert "step 2/2" in printed(cell_with(executed, "train(per_completion(close"))
    shown = cell_with(executed, "seconds a step")
    assert len(pictures(shown)) == 1 and printed(shown).count(" seconds a step") == 2
    assert "'reward/close/outcome'" in printed(shown) and printed(shown).count("'unscored_share': 0.0") == 2


@pytest.mark.parametrize("executed", ["self_play"], indirect=True)
def test_a_policy_plays_itself(executed):
    assert "step 2/2" in printed(cell_with(executed, "run(experiment)"))
    assert len(pictures(cell_with(executed, "from_environment/invalid"))) == 1
    table = cell_with(executed, "generate(\n")
    assert len(pictures(table)) == 1 and re.search(r"right move where there is one: 0\.\d\d of 200", printed(table))


@pytest.mark.parametrize("executed", ["reading_a_run"], indirect=True)
def test_a_run_is_read_back(executed):
    assert len(pictures(cell_with(executed, "zero_spread_share"))) == 1
    assert printed(cell_with(executed, "samples.jsonl")).count("step 2: ") == 4
    assert re.search(r"step 2: greedy accuracy [\d.]+ \[[\d.]+, [\d.]+\]", printed(cell_with(executed, "results.json")))
    assert re.search(r"step 2: [\d,]+ parameters", printed(cell_with(executed, "restore_params")))
    (page,) = [o["data"]["text/html"] for o in cell_with(executed, "write_report").outputs if "data" in o]
    assert "<iframe" in page and "seed_0" in page
