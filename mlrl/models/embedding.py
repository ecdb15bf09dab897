"""The embedding's lookup on a mesh: what moves is tokens and their vectors, and never the table."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlrl.axes import divided, spec_of
from mlrl.types import Array


def look_up(table: Array, tokens: Array) -> Array:
    """table[tokens]: [V,D], [B,L] int32 -> [B,L,D], in the table's dtype.

    On a mesh the table stays as axes.PARAMETERS splits it, and so does its gradient. Devices that hold parts of its
    width look up each other's rows of tokens, and exchange what they found for their own rows' whole vectors; of a
    vocabulary in parts each device looks up what it has, and the rest adds zeros. Left to itself, a compiler gathers
    the table.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return jnp.take(table, tokens, axis=0)
    width, vocabulary = divided("width", table.shape[1], mesh), divided("vocabulary", table.shape[0], mesh)
    if not width + vocabulary:
        return jnp.take(table, tokens, axis=0)
    rows = divided("rows", tokens.shape[0], mesh)

    def of_device(table: Array, tokens: Array) -> Array:
        shared = tuple(name for name in width if name in rows)  # devices with other rows, and other parts of the width
        if shared:
            tokens = jax.lax.all_gather(tokens, shared, axis=0, tiled=True)
        own = tokens - table.shape[0] * jax.lax.axis_index(vocabulary) if vocabulary else tokens
        here = (own >= 0) & (own < table.shape[0])
        found = jnp.where(here[..., None], jnp.take(table, own, axis=0, mode="clip"), 0)
        if shared:
            found = jax.lax.all_to_all(found, shared, split_axis=0, concat_axis=2, tiled=True)
        elif width:
            found = jax.lax.all_gather(found, width, axis=2, tiled=True)
        return jax.lax.psum(found, vocabulary) if vocabulary else found

    by_row = spec_of(("rows", "columns"), tokens.shape, mesh)
    given = (spec_of(("vocabulary", "width"), table.shape, mesh), by_row)
    return jax.shard_map(of_device, in_specs=given, out_specs=by_row, check_vma=False)(table, tokens)
