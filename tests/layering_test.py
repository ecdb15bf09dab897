"""Holds the shape of the house: imports point one way, gin stays at the door, heavy packages load late."""

import ast
import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "mlrl"

# Files and folders directly under mlrl/, in blocks. A block imports from itself and from the blocks above it.
# A new file is added to the highest block that is below everything it imports.
BLOCKS = (
    ("the surface", "__init__"),
    ("types", "types processes sandbox"),
    ("arithmetic", "reductions divergences controllers importance groups returns advantages selection metrics "
                   "monitoring batches correction losses"),
    ("data", "tokenizer_files vocabularies tasks prompts stored transcripts curricula data"),
    ("models", "axes meshes home_rows models scoring packing"),
    ("rollout", "sampling generation refilled rollouts environments"),
    ("rewards", "rewards"),
    ("learning", "optimizers updates costs"),
    ("IO", "folders chunks checkpoints profiling writers evaluation evaluation_stored evaluation_attempts "
           "evaluation_games evaluation_judges report runs export"),
    ("loops", "loops"),
    ("pods", "pods"),
    ("the door", "mistakes main __main__"),
)
BLOCK_OF = {name: i for i, (_, names) in enumerate(BLOCKS) for name in names.split()}

HEAVY = {"tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio"}
HEAVY_AT_THE_TOP = {"tasks/seqio_tasks.py"}  # imported only where tasks are read
FORBIDDEN_NAME = re.compile(r"^(utils?|common|base_.*|.*_utils?)$")

FILES = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name, source):
    """(module, at the top?) of every import in the file `name`, as dotted absolute names."""
    package = ["mlrl", *pathlib.PurePosixPath(name).parent.parts]
    found = []

    def visit(node, top):
        if isinstance(node, ast.Import):
            found.extend((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (start, node.module) if part)
            found.extend((f"{module}.{alias.name}", top) for alias in node.names)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, top and not inside)

    visit(ast.parse(source), True)
    return found


def top_name(name):
    return name.split("/")[0].removesuffix(".py")


def files_imported(name, source, files):
    """The files of the package that `name` imports when it is itself imported."""
    reached = set()
    for module, top in imports_of(name, source):
        parts = module.split(".")
        if not top or parts[0] != "mlrl":
            continue
        for length in (len(parts), len(parts) - 1):
            stem = "/".join(parts[1:length])
            reached |= {f for f in (f"{stem}.py", f"{stem}/__init__.py") if stem and f in files}
    own_packages = {f"{parent}/__init__.py" for parent in map(str, pathlib.PurePosixPath(name).parents)}
    return reached - {name} - own_packages


def complaints(name, source):
    """One sentence for every rule that the file breaks."""
    found = []
    for part in name.removesuffix(".py").split("/"):
        if FORBIDDEN_NAME.match(part):
            found.append(f"mlrl/{name}: a file named {part!r} says nothing; name it after what it holds")
    if top_name(name) not in BLOCK_OF:
        return [*found, f"mlrl/{name}: add {top_name(name)!r} to BLOCKS in tests/layering_test.py"]
    mine = BLOCK_OF[top_name(name)]
    for module, top in imports_of(name, source):
        root, _, rest = module.partition(".")
        if root == "gin" and name != "main.py":
            found.append(f"mlrl/{name} imports gin; only mlrl/main.py may")
        if root in HEAVY and top and name not in HEAVY_AT_THE_TOP:
            found.append(f"mlrl/{name} imports {root} at its top; import it inside the function that needs it")
        if root == "mlrl" and rest:
            other = BLOCK_OF.get(rest.split(".")[0], 0)
            if other > mine:
                found.append(f"mlrl/{name} ({BLOCKS[mine][0]}) imports {module} ({BLOCKS[other][0]}), a block below")
    return found


@pytest.mark.parametrize("name", FILES)
def test_a_file_keeps_the_rules_of_the_house(name):
    assert complaints(name, FILES[name]) == []


def test_no_file_imports_itself_through_others():
    graph = {name: files_imported(name, source, FILES) for name, source in FILES.items()}
    done = set()

    def visit(name, path):
        assert name not in path, "a cycle of imports: " + " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_only_a_task_loads_tensorflow():
    """No file outside of tasks/ reaches, through imports at the top, one that loads TensorFlow."""
    graph = {name: files_imported(name, source, FILES) for name, source in FILES.items()}
    for name in FILES:
        reached, new = set(), {name}
        while new:
            reached |= new
            new = set().union(*(graph[other] for other in new)) - reached
        if top_name(name) != "tasks":
            assert not reached & HEAVY_AT_THE_TOP, f"importing mlrl/{name} loads TensorFlow"


@pytest.mark.parametrize(
    "name, source, words",
    [
        ("reductions.py", "from mlrl.updates import update", "a block below"),
        ("reductions.py", "def f():\n    import mlrl.main", "a block below"),
        ("losses/policy.py", "from .. import loops", "a block below"),
        ("updates.py", "import gin", "only mlrl/main.py"),
        ("loops/online.py", "from gin import config", "only mlrl/main.py"),
        ("report.py", "import tensorflow as tf", "inside the function"),
        ("report.py", "try:\n    import seqio\nexcept ImportError:\n    seqio = None", "inside the function"),
        ("losses/utils.py", "", "says nothing"),
        ("base_loss.py", "", "says nothing"),
        ("brand_new.py", "", "BLOCKS"),
    ],
)
def test_the_rules_catch_what_breaks_them(name, source, words):
    assert any(words in complaint for complaint in complaints(name, source))


@pytest.mark.parametrize(
    "name, source",
    [
        ("updates.py", "from mlrl.types import Batch\nfrom mlrl import reductions"),
        ("main.py", "import gin"),
        ("report.py", "def read():\n    import tensorflow"),
        ("losses/policy.py", "from . import surrogates\nimport jax"),
    ],
)
def test_the_rules_let_the_rest_pass(name, source):
    assert complaints(name, source) == []
