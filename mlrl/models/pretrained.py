"""Pretrained weights: a Hugging Face folder as the first parameters of a run, and parameters as such a folder."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax

from mlrl import meshes
from mlrl.models import families, layers, lora, tensor_files
from mlrl.models.layouts import Path, Tensor, covers, overlap
from mlrl.models.transformer import Config, Transformer
from mlrl.types import Array, Params, Refused

CONFIG = "config.json"


def config(path: str, *, base: Config = Config()) -> Config:
    """The shape of the model in a folder.

    Args:
      path: a folder with a config.json.
      base: gives what no checkpoint holds: value_head, critic_layers, adapters (lora_rank, lora_alpha,
        lora_kernels), scan_layers, attention, remat, dtype and param_dtype.
    Raises: Refused, naming the setting that mlrl does not have, or the field of `base` that the folder decides.
    """
    return _config(path, base, "pretrained.config.base", judges=False)


def judge(*, path: str, base: Config = Config()) -> tuple[Config, Start]:
    """The shape and the weights of a reward model in a folder: a sequence classifier of transformers with one label.

    Its score, [1, D] without a bias, is the value head; it has no output head. transformers reads it behind the last
    token, that is behind the EOS, and not before it.

    Args:
      path: a folder as of `start`, whose architecture is one ...ForSequenceClassification.
      base: as of `config`.
    Raises: Refused, as `config` and `start` do.
    """
    made = Start(str(path), judges=True)
    _matched(made.path, judges=True)
    return _config(path, base, "the reward model's base", judges=True), made


def _config(path: str, base: Config, where: str, *, judges: bool) -> Config:
    _, fields = _family(path, judges=judges)
    ours = {name: getattr(base, name) for name in families.OURS if hasattr(base, name)}
    found = Config(**(ours | fields))
    for name in families.differing(base, found):
        if getattr(base, name) != getattr(Config(), name):
            raise Refused(f"{where} sets {name} to {_shown(base, name)}, but {path} decides it: leave it out")
    return found


def start(*, path: str) -> Start:
    """A run's first parameters from a folder, as `Experiment.start`; the heads that it lacks start at random.

    Args:
      path: a folder with config.json and model.safetensors, or shards with model.safetensors.index.json.
    Raises: Refused, naming the tensor that is missing, left over, truncated or of another shape. Called with a model,
      the result refuses a Config that is not the folder's, naming its fields.
    """
    made = Start(str(path))
    _matched(made.path)
    return made


@dataclasses.dataclass(frozen=True)
class Start:
    """(model, key) -> parameters; made by `start`, or by `judge` of a sequence classifier."""

    path: str
    judges: bool = False

    def check(self, model: Transformer) -> None:
        """Refuses a model whose shape is not the folder's."""
        _, fields = _family(self.path, judges=self.judges)
        there, here = families.shape_of(Config(**fields)), families.shape_of(model.config)
        names = families.differing(there, here)
        if names:
            told = [f"Config.{name} is {_shown(here, name)}, not {_shown(there, name)}" for name in names]
            raise Refused(f"the model is not that of {self.path}: {', '.join(told)}; set Experiment.model = "
                          "@pretrained.config()")  # fmt: skip

    def __call__(self, model: Transformer, key: Array) -> Params:
        """Reads tensor by tensor, into parameters of the model's param_dtype; those that are not there are random."""
        self.check(model)
        tensors, stored = _matched(self.path, judges=self.judges)
        kernels = lora.kernels(model, key)
        of_leaf: dict[Path, list[Tensor]] = {}
        for tensor in tensors:
            of_leaf.setdefault(tensor.leaf, []).append(tensor)
        there = {leaf: layers.place(model.config, leaf) for leaf in of_leaf}
        filled = {path for path, _ in there.values()}
        flat = lora.fresh(model, key, [path for path in kernels if path not in filled])
        for leaf, parts in of_leaf.items():
            path, period = there[leaf]
            like = kernels[path] if period is None else jax.eval_shape(_first, kernels[path])
            held = _held(leaf, parts, stored, like)
            if period is not None:
                before = flat[path] if path in flat else _empty(path, kernels[path])
                held = _with_period(path, before, held, period)
            flat[path] = held
        return traverse_util.unflatten_dict(flat)


def _held(leaf: Path, parts: list[Tensor], stored: Mapping[str, tensor_files.Stored], like: Any) -> Any:
    """A leaf that some tensors fill, as one of `lora.kernels`; on a mesh, each process reads its devices' parts of it.

    One that is to be int8 is read whole, since its scales are those of whole columns.
    """
    shape, dtype = (like["int8"].shape, np.float32) if isinstance(like, dict) else (like.shape, like.dtype)
    assert covers(parts, leaf, math.prod(shape)), f"the layout leaves a part of {leaf} unset"

    def read(index: tuple[slice, ...]) -> np.ndarray:
        index = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape))
        found = np.empty([part.stop - part.start for part in index], dtype)
        for tensor in parts:
            if meet := overlap(tensor.view, shape, index):
                whole = stored[tensor.name].read().reshape(meet.shape)
                found[meet.inside] = whole[meet.outside].transpose(meet.order)
        return found

    if isinstance(like, dict):
        everything = lora.as_held(read(tuple(slice(None) for _ in shape)), like)
        return functools.reduce(dict.get, leaf, meshes.placed(traverse_util.unflatten_dict({leaf: everything})))
    return meshes.read_in_parts(leaf, shape, read)


def _first(kernel: Any) -> Any:
    """One period of a stacked kernel."""
    return jax.tree.map(lambda x: x[0], kernel)


