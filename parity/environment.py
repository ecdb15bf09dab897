"""The environment of the parity tests, with torch, TRL and transformers beside ours: made once, in parity/.venv."""

from __future__ import annotations

import pathlib
import subprocess
import sys

FOLDER = pathlib.Path(__file__).resolve().parent / ".venv"
PACKAGES = ("torch==2.13.0", "trl==1.16.0", "transformers==5.24.0")


def run(folder: pathlib.Path, script: pathlib.Path, *arguments: str | pathlib.Path) -> str:
    """Runs a script in the environment, which is made if need be; returns "" or, in a line, why it could not."""
    python = folder / "bin" / "python"
    making = [
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *PACKAGES],
    ]
    command = [str(python), str(script), *map(str, arguments)]
    imports = [str(python), "-c", "import torch, transformers, trl"]
    installed = python.is_file() and not subprocess.run(imports, capture_output=True).returncode
    for step in [command] if installed else [*making, command]:
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
            return f"{' '.join(step[1:4])} ... said: {said[-1]}"
    return ""
