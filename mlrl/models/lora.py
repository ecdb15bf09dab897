"""Adapters on a frozen base: which parameters are trained, which are frozen and shared, and both as one again.

A run holds the frozen base once, in TrainState.frozen. What is trained (the adapters, and a value head or critic) is
TrainState.params; the reference holds what it does not share with the base: the adapters that the run began with.
Without adapters everything is trained, nothing is frozen, and every function here gives what it was given.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mlrl.models.projections import LOW_RANK, to_float, to_int8
from mlrl.models.transformer import CRITIC, Config, Transformer, initialize, plain
from mlrl.types import Array, Params, TrainState

Path = tuple[str, ...]  # of a leaf, or of a whole kernel, in the nested dict of parameters


def split(params: Params) -> tuple[Params, Params]:
    """(what is trained, what is frozen) of the parameters of a policy; without adapters all are trained: (params, ()).
    """
    flat = traverse_util.flatten_dict(params)
    trained = {path for path in flat if path[-1] in LOW_RANK or path[0] in CRITIC}
    if not any(path[-1] in LOW_RANK for path in trained):
        return params, ()
    pick = lambda paths: traverse_util.unflatten_dict({path: flat[path] for path in paths})  # noqa: E731
    return pick(trained), pick(flat.keys() - trained)


def join(frozen: Params, params: Params) -> Params:
    """One tree of both, the arrays themselves and no copies; a leaf that both have is that of `params`."""
    if not frozen:
        return params
    both = traverse_util.flatten_dict(frozen) | traverse_util.flatten_dict(params or {})
    return traverse_util.unflatten_dict(both)


def policy(state: TrainState) -> Params:
    """All parameters of the policy, and of its value head or critic."""
    return join(state.frozen, state.params)


def reference(state: TrainState) -> Params:
    """All parameters of the frozen reference: its own, and the policy's frozen ones for those that it has not."""
    return join(state.frozen, state.reference)


def adapters(params: Params) -> dict[Path, tuple[int, ...]]:
    """The shapes of the adapters' factors, by their paths."""
    flat = traverse_util.flatten_dict(params)
    return {path: leaf.shape for path, leaf in flat.items() if path[-1] in LOW_RANK}


def merge(params: Params, config: Config) -> tuple[Params, Config]:
    """Plain parameters with the same logits, in fp32, and their plain Config: W + s A B in place of W, A and B.

    Parameters without adapters or int8 stay as they are.

    Args:
      params: all parameters, as `policy` gives them.
    """
    if plain(config) == config:
        return params, config

    def merged(tree: Any) -> Any:
        if not isinstance(tree, dict) or "int8" in tree:
            return to_float(tree, jnp.float32)
        if LOW_RANK[0] not in tree:
            return {name: merged(part) for name, part in tree.items()}
        if jnp.ndim(tree["lora_scale"]):  # of layers that are scanned: one product for each
            return jax.vmap(merged)(tree)
        a, b = (tree[name] for name in LOW_RANK)
        low_rank = jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)
        kernel = to_float(tree["kernel"], jnp.float32) + tree["lora_scale"] * low_rank
        return {"kernel": kernel} | {name: merged(tree[name]) for name in tree if name == "bias"}

    return merged(params), plain(config)


def adapted(params: Params, model: Transformer, key: Array) -> Params:
    """Parameters of plain(model.config) as `model` holds them: in its dtypes, with adapters that begin at zero.

    Args:
      params: plain ones, of any floating-point dtype; what `model` has besides them (the adapters) is made by `key`.
    """
    given, wanted = traverse_util.flatten_dict(params), kernels(model, key)
    held = {path: as_held(given[path], like) for path, like in wanted.items() if path in given}
    return traverse_util.unflatten_dict(fresh(model, key, [path for path in wanted if path not in held]) | held)


def kernels(model: Transformer, key: Array) -> dict[Path, Any]:
    """Shapes and dtypes of a model's parameters, by path; an int8 kernel with its scales is one."""
    return _whole(jax.eval_shape(functools.partial(initialize, model), key))


def as_held(leaf: Array | np.ndarray, like: Any) -> Any:
    """A leaf in the dtype of one of `kernels`, which may be int8."""
    if isinstance(like, dict):
        summed = tuple(i for i, width in enumerate(like["scale"].shape) if width == 1)
        return to_int8(jnp.asarray(leaf), summed)
    return jnp.asarray(leaf, like.dtype)


def fresh(model: Transformer, key: Array, paths: Sequence[Path]) -> dict[Path, Any]:
    """Some of a model's random parameters; in one jit, so that the others are never computed."""
    pick = lambda key: [_whole(initialize(model, key))[path] for path in paths]  # noqa: E731
    return dict(zip(paths, jax.jit(pick)(key))) if paths else {}


def _whole(params: Params) -> dict[Path, Any]:
    return traverse_util.flatten_dict(params, is_leaf=lambda _, tree: "int8" in tree)
