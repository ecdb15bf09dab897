"""Scoring of given tokens: log-probs, entropies and values of rows that already exist."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mlrl.models.transformer import Transformer, causal_mask, row_positions
from mlrl.types import Array, Params, Rollout, Scores


def log_distribution(logits: Array, temperature: float) -> Array:
    """log softmax(logits / temperature) in fp32, the one definition that sampling and learning share.

    At temperature 0 (greedy) the log-probs are those of temperature 1: the argmax is a choice, not a distribution.
    """
    logits = logits.astype(jnp.float32)
    if temperature not in (0.0, 1.0):
        logits = logits / temperature
    return jax.nn.log_softmax(logits, axis=-1)


def score(model: Transformer, params: Params, rollout: Rollout, *, temperature: float = 1.0,
          first_column: int = 1, chunk_columns: int = 0, with_logits: bool = False) -> Scores:  # fmt: skip
    """Log-probs, entropies and values of a rollout's tokens under `params`.

    log_probs[b, t] = log softmax(logits[b, t-1] / temperature)[tokens[b, t]]

    The graph is the sampler's: same kernels, same fp32 log-softmax, same temperature; so a fresh rollout's
    behavior_log_probs are reproduced (to 1e-5 in fp32).

    Values come from the trunk under the value head, the critic's if there is one; they too are of the state before
    the token. Under jit a critic costs nothing where nobody reads values.

    Args:
      rollout: rows [B,L]; only tokens and valid are read.
      temperature: divides the logits, not the values; must be the sampler's.
      first_column: columns before it are not scored (0 in every output): the width of the prompt saves its
        share of the output head. At least 1, since the first token has nothing to condition on.
      chunk_columns: score the head in chunks of so many columns, recomputing them in the backward pass, so
        that memory is [B, chunk, V] and not [B, L, V]; 0: all at once.
      with_logits: also gives logits / temperature, [B,L,V], for losses over whole distributions.
    Returns: Scores, each [B,L] float32, 0 where not valid.
    """
    rollout_length = rollout.tokens.shape[1]
    first_column = max(1, first_column)
    apply = lambda *args, **kwargs: model.apply({"params": params}, *args, **kwargs)  # noqa: E731
    seen = (rollout.tokens, row_positions(rollout.valid), causal_mask(rollout.valid))
    in_which_chosen = lambda hidden: hidden[:, first_column - 1 : -1]  # noqa: E731  the states before scored tokens
    before = in_which_chosen(apply(*seen)[0])
    tokens = rollout.tokens[:, first_column:]

    def head(before_chunk: Array, token_chunk: Array) -> tuple[Array, Array]:
        log_p = log_distribution(apply(before_chunk, method=Transformer.logits), temperature)
        chosen = jnp.take_along_axis(log_p, token_chunk[..., None], axis=-1)[..., 0]
        return chosen, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)

    log_probs, entropy = _in_chunks(head, before, tokens, chunk_columns)
    values = jnp.zeros_like(log_probs)
    if model.config.critic_layers:
        before_by_critic = in_which_chosen(apply(*seen, method=Transformer.critic_hidden))
        values = apply(before_by_critic, method=Transformer.values)
    elif model.config.value_head:
        values = apply(before, method=Transformer.values)
    scored = rollout.valid[:, first_column:]
    widen = lambda x: jnp.pad(jnp.where(scored, x, 0.0), ((0, 0), (rollout_length - x.shape[1], 0)))  # noqa: E731
    logits = ()
    if with_logits:
        whole = apply(before, method=Transformer.logits) / (temperature or 1.0)
        logits = jnp.pad(whole, ((0, 0), (rollout_length - whole.shape[1], 0), (0, 0)))
    return Scores(log_probs=widen(log_probs), entropy=widen(entropy), values=widen(values), logits=logits)


def _in_chunks(head: Callable, before: Array, tokens: Array, chunk_columns: int) -> tuple[Array, Array]:
    """Applies `head` to chunks of columns, one after the other, keeping none of the [B, chunk, V] arrays."""
    columns = tokens.shape[1]
    if not 0 < chunk_columns < columns:
        return head(before, tokens)
    chunks = -(-columns // chunk_columns)
    extra = chunks * chunk_columns - columns
    before = jnp.pad(before, ((0, 0), (0, extra), (0, 0)))
    tokens = jnp.pad(tokens, ((0, 0), (0, extra)))
    split = lambda x: jnp.moveaxis(x.reshape(x.shape[0], chunks, chunk_columns, *x.shape[2:]), 1, 0)  # noqa: E731
    outputs = jax.lax.map(lambda xs: jax.checkpoint(head)(*xs), (split(before), split(tokens)))
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :columns]  # noqa: E731
    return join(outputs[0]), join(outputs[1])


def sampler_log_probs(rollout: Rollout, score_fn: Callable[[Rollout], Scores]) -> Array:
    """Old log-probs as the sampler recorded them: nothing is recomputed. [B,L]."""
    del score_fn
    return rollout.behavior_log_probs


def recomputed_log_probs(rollout: Rollout, score_fn: Callable[[Rollout], Scores]) -> Array:
    """Old log-probs recomputed by the weights that sampled: bitwise the learner's own, at the cost of a forward."""
    return jax.lax.stop_gradient(score_fn(rollout).log_probs)
