"""Damages the files of a run's last checkpoint: it is noticed in one line, the one before is used, nothing is lost."""

from __future__ import annotations

import contextlib
import logging
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from drills import worlds
from drills.trials import Drill, Outcome, TrialFn, chance

KINDS = ("a flipped bit", "a missing file", "a file cut short", "an empty file", "a missing folder")

UNREAD = ("commit_success.txt", "ocdbt.process_0", "array_metadatas", "metrics", "_CHECKPOINT_METADATA", "_sharding")


@contextlib.contextmanager
def prepared(seed: int, steps: int) -> Iterator[TrialFn]:
    """Trains a run to its end; what is damaged are copies of its folder."""
    del steps
    with tempfile.TemporaryDirectory(prefix="drill-damage-") as name:
        folder = pathlib.Path(name)
        worlds.write(folder)
        process = worlds.starter()(folder, "undisturbed")
        process.join()
        assert process.exitcode == 0, (folder / "undisturbed.log").read_text()
        read, continued = worlds.reader(folder), worlds.trainer(folder)
        undisturbed = read(folder / "undisturbed")

        def trial(number: int) -> Outcome:
            luck = chance("damage", seed, number)
            kind, run = KINDS[number % len(KINDS)], folder / "damaged"
            shutil.copytree(folder / "undisturbed", run)
            try:
                what = damage(luck, kind, run / "checkpoints")
                with warnings() as said:
                    continued("damaged")
                wrong = worlds.difference(read(run), undisturbed)
            finally:
                shutil.rmtree(run)
            passed = [line for line in said if "damaged and passed over" in line]
            wrong = wrong or next((f"this is no line: {line!r}" for line in said if "\n" in line), "")
            wrong = wrong or (len(passed) > 1 and f"{len(passed)} lines: {passed}") or ""
            came = "noticed, passed over, made again" if passed else "read, and all of the state was right"
            return Outcome(kind, "lost" if wrong else came, wrong and f"{what}: {wrong}")

        yield trial


def damage(luck, kind: str, checkpoints: pathlib.Path) -> str:
    """Damages a file of the last checkpoint, or a folder in it, mostly of those that matter; says which."""
    last = max((path for path in checkpoints.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    parts = sorted(last.rglob("*"), key=lambda path: (path.parent, path.stat().st_size, path))  # names are random
    if luck.random() < 0.7:
        parts = [path for path in parts if not set(UNREAD) & set(path.parts)] or parts
    if kind == "a missing folder":
        victim = luck.choice([path for path in parts if path.is_dir()])
        shutil.rmtree(victim)
        return f"{victim.relative_to(checkpoints)} removed"
    victim = luck.choice([path for path in parts if path.is_file() and path.stat().st_size])
    content = bytearray(victim.read_bytes())
    at = luck.randrange(len(content))
    if kind == "a missing file":
        victim.unlink()
    elif kind == "a flipped bit":
        content[at] ^= 1 << luck.randrange(8)
        victim.write_bytes(content)
    else:
        victim.write_bytes(content[:at] if kind == "a file cut short" else b"")
    return f"{victim.relative_to(checkpoints)}, {kind} at byte {at} of {len(content)}"


@contextlib.contextmanager
def warnings() -> Iterator[list[str]]:
    """What mlrl warns of meanwhile."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("mlrl")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


DAMAGE = Drill(
    "damage", "The last checkpoint of a run gets a flipped bit, or loses a file, a part of one or a folder; then the "
    "run is started again. Its state at the end is bitwise that of the undisturbed run: the damage is said in one line "
    "and the checkpoint before is used, or the damaged byte mattered to nothing.", 50, 2, 120.0, prepared)  # fmt: skip
