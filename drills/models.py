"""Hugging Face folders for the drill of mutated files, and whether what was read is what the files hold."""

from __future__ import annotations

import pathlib
import tempfile

import jax
import numpy as np
from safetensors.numpy import load_file

from mlrl.models import pretrained
from mlrl.models.transformer import Config, Transformer, initialize

_SMALL = dict(vocabulary_size=24, width=16, layers=2, heads=2, kv_heads=1, head_width=8, mlp_width=24)
SHAPES = {"llama": Config(**_SMALL), "qwen2": Config(**_SMALL, qkv_bias=True, tied_head=False)}


def write(folder: pathlib.Path) -> list[pathlib.Path]:
    """A model in one file, and one in shards with an index."""
    for number, (name, config) in enumerate(SHAPES.items()):
        params = initialize(Transformer(config), jax.random.key(number))
        pretrained.write(folder / name, params, config, shard_bytes=8000 if number else 10**9)
    return [folder / name for name in SHAPES]


def use(folder: pathlib.Path) -> str:
    """Reads the model, writes it again, and compares the tensors of both folders by another reader."""
    config = pretrained.config(str(folder))
    start = pretrained.start(path=str(folder))
    params = start(Transformer(config), jax.random.key(0))
    with tempfile.TemporaryDirectory() as again:
        pretrained.write(again, params, config)
        found, wanted = (_tensors(pathlib.Path(where)) for where in (again, folder))
    if not found.keys() <= wanted.keys():
        return f"the file has no tensor {sorted(found.keys() - wanted.keys())[0]}"
    for name, tensor in found.items():
        if not np.array_equal(tensor, wanted[name], equal_nan=True):
            return f"the tensor {name} is another than in the file"
    settings = pretrained.settings(folder)
    if (config.width, config.layers) != (settings["hidden_size"], settings["num_hidden_layers"]):
        return f"width and layers are {(config.width, config.layers)}"
    return ""


def _tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found