def _empty(path: Path, kernel: Any) -> Any:
    """Zeros of a stacked kernel's shape; on a mesh each device makes only what it holds."""
    return jax.jit(lambda: _split(path, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kernel)))()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _with_period(path: Path, kernel: Any, part: Any, period: Array | int) -> Any:
    """A stacked kernel with one of its periods, in its own memory."""
    return _split(path, jax.tree.map(lambda x, new: x.at[period].set(new), kernel, part))


def _split(path: Path, kernel: Any) -> Any:
    """Asks, inside jit, that a kernel be split over the mesh as the parameter at `path`."""
    return functools.reduce(dict.get, path, meshes.split_parameters(traverse_util.unflatten_dict({path: kernel})))


def _shown(config: Config, field: str) -> str:
    """A field's value for a message; a function by its name."""
    value = getattr(config, field)
    return getattr(value, "__name__", repr(value))


def write(folder: str | pathlib.Path, params: Params, config: Config, *, more: Mapping[str, Any] = {},  # noqa: B006
          shard_bytes: int = 5_000_000_000) -> list[str]:  # fmt: skip
    """Writes parameters as a Hugging Face folder, in their own dtype; value head and critic are left out.

    Args:
      folder: made when missing; must hold neither weights nor a config.json.
      params: of the shape of `config`.
      more: further settings of config.json, such as {"eos_token_id": 2}.
      shard_bytes: above it the weights are cut into shards with an index.
    Returns: the names of the files.
    Raises: Refused, if no architecture that is known to mlrl has this shape, or the folder is not empty of weights.
    """
    folder = pathlib.Path(folder)
    family, settings = families.settings_of(config)
    _require_no_model(folder)
    tensors = {tensor.name: tensor for tensor in family.layout(config)}
    flat = traverse_util.flatten_dict(params)
    held: dict[Path, np.ndarray] = {}

    def array(name: str) -> np.ndarray:
        leaf = tensors[name].leaf
        if leaf not in held:
            if any(other[:-1] != leaf[:-1] for other in held):  # one module at a time is on the host
                held.clear()
            path, period = layers.place(config, leaf)
            part = flat[path] if period is None else lax.dynamic_index_in_dim(flat[path], period, keepdims=False)
            held[leaf] = np.asarray(jax.device_get(part))
        return tensors[name].view(held[leaf]).reshape(tensors[name].shape)

    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    files = tensor_files.write(folder, shapes, jnp.dtype(config.param_dtype), array, shard_bytes=shard_bytes)
    text = settings | {"torch_dtype": config.param_dtype} | dict(more)
    (folder / CONFIG).write_text(json.dumps(text, indent=2) + "\n")  # last: without it the folder is no model
    return [CONFIG, *files]


def _require_no_model(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"cannot make the folder {folder} ({error.strerror}): choose another one") from error
    there = [path.name for path in sorted(folder.iterdir()) if path.name == CONFIG or ".safetensors" in path.name]
    if there:
        raise Refused(f"{folder} already holds {there[0]}: choose a new folder")


def settings(path: str | pathlib.Path) -> dict[str, Any]:
    """The config.json of a folder."""
    file = pathlib.Path(path, CONFIG)
    if not file.is_file():
        raise Refused(f"there is no {file}: name the folder of a Hugging Face model")
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise Refused(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise Refused(f"{file} is no group of settings")
    return found


def _family(path: str | pathlib.Path, *, judges: bool = False) -> tuple[families.Family, families.Fields]:
    return families.family_of(settings(path), str(pathlib.Path(path, CONFIG)), judges=judges)


def _matched(path: str, *, judges: bool = False) -> tuple[list[Tensor], dict[str, tensor_files.Stored]]:
    """The tensors that the model of a folder needs, and where each lies. Raises Refused unless they fit exactly."""
    family, fields = _family(path, judges=judges)
    shape = Config(**fields)
    tensors, stored = family.layout(shape), tensor_files.stored(path)
    stored = {name: place for name, place in stored.items() if not name.endswith(family.buffers)}
    if not any(name.startswith(family.prefix) for name in stored):  # saved without its output head
        stored = {family.prefix + name: place for name, place in stored.items()}
    if shape.tied_head and "lm_head.weight" in stored:
        _require_tied(path, stored.pop("lm_head.weight"), stored.get(tensors[0].name))
    for tensor in tensors:
        if tensor.name not in stored:
            raise Refused(f"{path} has no tensor {tensor.name}, which its {CONFIG} calls for")
        if stored[tensor.name].shape != tensor.shape:
            raise Refused(f"the tensor {tensor.name} in {path} has shape {list(stored[tensor.name].shape)}, but its "
                          f"{CONFIG} calls for {list(tensor.shape)}")  # fmt: skip
    left = sorted(set(stored) - {tensor.name for tensor in tensors})
    if left:
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise Refused(f"{path} holds the tensor {left[0]}{more}, for which a {family.architecture} of its {CONFIG} has "
                      "no place")  # fmt: skip
    return tensors, stored


def _require_tied(path: str, head: tensor_files.Stored, embedding: tensor_files.Stored | None) -> None:
    """A tied head that was saved besides must be the embedding."""
    if embedding is not None and not (head.shape == embedding.shape and np.array_equal(head.read(), embedding.read())):
        raise Refused(f"{path} ties the output head to the embedding, but its tensor lm_head.weight is not the "
                      f"embedding: set tie_word_embeddings to false in its {CONFIG}")  # fmt: skip
