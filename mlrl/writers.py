"""What a run writes as it goes: JSON lines of metrics and samples, TensorBoard, Weights & Biases, a progress bar."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pathlib
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax

from mlrl.folders import require_writable, write_atomically
from mlrl.types import Refused

__all__ = ["ProgressBar", "Writers", "open_writers", "progress_bar", "write_atomically"]

_log = logging.getLogger("mlrl")
Sink = Callable[[int, Mapping[str, float]], None]


class Writers:
    """The open logs of a run; from `open_writers`."""

    def __init__(self, sinks: Sequence[Sink], samples: Callable[[Mapping], None],
                 closers: Sequence[Callable[[], None]], settlers: Sequence[Callable[[], None]] = ()):  # fmt: skip
        self._sinks, self._samples, self._closers = tuple(sinks), samples, tuple(closers)
        self._settlers = tuple(settlers)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs the metrics of a step everywhere, on disk when this returns; NaN and infinities are null in JSON."""
        values = {name: _number(name, value) for name, value in metrics.items()}
        for sink in self._sinks:
            sink(int(step), values)

    def write_samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows to samples.jsonl. A row has "step", and what people look at: see mlrl.runs.sample_rows."""
        for row in rows:
            self._samples(row)

    def settle(self) -> None:
        """Closes every file and opens it again: a mounted bucket stores a file when it is closed, and not before."""
        for settle in self._settlers:
            settle()

    def close(self) -> None:
        """Closes every file."""
        for close in self._closers:
            with contextlib.suppress(OSError):  # of a full disk, which `write` has refused already
                close()


def open_writers(folder: str | os.PathLike, *, wandb: bool = False, resume_step: int = 0) -> Writers:
    """Opens the logs of a run: `metrics.jsonl`, `samples.jsonl`, `tensorboard/` and, if asked for, Weights & Biases.

    Lines of steps after `resume_step` are dropped, as is a last line that was half written when a run was killed, so
    that a resumed run logs every step once; with resume_step 0 the logs start empty. TensorBoard hides what it read of
    later steps. In a run of several processes only the first one writes.

    Args:
      folder: the run folder.
      wandb: also log to Weights & Biases, under the folder's name.
      resume_step: training steps done.

    Raises:
      Refused: the folder cannot be written to, or wandb is not installed.
    """
    if jax.process_index() != 0:
        return Writers((), lambda row: None, ())
    folder = pathlib.Path(folder)
    require_writable(folder)
    metrics, samples = (_JsonLines(folder / name, resume_step) for name in ("metrics.jsonl", "samples.jsonl"))
    events = _Events(folder / "tensorboard", resume_step)
    sinks: list[Sink] = [lambda step, values: metrics.write({"step": step, **values}), events.write]
    closers = [metrics.close, samples.close, events.close]
    if wandb:
        run = _wandb_run(folder)
        sinks.append(lambda step, values: run.log(dict(values), step=step))
        closers.append(run.finish)
    return Writers(sinks, samples.write, closers, [metrics.settle, samples.settle, events.settle])


class _JsonLines:
    """A file of one JSON object a line, each flushed as it is written."""

    def __init__(self, path: pathlib.Path, resume_step: int):
        self._path = path
        if path.is_file():
            write_atomically(path, "".join(_lines_until(path, resume_step)))
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        with _refused(self._path):
            self._file.write(json.dumps(_plain(row), allow_nan=False) + "\n")
            self._file.flush()

    def settle(self) -> None:
        with _refused(self._path):
            self._file.close()
            self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def _refused(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Refused(f"cannot write {path} ({error.strerror}): make room and run again") from error


def _lines_until(path: pathlib.Path, resume_step: int) -> list[str]:
    """The whole lines of steps up to `resume_step`; none for step 0, where a run starts anew."""
    kept = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            step = json.loads(line)["step"] if line.endswith("\n") else math.inf
        except (ValueError, KeyError, TypeError):
            _log.warning("%s:%d is not a JSON object with a step: dropped", path, number)
            continue
        if 0 < resume_step and step <= resume_step:
            kept.append(line)
    return kept


class _Events:
    """TensorBoard's event file, written without TensorFlow."""

    def __init__(self, folder: pathlib.Path, resume_step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._records = event_pb2, summary_pb2, RecordWriter
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / name
        self._file = RecordWriter(self._path.open("ab"))
        self._add(file_version="brain.Event:2")
        # Tells TensorBoard to hide what earlier files say of these steps.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(step=resume_step + 1 if resume_step else 0, session_log=start)

    def _add(self, **fields: Any) -> None:
        with _refused(self._path):
            self._file.write(self._event.Event(wall_time=time.time(), **fields).SerializeToString())
            self._file.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step=step, summary=self._summary.Summary(value=scalars))

    def settle(self) -> None:
        with _refused(self._path):
            self._file.close()
            self._file = self._records(self._path.open("ab"))

    def close(self) -> None:
        self._file.close()


