"""Checkpoints of a whole TrainState: asynchronous, checked when read, the last and the best kept."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import logging
import math
import os
import pathlib
import re
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from mlrl import processes
from mlrl.folders import claim_run_folder, config_differences, require_writable
from mlrl.models import lora
from mlrl.types import Refused, TrainState

__all__ = ["Manager", "best_step", "claim_run_folder", "close", "config_differences", "latest_step", "open_manager",
           "parameters", "restore", "restore_params", "save", "wait"]  # fmt: skip

_log = logging.getLogger("mlrl")
_STATE, _LEAVES = "state", "leaves"  # the two items of a step: the arrays, and what they were when saved
_PARAMETERS = ("params", "frozen")  # the fields of a state that hold the policy's


@dataclasses.dataclass(frozen=True)
class Manager:
    """The open checkpoints of one run; use the functions of this file."""

    folder: pathlib.Path
    orbax: ocp.CheckpointManager
    best_metric: str
    read_only: bool


def open_manager(folder: str | os.PathLike, *, keep_last: int = 2, keep_best: int = 1, best_metric: str = "",
                 read_only: bool = False) -> Manager:  # fmt: skip
    """Opens the checkpoints of a run for saving and restoring.

    Saving is asynchronous: `save` returns once the arrays are copied to the host, and a step counts as soon as all of
    it is on disk. Older steps are deleted only after a newer one is complete.

    Args:
      folder: where steps lie, one subfolder each; made when missing.
      keep_last: how many of the latest steps stay, at least 1.
      keep_best: how many of the steps with the highest `best_metric` stay besides; none if that is "".
      best_metric: a name among the metrics given to `save`; "eval/" may be left out.
      read_only: for looking only: never writes, deletes or sets aside anything.

    Raises:
      Refused: the folder cannot be made or written to, or keep_last is below 1; read-only, if metrics are damaged.
    """
    _say_an_error_once()
    if keep_last < 1:
        raise Refused(f"keep_last must be at least 1, got {keep_last}: a run without checkpoints cannot resume")
    folder = pathlib.Path(folder).absolute()
    damaged = _damaged_metrics(folder)
    if read_only and damaged:
        raise Refused(f"{damaged[0]} is damaged: `mlrl train` on this run sets it aside, and loses nothing but a rank")
    if not read_only:
        require_writable(folder)
        processes.by_first(lambda: _leave_out(damaged))
    with _orbax_silent():  # it warns that read-only folders are read-only
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            read_only=read_only,
            best_fn=_quality,  # without it, orbax does not write metrics
            preservation_policy=_LastAndBest(keep_last, keep_best if best_metric else 0),
            cleanup_tmp_directories=not read_only,
        )
        return Manager(folder, ocp.CheckpointManager(folder, options=options), best_metric, read_only)


def _damaged_metrics(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of metrics that are no numbers by name; orbax would open no folder that has one."""
    found = []
    for path in folder.glob("*/metrics/metrics"):
        try:
            right = all(isinstance(value, int | float) for value in json.loads(path.read_text()).values())
        except (OSError, ValueError, AttributeError):
            right = False
        found += [] if right else [path]
    return found


def _leave_out(damaged: list[pathlib.Path]) -> None:
    """Sets damaged metrics aside: their steps are whole otherwise, and only have no rank."""
    for path in damaged:
        _log.warning("the metrics of checkpoint %s are damaged and left out: it has no rank", path.parent.parent)
        with contextlib.suppress(OSError):
            path.rename(path.with_name("unreadable"))


def save(manager: Manager, step: int, state: TrainState, metrics: Mapping[str, float] = {}) -> bool:
    """Starts saving `state` as `step`; the caller may go on, and may donate the state, at once.

    Args:
      manager: from `open_manager`.
      step: training steps done.
      state: any pytree of arrays: typed keys, optax states and empty tuples included.
      metrics: this step's metrics; the one named `best_metric` ranks the step, which has no rank without it.

    Returns:
      False if this step was already there (nothing is written), else True.

    Raises:
      Refused: this or the save before could not be written (a full disk, say). Complete steps stay as they were.
    """
    if step in manager.orbax.all_steps():
        return False
    state = jax.tree.map(_as_array, state)
    args = ocp.args.Composite(**{
        _STATE: ocp.args.StandardSave(state),
        _LEAVES: ocp.args.JsonSave(_signed([_described(*item, checksum=True) for item in _leaves(state)])),
    })  # fmt: skip
    name = manager.best_metric
    quality = metrics.get(name, metrics.get(f"eval/{name}", math.nan)) if name else math.nan
    if name and metrics and name not in metrics and f"eval/{name}" not in metrics:
        _log.warning("step %d has no metric %r to rank its checkpoint by; it has %s",
                     step, name, ", ".join(sorted(metrics)))  # fmt: skip
    ranked = {"quality": float(quality)} if math.isfinite(quality) else {}
    with _write_errors_refused(manager):
        return bool(manager.orbax.save(step, args=args, metrics=ranked, force=True))


