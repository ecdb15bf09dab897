"""Micro-batch and chunk sizes: as they are set, or the fastest of a few by a short timed search that is kept."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
import platform
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from mlrl import folders, processes
from mlrl.types import Refused, require_whole

FILE = "chunks.json"  # in the run folder
_CLEARLY_WORSE = 1.5  # times the best median so far: a candidate whose turn takes longer is given up


class Sizes(NamedTuple):
    """How much is computed at a time; 0 is all at once. See online.Experiment, whose fields these are."""

    micro_batch_rows: int = 0
    score_chunk_columns: int = 0
    score_chunk_vocabulary: int = 0


class Whole(NamedTuple):
    """What is cut: rows of a minibatch, of which `unit_rows` stay together; scored columns; ids of the vocabulary."""

    rows: int
    unit_rows: int
    columns: int
    vocabulary: int


Candidates = dict[str, tuple[int, ...]]  # of some fields of Sizes, at least two of each


class Search(NamedTuple):
    """How sizes are found.

    candidates    Whole -> what is tried; {}: nothing is, and sizes stay as they are set. Raises Refused
    turns         how often each is timed
    cache_folder  where choices are kept for other runs; see `cache_path`
    """

    candidates: Callable[[Whole], Candidates]
    turns: int = 3
    cache_folder: str = ""


class Choice(NamedTuple):
    """What was chosen; each candidate in the order it was tried, with its median seconds (None: it did not fit)."""

    sizes: Sizes
    tried: list[dict[str, Any]]


def as_set() -> Search:
    """Sizes are those of the experiment; nothing is timed."""
    return Search(lambda whole: {})


def fastest(*, micro_batch_rows: tuple[int, ...] = (), score_chunk_columns: tuple[int, ...] = (0, 128),
            score_chunk_vocabulary: tuple[int, ...] = (0, 8192), turns: int = 3,
            cache_folder: str = "") -> Search:  # fmt: skip
    """The sizes of the fastest update (with the scoring before it), timed at the start of a run on full rows.

    One size after another is chosen, the others as they are by then: each candidate is compiled, run once, and timed
    `turns` times, and the least median wins. A candidate that is clearly slower in its first turn gets no other, and
    one that needs more memory than there is is passed over. Parameters are random, and rows as long as they can be.

    The choice changes the order of sums, and so results by rounding. It is written to chunks.json in the run folder,
    and a run that goes on keeps it, so that it stays bitwise the run that it was.

    Args:
      micro_batch_rows: what to try; 0 is the whole minibatch. (): that, and its halves down to an eighth.
      score_chunk_columns, score_chunk_vocabulary: what to try; those that are not below what there is are all at once.
      turns: timed runs of a candidate.
      cache_folder: choices are kept there, by machine and shapes, and found by later runs. "": beside JAX's compilation
        cache, or in the user's cache folder.
    Raises: Refused, before anything is compiled, for micro-batches that do not divide the minibatch or split a group.
    """
    require_whole("fastest", "turns", turns, 1)
    given = Sizes(micro_batch_rows, score_chunk_columns, score_chunk_vocabulary)._asdict()
    for name, values in given.items():
        if not isinstance(values, tuple):
            raise Refused(f"fastest.{name} must be a tuple of sizes to try, got {values!r}")
        for value in values:
            require_whole("fastest", name, value, 0)

    def candidates(whole: Whole) -> Candidates:
        found = {"micro_batch_rows": _micro_batches(micro_batch_rows, whole)}
        for name, most in (("score_chunk_columns", whole.columns), ("score_chunk_vocabulary", whole.vocabulary)):
            found[name] = [value if value < most else 0 for value in given[name]]
        distinct = {name: tuple(dict.fromkeys(values)) for name, values in found.items()}
        return {name: values for name, values in distinct.items() if len(values) > 1}

    return Search(candidates, turns, cache_folder)


def _micro_batches(given: tuple[int, ...], whole: Whole) -> list[int]:
    """Rows of the micro-batches to try, 0 for the whole minibatch."""
    units = whole.rows // whole.unit_rows
    if not given:
        return [0] + [whole.rows // pieces for pieces in (2, 4, 8) if units % pieces == 0]
    for rows in given:
        if rows and whole.rows % rows:
            raise Refused(f"fastest.micro_batch_rows has {rows}, into which a minibatch of {whole.rows} rows does not "
                          "divide: leave it out")  # fmt: skip
        if rows % whole.unit_rows:
            raise Refused(f"fastest.micro_batch_rows has {rows}, and a loss compares the {whole.unit_rows} rows of a "
                          "group: leave out what is no multiple of them")  # fmt: skip
    return [0 if rows == whole.rows else rows for rows in given]


def search(own: Sizes, candidates: Candidates, turn_of: Callable[[Sizes], Callable[[], float]], turns: int) -> Choice:
    """The fastest sizes, found one field after another.

    Args:
      own: what the other fields are at first.
      turn_of: sizes -> a function that takes one turn and returns its seconds, all that is compiled being so by then.
        Either may raise MemoryError.
    Raises: Refused, if nothing fits.
    """
    best, least, tried = own, math.inf, {}
    for name, values in candidates.items():
        for sizes in (best._replace(**{name: value}) for value in values):
            if sizes not in tried:
                tried[sizes] = _timed(turn_of, sizes, turns, least)
            least = min(least, _median(tried[sizes]))
        best = min((sizes for sizes in tried), key=lambda sizes: _median(tried[sizes]))
    if math.isinf(least):
        raise Refused("no micro-batch or chunk that fastest tried fits in memory: give it smaller ones")
    lines = [sizes._asdict() | {"seconds": _median(seconds) if seconds else None, "turns": len(seconds)}
             for sizes, seconds in tried.items()]  # fmt: skip
    return Choice(best, lines)


def _timed(turn_of: Callable, sizes: Sizes, turns: int, least: float) -> list[float]:
    seconds: list[float] = []
    try:
        turn = turn_of(sizes)
        while len(seconds) < turns and (not seconds or seconds[0] <= _CLEARLY_WORSE * least):
            seconds.append(turn())
    except MemoryError:
        return []
    return seconds


def _median(seconds: list[float]) -> float:
    return statistics.median(seconds) if seconds else math.inf


def kept(folder: pathlib.Path, search_: Search, about: Mapping[str, Any], measure: Callable[[], Choice]) -> Sizes:
    """The choice of the run in `folder`; without one that in the cache, or a new one, which is then the run's.

    The first process reads and writes; all have what it has.

    Args:
      about: what a choice holds for, besides the machine: shapes and numbers, all JSON.
      measure: makes a choice; all processes call it together.
    """
    about = {"machine": machine(), **about}
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    shared, own = cache_path(search_.cache_folder), folder / FILE
    found = processes.by_first(lambda: _read(own) or _read(shared).get(key, {}) | {"from": "cache"})
    if "sizes" not in found:
        choice = measure()
        found = {"sizes": choice.sizes._asdict(), "tried": choice.tried, "from": "measured", "about": about}
        processes.by_first(lambda: _keep(shared, key, found))
    folder.mkdir(parents=True, exist_ok=True)
    processes.by_first(lambda: folders.write_atomically(own, json.dumps(found, indent=1)))
    return Sizes(**found["sizes"])


def copy(folder: pathlib.Path, other: pathlib.Path) -> None:
    """Writes down that the run in the folder `other` has the sizes of the one in `folder`, if that one chose any."""
    found = _read(folder / FILE)
    if found:
        other.mkdir(parents=True, exist_ok=True)
        folders.write_atomically(other / FILE, json.dumps(found, indent=1))


def cache_path(folder: str) -> pathlib.Path:
    """The file of choices in `folder`; "": beside JAX's compilation cache, or in the user's cache folder."""
    beside = jax.config.jax_compilation_cache_dir or ""
    if not folder and beside and "://" not in beside:
        folder = beside
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(folder or pathlib.Path(user, "mlrl")).expanduser() / "mlrl_chunks.json"


def machine() -> dict[str, Any]:
    """What the speed of a program depends on, besides the program."""
    devices = jax.devices()
    return {"device": devices[0].device_kind, "devices": len(devices), "processes": jax.process_count(),
            "cpu": _cpu_model(), "cpus": os.cpu_count(), "jax": jax.__version__}  # fmt: skip


def _cpu_model() -> str:
    """The processor's name as Linux gives it, or as Python does."""
    listing = pathlib.Path("/proc/cpuinfo")
    names = [line for line in listing.read_text().splitlines() if line.startswith("model name")] if (
        listing.is_file()) else []  # fmt: skip
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def _read(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none, or nothing that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _keep(path: pathlib.Path, key: str, found: dict[str, Any]) -> None:
    """Adds a choice to the cache; a cache that cannot be written costs the next run its seconds, and this one nothing.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folders.write_atomically(path, json.dumps(_read(path) | {key: found}, indent=1))
    except (OSError, Refused):
        return