def _wandb_run(folder: pathlib.Path) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise Refused("Weights & Biases is missing: `pip install wandb`, or set Recording.wandb = False") from error
    config = folder / "config.gin"
    run_id = f"{folder.name}-{zlib.crc32(str(folder.resolve()).encode()):08x}"  # the same when the run resumes
    return wandb.init(
        dir=str(folder), name=folder.name, id=run_id, resume="allow",
        config={"config.gin": config.read_text()} if config.is_file() else {},
    )  # fmt: skip


def _number(name: str, value: Any) -> float | int:
    if isinstance(value, bool | int):
        return int(value)
    try:
        return float(value)
    except (TypeError, ValueError):
        shape = getattr(value, "shape", type(value).__name__)
        raise Refused(f"metric {name!r} must be one number a step, got {shape}") from None


def _plain(x: Any) -> Any:
    """The same in JSON's own types, where a number that is not finite is null."""
    if isinstance(x, Mapping):
        return {str(name): _plain(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    if hasattr(x, "tolist"):  # numpy and JAX
        return _plain(x.tolist())
    return None if isinstance(x, float) and not math.isfinite(x) else x


class ProgressBar:
    """Where a run is and how it goes; from `progress_bar`."""

    def __init__(self, bar: Any, num_steps: int, first_step: int, every_seconds: float, stream: TextIO, title: str):
        self._bar, self._stream, self._title = bar, stream, title
        self._num_steps, self._every = num_steps, every_seconds
        self._step = self._timed_from = first_step
        self._first_time = self._last_line = time.monotonic()
        self._compiled = False

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows a step: reward (or loss), accuracy, tokens a second, time left; evaluations get their own line."""
        found = "  ".join(f"{name[5:]} {value:.3f}" for name, value in metrics.items() if name.startswith("eval/"))
        if found:
            self.say(f"evaluation after step {step}: {found}")
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(_shown(metrics), refresh=False)
            self._bar.update(step - self._step)
        elif self._every < math.inf and (step >= self._num_steps or now - self._last_line >= self._every):
            done = step - self._timed_from
            known = self._compiled and done > 0  # the first step compiles, and would spoil the estimate
            left = (now - self._first_time) / done * (self._num_steps - step) if known else math.nan
            self._last_line = now
            self.say(f"step {step}/{self._num_steps}  {_shown(metrics)}  {_clock(left)} left")
        self._step = step
        if not self._compiled:
            self._compiled, self._timed_from, self._first_time = True, step, now

    def say(self, text: str) -> None:
        """A line of its own, with the title before it."""
        if self._bar is not None:
            self._bar.write(self._title + text, file=self._stream)
        elif self._every < math.inf:
            print(self._title + text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def progress_bar(num_steps: int, *, first_step: int = 0, title: str = "", quiet: bool = False,
                 every_seconds: float = 10.0, stream: TextIO | None = None) -> ProgressBar:  # fmt: skip
    """A progress bar on a terminal; elsewhere one plain line every `every_seconds`; nothing if `quiet`."""
    stream = sys.stderr if stream is None else stream
    title = f"{title}: " if title else ""
    bar = None
    if quiet or jax.process_index() != 0:
        every_seconds = math.inf
    elif stream.isatty():
        import tqdm

        bar = tqdm.tqdm(
            total=num_steps, initial=first_step, file=stream, dynamic_ncols=True, desc=title.strip(" :") or "training",
            bar_format="{desc} {bar} {n_fmt}/{total_fmt}  {postfix}  {remaining} left",
        )  # fmt: skip
    shown = ProgressBar(bar, num_steps, first_step, every_seconds, stream, title)
    if first_step:
        shown.say(f"goes on after step {first_step} of {num_steps}")
    return shown


def _shown(metrics: Mapping[str, float]) -> str:
    shown = [f"{name} {metrics[name]:.3f}" for name in ("reward", "accuracy") if name in metrics]
    if not shown and "loss" in metrics:
        shown = [f"loss {metrics['loss']:.3f}"]
    if "tokens_per_second" in metrics:
        speed = metrics["tokens_per_second"]
        shown.append(f"{speed / 1000:.1f}k tokens/s" if speed >= 1000 else f"{speed:.0f} tokens/s")
    return "  ".join(shown)


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