def restore(manager: Manager, template: TrainState, *, step: int = -1) -> TrainState:
    """The last complete checkpoint, bitwise as it was saved, with the template's structure and shardings.

    Every leaf is compared with the checksum it was saved with. A step that cannot be read, or whose arrays changed on
    disk (flipped bits, missing files), is passed over for the one before, with a line of warning; unless the manager
    is read-only, its folder is moved aside to `<folder>_unreadable/`, so that the run can save that step again.
    Not covered: leaves that are sharded over several processes are restored, but carry no checksum.

    Args:
      manager: from `open_manager`.
      template: a TrainState of arrays or jax.ShapeDtypeStruct. A leaf with a sharding is restored with it, one without
        lands on the first device, a numpy leaf stays numpy.
      step: the step to restore; -1 is the last complete one.

    Raises:
      Refused: there is no (readable) step, or its leaves differ from the template's in path, shape or dtype.
    """
    template = jax.tree.map(_placed, template)
    known = sorted(manager.orbax.all_steps(), reverse=True)
    if not known:
        raise Refused(f"{manager.folder} holds no complete checkpoint: train first, or name another folder")
    if step >= 0 and step not in known:
        raise Refused(f"{manager.folder} holds no step {step}: it has {', '.join(map(str, sorted(known)))}")
    candidates = known if step < 0 else [step]
    for candidate in candidates:
        reason = ""
        try:
            saved = manager.orbax.restore(candidate, args=ocp.args.Composite(**{_LEAVES: ocp.args.JsonRestore()}))
            leaves = _as_signed(saved[_LEAVES])
            _require_same_leaves(leaves, template, f"{manager.folder}/{candidate}")
            args = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(template)})
            state = manager.orbax.restore(candidate, args=args)[_STATE]
            _require_checksums(leaves, state)
        except Refused:
            raise
        except Exception as error:  # orbax and tensorstore raise every kind for a damaged file
            reason = _said(error)
        reason = next(filter(None, processes.exchanged(reason)), "")  # all restore the same step
        if not reason:
            return state
        _forget_failed_reads()
        _log.warning("checkpoint %s/%d is damaged and passed over: %s", manager.folder, candidate, reason)
        _set_aside(manager, candidate)
    raise Refused(f"none of the checkpoints in {manager.folder} can be read (tried "
                  f"{', '.join(map(str, candidates))}): bring a copy back, or start in another folder")  # fmt: skip


def restore_params(folder: str | os.PathLike, template: Any) -> Any:
    """Only the policy's parameters, of the last complete checkpoint in `folder`: for another run to start from.

    Args:
      folder: a run's checkpoints folder.
      template: parameters, frozen ones among them, as arrays or jax.ShapeDtypeStruct; parts of the saved ones may be
        left out.

    Raises:
      Refused: there is no complete checkpoint, or it is damaged, or the parameters differ from the template's in path,
        shape or dtype.
    """
    path, saved = _last_saved(folder)
    wanted = dict(zip(_PARAMETERS, lora.split(jax.tree.map(_placed, template))))
    paths = {name for name, _ in _leaves(wanted)}
    named = [leaf | {"path": re.sub(r"^\w+", lambda field: f"['{field[0]}']", leaf["path"])} for leaf in saved]
    _require_same_leaves([leaf for leaf in named if leaf["path"] in paths], wanted, str(path))
    how = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding), wanted)
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(path / _STATE, args=args)
        _require_checksums(named, restored)
    except Exception as error:
        raise _damaged(path, error) from error
    return lora.join(restored["frozen"], restored["params"])


def parameters(folder: str | os.PathLike) -> Any:
    """Shapes and dtypes of the policy's parameters in the last complete checkpoint, frozen ones among them.

    Raises:
      Refused: there is no complete checkpoint, or what it says of its arrays is damaged.
    """
    flat = {}
    for leaf in _last_saved(folder)[1]:
        field, *names = re.findall(r"\w+", leaf["path"])
        if field in _PARAMETERS:
            flat[tuple(names)] = jax.ShapeDtypeStruct(leaf["shape"], jnp.dtype(leaf["dtype"]))
    return traverse_util.unflatten_dict(flat)


