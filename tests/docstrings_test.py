"""Docstrings: everything public has one, its shapes are written with declared letters, and its errors are said."""

import ast
import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "mlrl"
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}

# Where a docstring is the equation: arrays in, arrays out.
ARRAYS = re.compile(r"(advantages|losses|rewards)/|(returns|groups|divergences|importance|reductions|selection|metrics|"
                    r"correction|curricula|controllers)\.py")  # fmt: skip

# A shape is what stands in brackets with commas between, or alone: [B,L], [B], [N,C*L], [3,K], [...,V].
SHAPE = re.compile(r"\[((?:[\w.*+ -]+)(?:, ?[\w.*+ -]+)*)\]")
LETTER = re.compile(r"\b\d*([A-Z])\b")


def public(tree):
    """Public functions and classes of a module, and the public methods of the classes that say something."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (inner for inner in node.body if isinstance(inner, ast.FunctionDef)
                            and not inner.name.startswith("_") and ast.get_docstring(inner))  # fmt: skip


def declared():
    """The letters in the table of mlrl/types.py."""
    table = ast.get_docstring(TREES["types.py"]).split("A row is one episode")[0]
    return set(re.findall(r"(?:^| {2})([A-Z]) {2}(?=\S)", table, re.M))


def letters(docstring):
    """The capital letters in its shapes."""
    return {letter for shape in SHAPE.findall(docstring) for letter in LETTER.findall(shape)}


def silent_errors(name, tree):
    """Public functions that refuse what a user gives, themselves, and whose docstring does not say so."""
    for node in public(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        inner = [part for part in ast.walk(node) if isinstance(part, ast.FunctionDef) and part is not node]
        later = {id(part) for function in inner for part in ast.walk(function)}
        calls = [part for part in ast.walk(node) if isinstance(part, ast.Call) and id(part) not in later]
        called = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
        if called & {"Refused", "require_whole"} and not re.search(r"[Rr]efuse", ast.get_docstring(node) or ""):
            yield f"{name}: {node.name}"


@pytest.mark.parametrize("name", TREES)
def test_what_is_public_is_described(name):
    tree = TREES[name]
    assert ast.get_docstring(tree), f"mlrl/{name} says nothing of itself"
    assert [node.name for node in public(tree) if not ast.get_docstring(node)] == []


def test_shapes_are_written_with_declared_letters():
    known, used, unknown = declared(), set(), []
    assert {"B", "L", "N", "G"} <= known
    for name, tree in TREES.items():
        for node in [tree, *public(tree)]:
            found = letters(ast.get_docstring(node) or "")
            used |= found
            unknown += [f"{name}: {getattr(node, 'name', 'module')}: {letter}" for letter in found - known]
    assert unknown == [], "declare the letter in mlrl/types.py, or use one that is"
    assert known - used == {"G"}  # counts, and is the size of no axis


def test_errors_are_said():
    silent = [one for name, tree in TREES.items() if ARRAYS.match(name) for one in silent_errors(name, tree)]
    assert silent == []


def test_the_rules_catch_what_breaks_them():
    assert letters("of x [B,Q] and y [N,C*L], [3,K], [2W], not of [the rest] or [0, 1]") == set("BQNCLKW")
    bad = ast.parse('def f(x):\n    "Takes x."\n    require_whole("f", "x", x, 1)\n')
    assert list(silent_errors("a.py", bad)) == ["a.py: f"]
    later = ast.parse('def f(x):\n    "Takes x."\n    def g():\n        raise Refused("x")\n    return g\n')
    assert list(silent_errors("a.py", later)) == []
