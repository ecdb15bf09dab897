"""What the site has beside docs/, as hooks of mkdocs (`make docs`): linked files of the checkout, and the reference.

Pages are written for the forge: links are relative, and go to files of the checkout wherever they lie. For the site,
README.md becomes its first page; every Markdown file that is linked from a page, and so on from that, becomes a page;
every other linked file is shown as it is. So all links work on both, and `mkdocs build --strict` checks them.

The reference is made from signatures and docstrings, without importing the package. After its first sentences a
docstring is shown as it is written, line by line: it holds equations and tables of shapes in plain text.
"""

from __future__ import annotations

import ast
import html
import os
import pathlib
import posixpath
import re
from collections.abc import Iterator

REPO = pathlib.Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()([^)\s#]+)([^)]*\))")
FENCE = re.compile(r"^```(\w+) (\S+)$", re.M)  # names the file that a block is

# One page a layer: its title, and the files and folders of mlrl/ that it is about.
REFERENCE = {
    "types": ("Types", "__init__ types"),
    "advantages": ("Advantages and returns", "advantages returns groups"),
    "losses": ("Losses", "losses"),
    "arithmetic": ("Divergences, reductions, selections and metrics", "divergences importance controllers reductions "
                   "selection metrics monitoring correction batches"),
    "tasks": ("Tasks, prompts and curricula",
              "tasks vocabularies tokenizer_files prompts stored transcripts curricula"),
    "models": ("Models and scoring", "models scoring packing"),
    "rollouts": ("Rollouts and environments", "sampling generation refilled rollouts environments"),
    "rewards": ("Rewards", "rewards"),
    "learning": ("Updates, meshes and costs", "updates optimizers axes meshes home_rows costs"),
    "io": ("Run folders and evaluation", "folders runs checkpoints writers profiling chunks report export evaluation "
           "evaluation_attempts evaluation_games evaluation_judges evaluation_stored"),
    "loops": ("Loops", "loops"),
    "sandbox": ("Sandbox and processes", "sandbox processes"),
    "pods": ("Pods and the command line", "pods main mistakes"),
}  # fmt: skip


# The reference.


def reference(name: str) -> str:
    """One page of it, in Markdown."""
    title, parts = REFERENCE[name]
    files = [path for part in parts.split() for path in files_of(part)]
    return "\n".join([f"# {title}\n", *(text for path in files for text in of_module(path))])


def files_of(part: str) -> list[pathlib.Path]:
    """A module of the package, or all modules of a folder, the folder's own first."""
    folder = REPO / "mlrl" / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def of_module(path: pathlib.Path) -> Iterator[str]:
    """A heading, what the module says of itself, and its public functions and classes."""
    tree = ast.parse(path.read_text())
    dotted = ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
    source = path.relative_to(REPO).as_posix()
    yield f"## {dotted} {{#{dotted}}}\n"
    yield as_written(ast.get_docstring(tree))
    yield f"[`{source}`](../../{source})\n"
    for node in filter(is_public, tree.body):
        yield f"### {node.name} {{#{dotted}.{node.name}}}\n"
        yield from of_definition(node)
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and is_public(method) and ast.get_docstring(method):
                    yield from of_definition(method)


def is_public(node: ast.AST) -> bool:
    """Whether it is a function or a class for others."""
    return isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")


def of_definition(node: ast.FunctionDef | ast.ClassDef) -> Iterator[str]:
    """Signature, or name and bases, and docstring."""
    yield f"```python\n{signature(node)}\n```\n"
    if said := ast.get_docstring(node):
        yield as_written(said)


def signature(node: ast.FunctionDef | ast.ClassDef) -> str:
    """As in the source, one argument a line where it is long."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{node.name}({ast.unparse(node.args)}){result}"
    if len(line) <= 100:
        return line
    return f"{node.name}(\n    " + ",\n    ".join(split_arguments(ast.unparse(node.args))) + f",\n){result}"


def split_arguments(text: str) -> list[str]:
    """Cuts at the commas that are in no bracket."""
    cuts, depth = [-1], 0
    for i, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            cuts.append(i)
    return [text[a + 1 : b].strip() for a, b in zip(cuts, [*cuts[1:], len(text)])]


def as_written(docstring: str) -> str:
    """The first sentences as a paragraph, and the rest as plain text that keeps its lines, both in HTML."""
    first, _, rest = html.escape(docstring, quote=False).partition("\n\n")
    first = re.sub(r"`([^`]+)`", r"<code>\1</code>", first)
    return f"<p>{first}</p>\n" + (f'<pre class="docstring">{rest}</pre>\n' if rest else "")


# Pages from the rest of the checkout.


def place(path: str) -> str:
    """Where a file of the checkout is in the site: README.md is the first page, docs/ is the root, code is a page."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path.endswith((".md", ".png", ".svg")) else f"{path}.md"


def origin(uri: str) -> str:
    """The file of the checkout that a page of the site was made of."""
    if uri == "index.md":
        return "README.md"
    known = (f"docs/{uri}", uri, uri.removesuffix(".md"))
    return next((path for path in known if (REPO / path).exists()), f"docs/{uri}")


def links(path: str, text: str) -> Iterator[tuple[str, str]]:
    """(link as written, file of the checkout that it goes to) of all relative links."""
    for _, link, _ in LINK.findall(re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)):
        if "://" not in link and not link.startswith("mailto:"):
            yield link, posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def linked(first: list[str]) -> set[str]:
    """Files outside of docs/ that are linked from these pages, and from what these link to."""
    found: set[str] = set()
    waiting = list(first)
    while waiting:
        path = waiting.pop()
        for _, target in links(path, (REPO / path).read_text()) if path.endswith(".md") else ():
            if target not in found and (REPO / target).exists() and not target.startswith("docs/"):
                found.add(target)
                waiting.append(target)
    return found


def shown(file: pathlib.Path) -> str:
    """A file of code as a page, or a folder as a list of its files."""
    if file.is_dir():
        names = sorted(path.name for path in file.iterdir() if path.is_file())
        return f"# `{file.relative_to(REPO).as_posix()}/`\n\n" + "\n".join(f"- `{name}`" for name in names)
    return f"# `{file.relative_to(REPO).as_posix()}`\n\n````\n{file.read_text()}\n````\n"


# The hooks.


def on_files(files, config):
    """Adds what is not in docs/."""
    from mkdocs.structure.files import File

    pages = ["README.md", *(f"docs/{file.src_uri}" for file in files if file.src_uri.endswith(".md"))]
    modules = {path for _, parts in REFERENCE.values() for part in parts.split() for path in files_of(part)}
    outside = {"README.md", *linked(pages), *(path.relative_to(REPO).as_posix() for path in modules)}
    for path in sorted(outside):
        code = place(path) == f"{path}.md"
        made = {"content": shown(REPO / path)} if code else {"abs_src_path": os.fspath(REPO / path)}
        files.append(File.generated(config, place(path), **made))
    for name in REFERENCE:
        files.append(File.generated(config, f"reference/{name}.md", content=reference(name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links go to where files are in the site; the name of a block's file stands above the block."""
    uri = page.file.src_uri
    here = origin(uri)
    if not here.endswith(".md"):  # code
        return markdown
    targets = dict(links(here, markdown))

    def moved(found: re.Match) -> str:
        target = targets.get(found[2])
        if target is None or not (REPO / target).exists():
            return found[0]
        return found[1] + posixpath.relpath(place(target), posixpath.dirname(uri) or ".") + found[3]

    return FENCE.sub(r"`\2`\n\n```\1", LINK.sub(moved, markdown))
