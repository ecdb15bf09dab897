"""The notebook runs from its first cell to its last, in a tiny form, and shows what it says it shows."""

import pathlib
import re

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebook's test needs nbformat: pip install nbclient")
nbclient = pytest.importorskip("nbclient", reason="the notebook's test needs nbclient: pip install nbclient")

REPO = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOK = REPO / "colab" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("runs")))
        patch.setenv("MLRL_TINY", "1")
        patch.setenv("PYTHONPATH", str(REPO))
        # One device, and programs that compile fast: they run for two steps.
        patch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        client = nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
        yield client.execute()  # a cell that fails fails here, with its trace


def cell_with(notebook, words):
    (found,) = (cell for cell in notebook.cells if cell.cell_type == "code" and words in cell.source)
    return found


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures(cell):
    return [output for output in cell.outputs if "image/png" in output.get("data", {})]


def test_it_is_committed_without_outputs():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells if cell.cell_type == "code")


def test_the_install_cell_does_nothing_where_mlrl_is(executed):
    assert cell_with(executed, "pip").outputs == []


def test_every_stage_trains(executed):
    for words in ("run(offline, warm_up)", "(graph.arithmetic,", "(right_digits,", "(completions.per_completion("):
        assert "step 2/2" in printed(cell_with(executed, words)), words


def test_curves_are_drawn_inline(executed):
    assert len(pictures(cell_with(executed, '"entropy")'))) == 1
    assert len(pictures(cell_with(executed, 'draw(folders, "accuracy"'))) == 1


def test_sampled_rows_are_shown_with_their_rewards(executed):
    lines = printed(cell_with(executed, "samples.jsonl")).splitlines()
    assert len(lines) == 8
    assert all(re.search(r"\d\+\d=.* reward [\d.]+   advantage [+-][\d.]+$", line) for line in lines), lines
