"""Random weights whose rows end as they are asked to: one Hugging Face folder that every library starts from."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp

from benchmarks.peers.shapes import EOS, FIRST, PAD, Model, Rows, prompt_ids
from mlrl.models import pretrained
from mlrl.models.transformer import Config, Transformer, causal_mask, initialize, row_positions
from mlrl.types import Array, Params

NEVER = -40.0  # the end-of-sequence logit's distance to the others where rows never end


def config_of(model: Model) -> Config:
    """The shape in mlrl's words."""
    return Config(vocabulary_size=model.vocabulary, width=model.width, layers=model.layers, heads=model.heads,
                  kv_heads=model.kv_heads, head_width=model.head_width, mlp_width=model.mlp_width,
                  rope_theta=model.theta, norm_eps=model.eps)  # fmt: skip


def made(model: Model, rows: Rows) -> Params:
    """Random parameters under which each token ends its row with probability `rows.ending`, in the mean of states.

    With u a unit vector, embeddings are normal(0.02) + sqrt(D) / 2 u, that of EOS + a u besides; a is found by
    bisection. Lengths are then nearly geometric of mean 1 / ending (cut at the most that is sampled).
    """
    transformer = Transformer(config_of(model))
    params = initialize(transformer, jax.random.key(0))
    shared = jax.random.normal(jax.random.key(1), (model.width,))
    shared = shared / jnp.linalg.norm(shared)
    table = params["embedding"]["embedding"] + 0.5 * model.width**0.5 * shared
    params = params | {"embedding": {"embedding": table}}
    states = _states(transformer, params, model, rows)
    logits, along = states @ table.T, states @ shared

    def ending(more: Array) -> Array:
        probabilities = jax.nn.softmax(logits.at[:, EOS].add(more * along))
        return jnp.mean(probabilities[:, EOS])

    if rows.ending:
        low, high = jnp.float32(-100.0), jnp.float32(100.0)
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if ending(middle) < rows.ending else (low, middle)
        more = (low + high) / 2
    else:
        more = NEVER / jnp.min(along)
    return params | {"embedding": {"embedding": table.at[EOS].add(more * shared)}}


def write(folder: str | pathlib.Path, model: Model, rows: Rows) -> None:
    """The parameters as a Hugging Face folder."""
    settings = {"eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": EOS, "max_position_embeddings": 4096}
    pretrained.write(folder, made(model, rows), config_of(model), more=settings)


def _states(transformer: Transformer, params: Params, model: Model, rows: Rows) -> Array:
    """States behind prompts that are followed by random tokens, [*,D]."""
    columns = rows.prompt_tokens + rows.new_tokens
    tokens = jax.random.randint(jax.random.key(2), (8, columns), FIRST, model.vocabulary)
    prompts = jnp.asarray(prompt_ids(rows, model, 0), jnp.int32)
    tokens = jnp.concatenate([prompts[jnp.arange(8) % rows.prompts], tokens[:, rows.prompt_tokens :]], axis=1)
    valid = jnp.ones_like(tokens, bool)
    hidden, _ = transformer.apply({"params": params}, tokens, row_positions(valid), causal_mask(valid))
    return hidden[:, rows.prompt_tokens - 1 :].reshape(-1, hidden.shape[-1])
