"""The run folder: which run owns it, how two configurations differ, and files written whole."""

from __future__ import annotations

import contextlib
import difflib
import os
import pathlib
import re
from collections.abc import Iterator, Sequence

from mlrl.types import Refused

# What a run may change on its way, beside its length: how the same arithmetic is laid out over devices, and cut into
# parts that fit. A run that goes on with fewer or more devices needs it, and is the same up to rounding.
LAYOUT = (
    "Experiment.mesh", "Experiment.rollout_mesh",
    *(f"{function}.{axis}" for function in ("mesh", "rearranged", "others")
      for axis in ("data", "fsdp", "tensor", "sequence", "expert", "devices")),
    "micro_batch_rows", "score_chunk_columns", "score_chunk_vocabulary",
)  # fmt: skip


def require_local(path: str | os.PathLike) -> None:
    """Raises Refused for an address, such as a bucket's, which would be taken for the name of a folder here."""
    if "://" in str(path):
        raise Refused(f"{path} is no path of this machine: mount the bucket (docs/pods.md), and name where")


def claim_run_folder(folder: str | os.PathLike, config: str, *, may_differ: tuple[str, ...] = ()) -> bool:
    """Makes `folder` the home of the run that `config` describes, or confirms that it is.

    A fresh folder gets `config.gin`. A folder of the same run is left as it is; where only bindings named in
    `may_differ` differ (a run that is made longer), or no checkpoint was written yet, `config.gin` is written anew.

    Args:
      folder: the run folder; made when missing.
      config: the text of the whole configuration.
      may_differ: names of bindings, as "num_steps" (of anything), "Experiment.num_steps", or a macro.

    Returns:
      True if the folder already held this run, which then resumes; False for a fresh one.

    Raises:
      Refused: it holds another run (with the lines that differ), or files of something else, or cannot be written.
    """
    require_local(folder)
    folder = pathlib.Path(folder)
    path = folder / "config.gin"
    if path.is_file():
        old = path.read_text()
        differing = config_differences(old, config, may_differ=may_differ)
        started = any(step.name.isdigit() for step in (folder / "checkpoints").glob("*"))
        if differing and started:  # a run that was refused before its first checkpoint owns nothing yet
            lines = "; ".join(differing[:8]) + (f"; and {len(differing) - 8} more" if len(differing) > 8 else "")
            raise Refused(f"{folder} holds another run: choose another folder, or undo what differs: {lines}")
        if old != config:
            write_atomically(path, config)
        return True
    if folder.exists() and not folder.is_dir():
        raise Refused(f"{folder} is a file: the run folder must be a folder or a new path")
    strangers = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []
    if strangers:
        raise Refused(f"{folder} is not empty and holds no run (found {', '.join(strangers[:3])}"
                      f"{', ...' if len(strangers) > 3 else ''}): choose a new or an empty folder")  # fmt: skip
    require_writable(folder)
    write_atomically(path, config)
    return False


def require_no_run(folder: str | os.PathLike) -> None:
    """Raises Refused if `folder` is itself a run's, and so no place for the folders of several."""
    if pathlib.Path(folder, "config.gin").exists():
        raise Refused(f"{folder} holds a run, and the seeds need a folder around their own: choose another --run_dir")


def require_only_seeds_differ(configs: Sequence[str], seeds: Sequence[int], wanted: Sequence[int]) -> None:
    """Raises Refused unless the macro SEED is the seed of the experiment, of each of them, and of the runs they start
    from, and nothing else."""
    for statement in statements(configs[0]):
        if re.search(r"%SEED\b", statement) and not re.match(r"\S*(Experiment|from_run)\.seed *= *%SEED$", statement):
            raise Refused(f"seeds trained together differ in nothing else, but the experiment binds {statement}: give "
                          "that a number, or train seeds one after another, without --seeds")  # fmt: skip
    if list(seeds) != list(wanted):
        raise Refused(f"the macro SEED set to {wanted[-1]} leaves the experiment's seed at {seeds[-1]}: bind "
                      "online.Experiment.seed = %SEED")  # fmt: skip


def config_differences(old: str, new: str, *, may_differ: tuple[str, ...] = ()) -> list[str]:
    """The differing statements of two gin texts, as "-old" and "+new"; comments and blank lines do not count."""
    macros = {m for text in (old, new) for m in _macros(text, may_differ)}
    left, right = (list(statements(text, left_out=(*may_differ, *macros))) for text in (old, new))
    difference = difflib.unified_diff(left, right, n=0, lineterm="")
    return [line for line in difference if line[0] in "+-" and not line.startswith(("+++", "---"))]


def statements(text: str, *, left_out: tuple[str, ...] = ()) -> Iterator[str]:
    """Gin statements, each on one line, without those that bind a name in `left_out`."""
    pending, depth = "", 0
    for line in text.splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        continues = line.endswith("\\")
        line = line.rstrip("\\").strip()
        pending = f"{pending} {line}".strip()
        bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", line)  # brackets inside strings open nothing
        depth += sum(bare.count(c) for c in "([{") - sum(bare.count(c) for c in ")]}")
        if continues or depth > 0 or pending.endswith("="):
            continue
        name = pending.split("=")[0].strip() if "=" in pending else ""
        if not any(name == word or name.endswith((f".{word}", f"/{word}")) for word in left_out):
            yield pending
        pending, depth = "", 0
    if pending:
        yield pending


def _macros(text: str, names: tuple[str, ...]) -> Iterator[str]:
    """Macros that are the whole value of a binding in `names`: in `Experiment.num_steps = %STEPS`, STEPS."""
    kept = set(statements(text, left_out=names))
    for statement in statements(text):
        if statement not in kept and (found := re.search(r"= *%(\w+)$", statement)):
            yield found.group(1)


def require_writable(folder: pathlib.Path) -> None:
    """Makes the folder if needed. Raises Refused unless files can be written in it."""
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise Refused(f"cannot write in {folder} ({error.strerror}): choose another folder or change its "
                      "permissions") from error  # fmt: skip


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all: a reader, or a crash, meets the old text or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise Refused(f"cannot write {path} ({error.strerror}): make room or choose another folder") from error
