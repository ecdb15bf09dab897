"""The compiler for TPUs beside this environment: installed once, into .libtpu, for a command that needs it.

    python -m benchmarks.pods.libtpu python -m pytest tests/pods/tpu_test.py

Where it cannot be installed, it says why in one line, and the command is not run. (`pip install 'jax[tpu]'` installs
it for good.)
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys

FOLDER = pathlib.Path(__file__).resolve().parents[2] / ".libtpu"


def wanted() -> str:
    """The version that the installed jax asks for, such as libtpu==0.0.42.*"""
    asked = [line for line in importlib.metadata.requires("jax") or () if line.startswith("libtpu")]
    return re.match(r"[^;]+", asked[0])[0].strip()


def install(folder: pathlib.Path = FOLDER) -> str:
    """Installs libtpu into a folder that does not have it; "" or, in a line, why it could not."""
    if (folder / "libtpu").is_dir():
        return ""
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, "--target", str(folder), wanted()], capture_output=True, text=True)
    said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
    return f"pip install {wanted()} ... said: {said[-1]}" if done.returncode else ""


def environment() -> dict[str, str]:
    """This process's environment, with libtpu on the path of modules."""
    path = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def main() -> int:
    problem = install()
    if problem:
        print(f"nothing was compiled for TPUs: {problem}")
        return 0
    return subprocess.run(sys.argv[1:], env=environment()).returncode


if __name__ == "__main__":
    sys.exit(main())
