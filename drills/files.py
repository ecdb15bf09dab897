"""Mutated files: gin files, data rows, tokenizers, Hugging Face folders: accepted rightly, or refused in a line."""

from __future__ import annotations

import contextlib
import io
import logging
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from drills import experiments, models, mutations, rows, tokenizers
from drills.trials import Drill, Outcome, TrialFn, chance
from mlrl.types import Refused


class Kind(NamedTuple):
    """A kind of file: `write` makes folders of it, one of which is mutated; `use` reads one as a run would.

    write  (folder) -> the folders, each with files that are right
    use    (folder) -> what is wrong with what was read, though it was accepted; raises Refused
    """

    name: str
    write: Callable[[pathlib.Path], list[pathlib.Path]]
    use: Callable[[pathlib.Path], str]


KINDS = (
    Kind("gin file", experiments.write, experiments.use),
    Kind("data rows", rows.write, rows.use),
    Kind("tokenizer", tokenizers.write, tokenizers.use),
    Kind("Hugging Face folder", models.write, models.use),
)


@contextlib.contextmanager
def prepared(seed: int, steps: int) -> Iterator[TrialFn]:
    """Writes the files that are right, and sees that they are accepted."""
    del steps
    with tempfile.TemporaryDirectory(prefix="drill-files-") as name:
        folder, right = pathlib.Path(name), {}
        for number, kind in enumerate(KINDS):
            made = folder / str(number)
            made.mkdir()
            right[kind.name] = kind.write(made)
            for one in right[kind.name]:
                assert (said := _said_of(kind, one)) == ("accepted", ""), (one, said)

        def trial(number: int) -> Outcome:
            kind, luck = KINDS[number % len(KINDS)], chance("files", seed, number)
            mutated = folder / f"mutated{number}"  # what was read is kept by its path
            shutil.copytree(luck.choice(right[kind.name]), mutated)
            try:
                what = mutate(luck, mutated)
                came, wrong = _said_of(kind, mutated)
            finally:
                shutil.rmtree(mutated)
            return Outcome(kind.name, came, wrong and f"{what}: {wrong}")

        yield trial


def mutate(luck: Any, folder: pathlib.Path) -> str:
    """Makes a mistake in one file of a folder, and says in which."""
    file = luck.choice(sorted(path for path in folder.iterdir() if path.suffix != ".py"))
    if luck.random() < 0.03:
        file.unlink()
        return f"without {file.name}"
    stored = file.read_bytes()
    if file.suffix == ".json" and luck.random() < 0.9:
        file.write_bytes(mutations.json_text(luck, stored.decode()).encode(errors="surrogatepass"))
    elif file.suffix == ".jsonl" and luck.random() < 0.7:
        lines = stored.decode().splitlines()
        at = luck.randrange(len(lines))
        lines[at] = mutations.json_text(luck, lines[at]).replace("\n", " ")
        file.write_bytes("\n".join(lines).encode(errors="surrogatepass"))
    elif file.suffix == ".safetensors" and luck.random() < 0.8:
        file.write_bytes(_header_mutated(luck, stored))
    elif file.suffix in (".gin", ".json", ".jsonl", ".txt") and luck.random() < 0.9:
        file.write_bytes(mutations.text(luck, stored.decode()).encode(errors="surrogatepass"))
    else:
        file.write_bytes(mutations.data(luck, stored))
    return file.name


def _header_mutated(luck: Any, stored: bytes) -> bytes:
    """A safetensors file of which the header is another one, and its length is told rightly."""
    length = int.from_bytes(stored[:8], "little")
    header = mutations.json_text(luck, stored[8 : 8 + length].decode()).encode(errors="surrogatepass")
    return len(header).to_bytes(8, "little") + header + stored[8 + length :]


def _said_of(kind: Kind, folder: pathlib.Path) -> tuple[str, str]:
    """(accepted or refused, what is wrong) of a folder."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), _quiet():
        try:
            wrong = kind.use(folder)
        except Refused as refusal:
            line = str(refusal)
            return "refused", "" if line.strip() and "\n" not in line.strip() else f"the refusal is no line: {line!r}"
        except Exception as error:
            return "raised", f"{type(error).__name__}: {error}"[:500]
        except BaseException as error:  # the libraries of tokenizers panic so
            if type(error).__name__ == "PanicException":
                return "raised", f"{type(error).__name__}: {error}"[:500]
            raise
    if "Traceback" in printed.getvalue():
        return "traced", printed.getvalue()[-500:]
    return "accepted", wrong


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)




FILES = Drill(
    "files", "A gin file, a file of data rows, a tokenizer or a Hugging Face folder gets one to three mistakes at "
    "random. It is refused in one line, or accepted and holds what it says: its bindings, rows, ids or tensors are "
    "those that another reader finds. Never a trace, never more than a minute.", 1000, 12, 60.0, prepared)  # fmt: skip
