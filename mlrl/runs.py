"""A run and its folder: what is restored, written down and saved as a loop goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from mlrl import checkpoints, monitoring, writers
from mlrl.evaluation import Evaluator
from mlrl.types import Batch, Metrics, Prompts, Refused, Task, TrainState


@dataclasses.dataclass(frozen=True)
class Recording:
    """What a run writes down.

    save_every_steps      a checkpoint every so many steps, besides the first and the last
    keep_last, keep_best  how many checkpoints stay; the best by `best_metric`, an evaluation's "task/metric"
    samples_every_steps   rows go to samples.jsonl every so many steps; `samples_rows` of them
    max_bad_updates       updates in a row that may be skipped because they were not finite
    wandb                 also log to Weights & Biases
    """

    save_every_steps: int = 50
    keep_last: int = 2
    keep_best: int = 0
    best_metric: str = ""
    samples_every_steps: int = 10
    samples_rows: int = 8
    max_bad_updates: int = 5
    wandb: bool = False
