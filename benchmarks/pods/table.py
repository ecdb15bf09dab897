"""Compiles GRPO on large models for slices of 4 to 1,024 chips, and writes the table of docs/pods.md.

    python -m benchmarks.pods.table                     compiles what results.json has not yet, and writes the table
    python -m benchmarks.pods.table --minutes 40        the same, but begins nothing after so many minutes
    python -m benchmarks.pods.table --only qwen3_8b     only cells whose names hold these words
    python -m benchmarks.pods.table --write             only writes the table, from results.json

A model of many unrolled layers takes the compiler hours. So a cell is compiled at two small depths, and what grows by as
much with every layer (memory, products, bytes sent) is continued to the model's depth L:

    x(L) = x(a) + (L - a) / (b - a) * (x(b) - x(a))        a, b = DEPTHS

Cells in WHOLE are compiled at their full depth too, and the table shows both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.pods import libtpu
from mlrl.pods.chips import CHIPS, chip_of
from mlrl.pods.command import _bytes, _seconds

HERE = pathlib.Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results.json", HERE.parent.parent / "docs" / "pods.md"
BEGIN, END = "<!-- made by python -m benchmarks.pods.table -->", "<!-- that was it -->"

DEPTHS = (1, 2)
PROMPT, COMPLETION, GROUP = 512, 1536, 8


class Model(NamedTuple):
    """A file of gin/models, its name, its layers, and the chips that split each of its layers' products."""

    file: str
    name: str
    layers: int
    tensor: int


class Cell(NamedTuple):
    """A model on a slice: its mesh, and the prompts of a step."""

    model: Model
    topology: str
    fsdp: int
    prompts: int

    def __str__(self) -> str:
        return f"{self.model.file} {self.topology}"


MODELS = (
    Model("qwen3_06b", "Qwen3-0.6B", 28, 1),
    Model("qwen3_8b", "Qwen3-8B", 36, 1),
    Model("qwen3_32b", "Qwen3-32B", 64, 8),
    Model("llama3_70b", "Llama-3-70B", 80, 8),
)