def _last_saved(folder: str | os.PathLike) -> tuple[pathlib.Path, list[dict[str, Any]]]:
    """The last complete checkpoint, and what its leaves were when saved."""
    step = latest_step(folder)
    if step is None:
        raise Refused(f"{folder} holds no complete checkpoint: train that run first, or name another")
    path = pathlib.Path(folder).absolute() / str(step)
    try:
        return path, _as_signed(json.loads((path / _LEAVES / "metadata").read_text()))
    except Exception as error:
        raise _damaged(path, error) from error


def latest_step(folder: str | os.PathLike) -> int | None:
    """The last complete step in a checkpoints folder; None when there is none, or no folder."""
    if not os.path.isdir(folder):
        return None
    return max(ocp.utils.checkpoint_steps(folder), default=None)


def best_step(manager: Manager) -> int | None:
    """The complete step with the highest `best_metric`; None when no step was ranked."""
    ranked = {step: _quality(manager.orbax.metrics(step)) for step in manager.orbax.all_steps()}
    best = max(ranked, key=lambda step: ranked[step], default=None)
    return None if best is None or ranked[best] == -math.inf else best


def wait(manager: Manager) -> None:
    """Returns when every started save is complete. Raises Refused if one could not be written."""
    with _write_errors_refused(manager):
        manager.orbax.wait_until_finished()


def close(manager: Manager) -> None:
    """Completes the saves that were started and closes the manager. Raises Refused as `wait` does."""
    with _write_errors_refused(manager):
        manager.orbax.close()


@dataclasses.dataclass(frozen=True)
class _LastAndBest:
    """Orbax's preservation policy: the last steps, and the best among those that have a rank."""

    last: int
    best: int

    def should_preserve(self, checkpoints: list[Any], *, context: Any) -> list[bool]:
        ranked = sorted((c for c in checkpoints if _quality(c.metrics) > -math.inf), key=lambda c: _quality(c.metrics))
        kept = {c.step for c in checkpoints[-self.last:]} | {c.step for c in ranked[len(ranked) - self.best:]}
        return [c.step in kept for c in checkpoints]


def _quality(metrics: Mapping[str, float] | None) -> float:
    return (metrics or {}).get("quality", -math.inf)


def _say_an_error_once() -> None:
    """A save that fails raises one error, from `save`, `wait` or `close`. Pages of trace beside it say no more: what
    orbax's threads log of it, what asyncio logs of the other arrays, for whose errors nobody asked, and what is printed
    when one of these is over after the loop that waited for it.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_raised_besides)
    if getattr(sys.unraisablehook, "func", None) is not _unless_late:
        sys.unraisablehook = functools.partial(_unless_late, sys.unraisablehook)


def _not_raised_besides(record: logging.LogRecord) -> bool:
    trace = record.exc_info[2] if record.exc_info else None
    return not (record.exc_info and ("orbax" in record.pathname or _passes_through(trace, "orbax")))


def _passes_through(trace: Any, name: str) -> bool:
    return any(name in frame.filename for frame in traceback.extract_tb(trace))


def _unless_late(hook: Callable[[Any], None], said: Any) -> None:
    """An unraisablehook that leaves out a future of tensorstore's that tells its loop, closed meanwhile, of its end."""
    first = said.exc_traceback.tb_frame.f_code.co_name if said.exc_traceback else ""
    if not (str(said.exc_value) == "Event loop is closed" and first == "call_soon_threadsafe"):
        hook(said)


@contextlib.contextmanager
def _orbax_silent() -> Iterator[None]:
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _leaves(state: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path).lstrip("."), x) for path, x in jax.tree_util.tree_leaves_with_path(state)]


def _as_array(leaf: Any) -> Any:
    """Python numbers as arrays of the dtype that JAX would give them."""
    return np.asarray(leaf, jnp.result_type(leaf)) if isinstance(leaf, bool | int | float) else leaf


def _placed(leaf: Any) -> Any:
    """The abstract leaf to restore: a JAX leaf always has a sharding."""
    leaf = _as_array(leaf)
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _signed(leaves: list[dict[str, Any]]) -> dict[str, Any]:
    """What is said of the leaves, with a sum of its own: a damaged name looks like another configuration."""
    return {"leaves": leaves, "crc32": zlib.crc32(json.dumps(leaves, sort_keys=True).encode())}


