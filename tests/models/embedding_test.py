"""Tokens are looked up alike on every mesh, and neither the table nor its gradient is gathered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl import meshes
from mlrl.models.embedding import look_up

V, D, L = 24, 16, 6


def both(table, tokens):
    def total(table):
        found = look_up(table, tokens)
        return jnp.sum(jnp.sin(3.0 * found)), found

    (_, found), gradient = jax.value_and_grad(total, has_aux=True)(table)
    return found, gradient


@pytest.mark.parametrize("rows", [8, 2, 1])
@pytest.mark.parametrize("sizes", [dict(fsdp=4), dict(data=2, fsdp=2, tensor=2), dict(tensor=8), dict(data=8),
                                   dict(fsdp=2, tensor=2, sequence=2), dict(fsdp=8)], ids=str)  # fmt: skip
def test_every_mesh_finds_the_same_and_sums_the_same_gradient(sizes, rows):
    table = jax.random.normal(jax.random.key(0), (V, D))
    tokens = jax.random.randint(jax.random.key(1), (rows, L), 0, V).at[0, :2].set(jnp.array([0, V - 1]))
    wanted = both(table, tokens)
    np.testing.assert_array_equal(wanted[0], table[tokens])
    count = np.prod(list(sizes.values()))
    with meshes.use(meshes.mesh(**{"data": 1} | sizes, devices=int(count))):
        found = jax.jit(both)(table, tokens)
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-6, atol=1e-6)


def test_a_table_in_parts_stays_where_it_is():
    mesh = meshes.mesh(data=1, fsdp=4, tensor=2)
    split = jax.NamedSharding(mesh, jax.P("tensor", "fsdp"))
    table = jax.ShapeDtypeStruct((8 * V, 8 * D), jnp.float32, sharding=split)
    with meshes.use(mesh):
        lowered = jax.jit(both, out_shardings=(None, split)).lower(table, jax.ShapeDtypeStruct((4, L), jnp.int32))
        compiled = lowered.compile().as_text()
    whole = f"f32[{8 * V},{8 * D}]"
    assert f"f32[{4 * V},{2 * D}]" in compiled and whole not in compiled
