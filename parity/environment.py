"""The environment of the parity tests, with torch, TRL and transformers beside ours: made once, in parity/.venv.

    python parity/environment.py     makes it, which takes minutes and can go on beside other work
"""

from __future__ import annotations

import pathlib
import subprocess
import sys

FOLDER = pathlib.Path(__file__).resolve().parent / ".venv"
PACKAGES = ("torch==2.13.0", "trl==1.16.0", "transformers==5.24.0")
IMPORTS = "torch, transformers, trl"


def make(folder: pathlib.Path, packages: tuple[str, ...] = PACKAGES, modules: str = IMPORTS) -> str:
    """Makes the environment if it is not there; returns "" or, in a line, why it could not."""
    python = folder / "bin" / "python"
    imports = [str(python), "-c", f"import {modules}"]
    if python.is_file() and not subprocess.run(imports, capture_output=True).returncode:
        return ""
    install = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *packages]
    return _all_done([sys.executable, "-m", "venv", str(folder)], install)


def run(folder: pathlib.Path, script: pathlib.Path, *arguments: str | pathlib.Path) -> str:
    """Runs a script in the environment, which is made if need be; returns "" or, in a line, why it could not."""
    return make(folder) or _all_done([str(folder / "bin" / "python"), str(script), *map(str, arguments)])


def _all_done(*commands: list[str]) -> str:
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
            return f"{' '.join(command[1:4])} ... said: {said[-1]}"
    return ""


if __name__ == "__main__":
    problem = make(FOLDER)
    print(f"parity/.venv could not be made: {problem}" if problem else "parity/.venv is there")