def _as_signed(saved: dict[str, Any]) -> list[dict[str, Any]]:
    """The leaves of `_signed`. Raises ValueError if they are not what was saved."""
    if "crc32" in saved and saved != _signed(saved["leaves"]):  # checkpoints of before have no sum
        raise ValueError("the names, shapes and sums of its arrays are not what was saved")
    return saved["leaves"]


def _damaged(path: pathlib.Path, error: Exception) -> Refused:
    """For whoever cannot go on from the checkpoint before."""
    return Refused(f"checkpoint {path} is damaged ({_said(error)}): `mlrl train` on its run sets it aside and goes on "
                   "from the one before")  # fmt: skip


def _described(path: str, leaf: Any, *, checksum: bool = False) -> dict[str, Any]:
    described = {"path": path, "shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    return described | {"crc32": _checksum(leaf)} if checksum else described


def _checksum(leaf: Any) -> int | None:
    """CRC of the bytes; None for an array no single process holds."""
    if isinstance(leaf, jax.Array):
        if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return None
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        leaf = leaf.addressable_data(0) if leaf.is_fully_replicated else leaf
    return zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)


def _require_same_leaves(saved: list[dict[str, Any]], template: Any, where: str) -> None:
    wanted = {path: _described(path, leaf) for path, leaf in _leaves(template)}
    found = {leaf["path"]: {name: leaf[name] for name in ("path", "shape", "dtype")} for leaf in saved}
    spell = lambda leaf: f"{leaf['dtype']}{leaf['shape']}"  # noqa: E731
    advice = "restore with the configuration it was saved with"
    for path, leaf in wanted.items():
        if path not in found:
            raise Refused(f"checkpoint {where} has no {path}, which this run has as {spell(leaf)}: {advice}")
        if found[path] != leaf:
            raise Refused(f"checkpoint {where} has {path} as {spell(found[path])}, but this run has it as "
                          f"{spell(leaf)}: {advice}")  # fmt: skip
    for path in found:
        if path not in wanted:
            raise Refused(f"checkpoint {where} has {path}, which this run does not have: {advice}")


def _require_checksums(saved: list[dict[str, Any]], state: Any) -> None:
    sums = {leaf["path"]: leaf["crc32"] for leaf in saved}
    for path, leaf in _leaves(state):
        now = _checksum(leaf)
        if sums[path] is not None and now is not None and sums[path] != now:
            raise ValueError(f"{path} is not what was saved (its bytes changed on disk)")


def _said(error: Exception) -> str:
    """The first line of an error of orbax or tensorstore."""
    return str(error).split("\n")[0].split(" See full")[0][:150] or type(error).__name__


def _forget_failed_reads() -> None:
    """Collects the coroutines that orbax left behind, without the page of text that each would print."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = hook


def _set_aside(manager: Manager, step: int) -> None:
    if manager.read_only:
        return
    source = manager.folder / str(step)
    target = manager.folder.with_name(f"{manager.folder.name}_unreadable")

    def move() -> None:
        with contextlib.suppress(OSError):
            target.mkdir(exist_ok=True)
            free = next(name for i in range(10**6) if not (name := target / f"{step}.{i}").exists())
            source.rename(free)

    processes.by_first(move)
    manager.orbax.reload()


# What the errors of a disk say, of whatever kind they are raised, and what that means.
_FULL = "no space left on the device"
_DISK_SAYS = {"No space left": _FULL, "RESOURCE_EXHAUSTED": _FULL, "Disk quota": _FULL,
              "File too large": "a file is larger than is allowed here (ulimit -f)",
              "Read-only file system": "the file system is read-only"}  # fmt: skip


@contextlib.contextmanager
def _write_errors_refused(manager: Manager) -> Iterator[None]:
    """Turns errors of the disk, also those of the save in the background, into one line."""
    try:
        yield
    except Exception as error:
        text = str(error).strip().split("\n")[0]
        reason = next((reason for words, reason in _DISK_SAYS.items() if words in str(error)), "")
        if not reason and not isinstance(error, OSError):
            raise
        last = latest_step(manager.folder)
        kept = "no step was complete yet" if last is None else f"step {last} is complete"
        raise Refused(f"cannot write a checkpoint in {manager.folder}: {reason or text[:200]}; {kept}, so make "
                      "room or mend the folder and run the same command again") from error  # fmt: skip
