"""Compiles GRPO on large models for slices of 4 to 1,024 chips, and writes the table of docs/pods.md.

    python -m benchmarks.pods.table                     compiles what results.json has not yet, and writes the table
    python -m benchmarks.pods.table --minutes 40        the same, but begins nothing after so many minutes
    python -m benchmarks.pods.table --only qwen3_8b     only models and topologies whose names hold these words

A model of 64 unrolled layers takes the compiler an hour or more. So each cell is compiled at two small depths, and what
is linear in the depth (memory, products, bytes sent) is continued to the model's own:  x(L) = x(1) + (L - 1) (x(2) -
x(1)). The column "by" says how often that was checked: cells that were also compiled whole are in `WHOLE`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import subprocess
import sys
import time
from typing import Any, NamedTuple

from benchmarks.pods import libtpu
from mlrl.pods.chips import chip_of

HERE = pathlib.Path(__file__).resolve().parent
REPO = HERE.parent.parent
RESULTS, PAGE = HERE / "results.json", REPO / "docs" / "pods.md"
MARKS = "<!-- made by python -m benchmarks.pods.table -->", "<!-- end of what it makes -->"
