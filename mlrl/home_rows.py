"""Rows that stay on the device that holds them: they are taken and put in order without being sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mlrl import meshes
from mlrl.types import Array


def parts_of(rows: int) -> int:
    """Into how many equal parts the current mesh splits so many rows: 1 without a mesh, or if they do not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else meshes.row_shards(mesh)
    return shards if rows % shards == 0 else 1


def take_own(x: Array, own: Array, axis: int = 0) -> Array:
    """Rows that every part takes from itself, so that no device sends any.

    Args:
      x: its rows, along `axis`, are `parts` equal parts.
      own: [parts, n] int32, which rows of its own a part takes.
    Returns: the n * parts rows, along `axis`.
    """
    parts, taken = own.shape
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    split_up = x.reshape(*before, parts, x.shape[axis] // parts, *after)
    take = jax.vmap(lambda rows, i: jnp.take(rows, i, axis, mode="clip"), in_axes=(axis, 0), out_axes=axis)
    return take(split_up, own).reshape(*before, parts * taken, *after)


def take(tree: Any, rows: Array, axis: Callable[[Array], int] = lambda x: 0) -> Any:
    """The given rows of every leaf; nothing is sent between devices if each finds its own among its own.

    Which of the two it is is known only when the program runs: both are compiled, one is done.

    Args:
      tree: arrays of the same number of rows, N.
      rows: [n] int32, split as rows are.
      axis: of a leaf: along which its rows are.
    """
    anywhere = lambda: jax.tree.map(lambda x: jnp.take(x, rows, axis(x), mode="clip"), tree)  # noqa: E731
    first = jax.tree.leaves(tree)[0]
    count = first.shape[axis(first)]
    parts = parts_of(count)
    if parts == 1 or parts_of(rows.size) == 1:
        return anywhere()
    each = count // parts
    own = rows.reshape(parts, -1) - each * jnp.arange(parts, dtype=rows.dtype)[:, None]
    at_home = jnp.all((own >= 0) & (own < each))
    return jax.lax.cond(at_home, lambda: jax.tree.map(lambda x: take_own(x, own, axis(x)), tree), anywhere)
