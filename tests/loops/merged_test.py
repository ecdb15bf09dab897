"""Programs that differ in numbers are one program that takes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl.loops import merged
from mlrl.loops.merged import Differs

X = jnp.linspace(-1.0, 2.0, 5)


def plain(c):
    return lambda x: c * x + 1.0 / c


def table(c):
    rows = np.arange(5.0, dtype=np.float32) * c
    return lambda x: x + jnp.asarray(rows)


def looped(c):
    def f(x):
        x, ys = jax.lax.scan(lambda s, t: (s * c + t, jnp.sum(s) * c), x, jnp.arange(3.0))
        x = jax.lax.while_loop(lambda s: jnp.sum(s) < 10.0 * c, lambda s: s + c, x)
        x = jax.lax.cond(jnp.sum(x) > 12.0, lambda s: s - c, lambda s: s * c, x)
        return jax.jit(lambda s: s ** (c + 1.0))(jnp.abs(x)), ys

    return f


def of_a_gradient(c):
    smooth = jax.checkpoint(lambda x: jnp.sum(jax.nn.silu(c * x) + jnp.clip(x, -c, c) ** 2))
    return lambda x: (jax.grad(smooth)(x), jax.nn.relu(x * c))


def drawn(c):
    return lambda x: x + c * jax.random.normal(jax.random.key(3), x.shape)


def both(make, values=(0.5, 1.5, 2.0)):
    programs = [jax.make_jaxpr(make(c))(X) for c in values]
    return merged.merged(programs), [jax.jit(make(c)) for c in values]


@pytest.mark.parametrize("make", [plain, table, looped, of_a_gradient, drawn], ids=lambda f: f.__name__)
def test_the_merged_program_is_each_of_them(make):
    (function, numbers), alone = both(make)
    assert numbers and all(len(number) == 3 for number in numbers)
    for i, f in enumerate(alone):
        found = jax.jit(function)([number[i] for number in numbers], X)
        for a, b in zip(found, jax.tree.leaves(f(X)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
    stacked = jax.vmap(lambda n: function(n, X))([jnp.asarray(n) for n in numbers])
    np.testing.assert_allclose(stacked[0][1], jax.tree.leaves(alone[1](X))[0], rtol=1e-6)


def test_equal_programs_have_no_numbers():
    (_, numbers), _ = both(plain, (2.0, 2.0))
    assert numbers == []


def test_only_what_differs_is_taken_out():
    (_, numbers), _ = both(lambda c: lambda x: 3.0 * x + c)
    np.testing.assert_array_equal(numbers, [[0.5, 1.5, 2.0]])


def calls_python(c):
    return lambda x: jax.pure_callback(lambda x: x * np.float32(c), jax.ShapeDtypeStruct(x.shape, x.dtype), x)


@pytest.mark.parametrize(("make", "words"), [
    (lambda c: lambda x: x if c < 1.0 else x * c, "0 or 1 operations"),
    (lambda c: lambda x: jnp.sin(x) if c < 1.0 else jnp.cos(x), "there is sin or cos in the same place"),
    (lambda c: lambda x: jnp.zeros(int(2 * c)) + x[0], "shape|float32"),
    (lambda c: lambda x: jax.lax.scan(lambda s, _: (s * 2.0, None), x, length=int(2 * c))[0], "length of scan is 1 or"),
    (lambda c: lambda x: x + x[::-1] if c < 1.0 else x[::-1] + x, "takes arrays from elsewhere"),
    (lambda c: lambda x: x * 2.0 if c < 1.0 else x * x[0], "operations|computed"),
    (calls_python, "Python function"),
    (lambda c: lambda x: x + jax.random.normal(jax.random.key(int(2 * c)), x.shape), "."),
], ids=range(8))  # fmt: skip
def test_what_differs_in_more_than_numbers_is_not_one(make, words):
    if words == ".":  # the seed of a key is a number like any other
        (function, numbers), alone = both(make)
        np.testing.assert_array_equal(function([n[2] for n in numbers], X)[0], alone[2](X))
        return
    with pytest.raises(Differs, match=words):
        both(make)
