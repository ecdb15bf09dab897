"""A bare decode loop, the measure of mlrl.generate: unrolled layers, fused qkv, a cache a layer in the carry.

It samples at temperature 1 and knows nothing else: no padding of prompts, no log-probs, no groups.
Weights are a dict {"embedding" [V,D], "norm" [D], "layers": [{"attention_norm", "qkv", "out", "mlp_norm", "gate_up",
"down"}, ...]}; qkv is [D,K,H+2,W]: beside each key/value head its own H query heads, then the key, then the value.
"""

import jax
import jax.numpy as jnp
from jax import lax


def norm(x, scale):
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def rotate(x, positions):
    half = x.shape[-1] // 2
    angle = positions[:, None, None, None] * 10_000.0 ** (-jnp.arange(half) / half)
    x1, x2 = x[..., :half], x[..., half:]
    return jnp.concatenate([x1 * jnp.cos(angle) - x2 * jnp.sin(angle), x2 * jnp.cos(angle) + x1 * jnp.sin(angle)], -1)


def layer(w, x, positions, mask, cache, column):
    """One pre-norm block on x [B,L,D]; the cache is (keys [B,K,W,M], values [B,K,M,W]) or None."""
    (rows, length, _), (_, k, h, width) = x.shape, w["qkv"].shape
    qkv = jnp.einsum("bld,dkhw->blkhw", norm(x, w["attention_norm"]), w["qkv"])
    rotated = rotate(qkv[..., :-1, :], positions)
    queries = jnp.moveaxis(rotated[..., :-1, :] * width**-0.5, 1, 3).reshape(rows, k, (h - 2) * length, width)
    keys, values = jnp.moveaxis(rotated[..., -1, :], 1, 3), jnp.moveaxis(qkv[..., -1, :], 1, 2)
    if cache is not None:
        keys = lax.dynamic_update_slice(cache[0], keys, (0, 0, 0, column))
        values = lax.dynamic_update_slice(cache[1], values, (0, 0, column, 0))
    logits = (queries @ keys).reshape(rows, k, h - 2, length, -1)
    weights = jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1)
    mixed = (weights.reshape(rows, k, (h - 2) * length, -1) @ values).reshape(rows, k, h - 2, length, width)
    x = x + jnp.einsum("bkhlw,khwd->bld", mixed, w["out"])
    gate_up = jnp.einsum("bld,dgm->blgm", norm(x, w["mlp_norm"]), w["gate_up"])
    return x + (jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]) @ w["down"], (keys, values)


def prefill(params, prompts, new_tokens):
    """Reads prompts [B,P]: the last hidden states [B,D], and caches with room for `new_tokens` more columns."""
    width = prompts.shape[1]
    x, caches = params["embedding"][prompts], []
    for w in params["layers"]:
        x, (keys, values) = layer(w, x, jnp.arange(width), jnp.tril(jnp.ones((width, width), bool)), None, 0)
        room = ((0, 0), (0, 0), (0, 0), (0, new_tokens))
        caches.append((jnp.pad(keys, room), jnp.pad(values, (*room[:2], room[3], room[2]))))
    return x[:, -1], caches


def decode(params, prompts, key, *, new_tokens, eos=-1):
    """Appends at most `new_tokens` sampled tokens to prompts [B,P] int32, until every row has its `eos`.

    Returns [B,new_tokens]; what a row has behind its first `eos` means nothing.
    """
    rows, width = prompts.shape
    last, caches = prefill(params, prompts, new_tokens)

    def choose(x, t):
        logits = norm(x, params["norm"]) @ params["embedding"].T
        return jax.random.categorical(jax.random.fold_in(key, t), logits).astype(jnp.int32)

    def step(carry):
        t, token, tokens, caches, done = carry
        column, written = width + t - 1, []
        x = params["embedding"][token][:, None]
        for w, cache in zip(params["layers"], caches):
            x, cache = layer(w, x, column[None], jnp.arange(width + new_tokens) <= column, cache, column)
            written.append(cache)
        token = choose(x[:, 0], t)
        tokens = lax.dynamic_update_slice(tokens, token[:, None], (0, t))
        return t + 1, token, tokens, written, done | (token == eos)

    token = choose(last, 0)
    tokens = jnp.zeros((rows, new_tokens), jnp.int32).at[:, 0].set(token)
    carry = (jnp.int32(1), token, tokens, caches, token == eos)
    return lax.while_loop(lambda carry: (carry[0] < new_tokens) & ~jnp.all(carry[-1]), step, carry)[2]
