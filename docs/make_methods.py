"""Makes docs/methods.md from the files of gin/methods: `python docs/make_methods.py`. A test holds that it is
up to date.

What a method is, and what of its paper is left out, is what its file says at its head; what it is made of are the
functions that the file names.
"""

from __future__ import annotations

import importlib
import pathlib
import re
import sys

REPO = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # this working tree, not that of an install

METHODS = REPO / "gin" / "methods"
LOOPS = {"online": "Online: every step samples rows, rewards them and learns from them",
         "iterated": "Iterated: every round samples many rows, keeps some and learns from these",
         "offline": "Offline: rows that are stored"}  # fmt: skip
HEAD = """# Methods

Made from [gin/methods](../gin/methods) by `python docs/make_methods.py`. A method is a short file that names its
functions: their docstrings hold the equations and the papers. Take one by `include 'gin/methods/NAME.gin'`, change it
by binding what it binds below the include; [your_own_method.md](your_own_method.md) shows how a paper becomes one.
"""


def methods_page() -> str:
    """The whole page: the names by loop, then a paragraph for each."""
    parts, sections = [HEAD], []
    for loop, title in LOOPS.items():
        names = [path.stem for path in sorted(METHODS.glob("*.gin")) if loop_of(path) == loop]
        parts += [f"{title}:\n{', '.join(f'[{name}](#{name})' for name in names)}.", ""]
        sections += [of_method(METHODS / f"{name}.gin") for name in names]
    return "\n".join(parts + sections)


def loop_of(path: pathlib.Path) -> str:
    """The loop whose file it includes, or the file that it includes does."""
    (included, *_) = re.findall(r"include 'gin/(\w+)/(\w+)\.gin'", path.read_text())
    return included[1] if included[0] == "loops" else loop_of(METHODS / f"{included[1]}.gin")


def of_method(path: pathlib.Path) -> str:
    """Its heading, what its file says of it, and what it is made of."""
    text = path.read_text()
    words = " ".join(line.removeprefix("#").strip() for line in text.split("from __gin__")[0].splitlines())
    base = re.findall(r"include 'gin/methods/(\w+)\.gin'", text)
    made = [*(f"[{name}](#{name})" for name in base), *functions(text)]
    file = f"[{path.name}](../gin/methods/{path.name})"
    return f"## {path.stem}\n\n{words.strip()}\n\nMade of {', '.join(made)}: {file}.\n"


def functions(text: str) -> list[str]:
    """The functions that a gin file names, each with a link to the file that defines it, by name."""
    modules = {}
    for package, name in re.findall(r"^from (mlrl[\w.]*) import (\w+)$", text, re.M):
        modules[name] = importlib.import_module(f"{package}.{name}")
    found = {}
    for module, name in re.findall(r"@(?:\w+/)*(\w+)\.(\w+)", re.sub("#.*", "", text)):
        defined = sys.modules[getattr(modules[module], name).__module__].__file__
        if not name.endswith("Experiment"):
            found[f"{module}.{name}"] = pathlib.Path(defined).relative_to(REPO).as_posix()
    return [f"[`{name}`](../{path})" for name, path in sorted(found.items())]


if __name__ == "__main__":
    target = REPO / "docs" / "methods.md"
    target.write_text(methods_page())
    print(f"{target} has {len(target.read_text().splitlines())} lines")
