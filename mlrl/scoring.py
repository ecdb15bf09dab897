"""Scoring of given tokens: log-probs, entropies and values of rows that already exist."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mlrl import home_rows
from mlrl.models import head
from mlrl.models.attention import Cache
from mlrl.models.transformer import (
    Transformer,
    causal_mask,
    empty_caches,
    in_own_dtype,
    row_positions,
    widen_caches,
)
from mlrl.types import Array, Distribution, Params, Prompts, Rollout, Scores


def log_distribution(logits: Array, temperature: float | Array) -> Array:
    """log softmax(logits / temperature) in fp32, the one definition that sampling and learning share.

    At temperature 0 (greedy) the log-probs are those of temperature 1: the argmax is a choice, not a distribution.
    """
    logits = logits.astype(jnp.float32)
    if isinstance(temperature, Array) or temperature not in (0.0, 1.0):
        logits = logits / temperature
    return jax.nn.log_softmax(logits, axis=-1)


def score(model: Transformer, params: Params, rollout: Rollout, *, temperature: float = 1.0,
          first_column: int = 1, chunk_columns: int = 0, chunk_vocabulary: int = 0, with_logits: bool = False,
          top_tokens: int = 0) -> Scores:  # fmt: skip
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
      chunk_vocabulary: go over the vocabulary by so many tokens at a time, so that memory is [B, L, chunk], whatever
        V; recomputed in the backward pass too. 0: all at once. See mlrl.models.head.
      with_logits: also gives logits / temperature, [B,L,V], for losses over whole distributions.
      top_tokens: also gives the so many likeliest tokens and their log-probs; without gradients. 0: none.
    Returns: Scores, each [B,L] float32, 0 where not valid.
    """
    first_column = max(1, first_column)
    seen = (rollout.tokens, row_positions(rollout.valid), causal_mask(rollout.valid))
    # The states in which the scored tokens were chosen.
    states = lambda trunk: model.apply({"params": params}, *seen, method=trunk)[0][:, first_column - 1 : -1]  # noqa: E731
    return scores_of_states(
        model, params, rollout, states, temperature=temperature, first_column=first_column,
        chunk_columns=chunk_columns, chunk_vocabulary=chunk_vocabulary, with_logits=with_logits, top_tokens=top_tokens,
    )  # fmt: skip


class Prefix(NamedTuple):
    """Prompts that a trunk has read, for the rows that begin with them.

    last    [N,D] the hidden state of the last prompt column
    caches  the prompts' keys and values; see transformer.empty_caches
    """

    last: Array
    caches: tuple[Cache, ...]


def prefill(model: Transformer, params: Params, prompts: Prompts, trunk: Callable = Transformer.__call__) -> Prefix:
    """Reads every prompt once. Differentiable in `params`.

    Args:
      prompts: [N,P].
      trunk: Transformer.__call__ for the policy's, Transformer.critic_hidden for the critic's.
    """
    depth = model.config.critic_layers if trunk is Transformer.critic_hidden else model.config.layers
    caches = empty_caches(dataclasses.replace(model.config, layers=depth), *prompts.tokens.shape)
    seen = (prompts.tokens, row_positions(prompts.valid), causal_mask(prompts.valid), caches)
    hidden, caches = model.apply({"params": params}, *seen, method=trunk)
    return Prefix(hidden[:, -1], caches)


class Forward(NamedTuple):
    """The learner's forward pass in two parts: what is done once for the prompts, and what for each of their rows.

    prepare   (model, params, prompts [N,P]) -> further arguments of `score`; differentiated once, however many
              micro-batches use them
    score     (model, params, prompts, rollout, *prepared, **settings) -> Scores, settings as those of the function
    readable  (prompts, rollout) -> the rows that can be read this way, [B] bool; what others are scored means nothing
    """

    prepare: Callable[..., tuple]
    score: Callable[..., Scores]
    readable: Callable[[Prompts, Rollout], Array]


def whole_rows() -> Forward:
    """Every row is read whole, its prompt too: for rollouts whose rows do not begin with their prompt's columns."""

    def score_(model: Transformer, params: Params, prompts: Prompts, rollout: Rollout, **settings: Any) -> Scores:
        return score(model, params, rollout, first_column=prompts.tokens.shape[1], **settings)

    every_row = lambda prompts, rollout: jnp.ones(rollout.group.shape, bool)  # noqa: E731
    return Forward(lambda model, params, prompts: (), score_, every_row)


def shared_prompts() -> Forward:
    """Every prompt is read once for all of its rows, which attend to its keys and values.

    Equal to `whole_rows` in value and gradient (to rounding): gradients of a group's rows add up in the prompt's keys
    and values and go through the prompt once. G rows of P + T columns cost P + G * (T - 1) columns of the trunk,
    not G * (P + T). With M minibatches a step's prompts are read M times, once for each.

    Rows must begin with the columns of prompt `rollout.group`; the others are not readable.
    """

    def prepare(model: Transformer, params: Params, prompts: Prompts) -> tuple[dict[str, Prefix]]:
        trunks = (Transformer.__call__, Transformer.critic_hidden) if model.config.critic_layers else (
            Transformer.__call__,)  # fmt: skip
        model = in_own_dtype(model)
        return ({trunk.__name__: prefill(model, params, prompts, trunk) for trunk in trunks},)

    def score_(model: Transformer, params: Params, prompts: Prompts, rollout: Rollout, prefixes: dict[str, Prefix],
               **settings: Any) -> Scores:  # fmt: skip
        width, mine = prompts.tokens.shape[1], rollout.group
        # The last token is chosen, and nothing after it: it need not be read.
        tokens, columns = rollout.tokens[:, width:-1], rollout.tokens.shape[1] - width - 1
        positions = row_positions(rollout.valid)[:, width:-1]
        mask = causal_mask(rollout.valid[:, :-1], first_column=width)

        def states(trunk: Callable) -> Array:
            # Rows of hidden states are their first axis, those of caches the fourth from the end.
            prefix = home_rows.take(prefixes[trunk.__name__], mine, lambda x: max(x.ndim - 4, 0))
            seen = (tokens, positions, mask, widen_caches(prefix.caches, 1, columns), width)
            before = prefix.last[:, None]
            if not columns:
                return before
            return jnp.concatenate([before, model.apply({"params": params}, *seen, method=trunk)[0]], axis=1)

        return scores_of_states(model, params, rollout, states, first_column=width, **settings)

    return Forward(prepare, score_, begin_with_prompts)


def begin_with_prompts(prompts: Prompts, rollout: Rollout) -> Array:
    """Which rows begin with the columns of prompt `rollout.group`: [B] bool."""
    width, mine = prompts.tokens.shape[1], rollout.group
    valid = rollout.valid[:, :width]
    same = (rollout.tokens[:, :width] == prompts.tokens[mine]) | ~valid
    return jnp.all(same & (valid == prompts.valid[mine]), axis=1)


def scores_of_states(
    model: Transformer, params: Params, rollout: Rollout, states: Callable[[Callable], Array], *, first_column: int,
    temperature: float = 1.0, chunk_columns: int = 0, chunk_vocabulary: int = 0, with_logits: bool = False,
    top_tokens: int = 0,
) -> Scores:  # fmt: skip
    """Scores of the columns from `first_column`, of a trunk's states before each of them: states(trunk) [B,*,D]."""
    apply = lambda *args, **kwargs: model.apply({"params": params}, *args, **kwargs)  # noqa: E731
    before, tokens = states(Transformer.__call__), rollout.tokens[:, first_column:]
    how = head.Head(temperature or 1.0, model.config.logits_cap, chunk_vocabulary)

    def by_head(before_chunk: Array, token_chunk: Array) -> tuple[Array, Array]:
        if chunk_vocabulary:
            return head.chosen(before_chunk, apply(method=Transformer.head_kernel), token_chunk, how)
        log_p = log_distribution(apply(before_chunk, method=Transformer.logits), temperature)
        chosen = jnp.take_along_axis(log_p, token_chunk[..., None], axis=-1)[..., 0]
        return chosen, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)

    log_probs, entropy = _in_chunks(by_head, before, tokens, chunk_columns)
    values = jnp.zeros_like(log_probs)
    if model.config.critic_layers:
        values = apply(states(Transformer.critic_hidden), method=Transformer.values)
    elif model.config.value_head:
        values = apply(before, method=Transformer.values)
    scored = rollout.valid[:, first_column:]
    widen = lambda x: jnp.pad(jnp.where(scored, x, 0.0), ((0, 0), (first_column, 0)))  # noqa: E731
    logits = ()
    if with_logits:
        whole = apply(before, method=Transformer.logits) / (temperature or 1.0)
        logits = jnp.pad(whole, ((0, 0), (first_column, 0), (0, 0)))
    top = ()
    if top_tokens:
        kernel = jax.lax.stop_gradient(apply(method=Transformer.head_kernel))
        ids, top_log_probs = head.likeliest(jax.lax.stop_gradient(before), kernel, how, top_tokens)
        wide = lambda x: jnp.pad(x, ((0, 0), (first_column, 0), (0, 0)))  # noqa: E731
        top = Distribution(wide(ids), wide(top_log_probs))
    return Scores(log_probs=widen(log_probs), entropy=widen(entropy), values=widen(values), logits=logits, top=top)


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


def recorded(old_log_probs: Callable[..., Array]) -> bool:
    """Whether a choice of old log-probs is `sampler_log_probs`, also with its arguments bound: no model is asked."""
    return inspect.unwrap(old_log_probs) is sampler_log_probs


def recomputed_log_probs(rollout: Rollout, score_fn: Callable[[Rollout], Scores]) -> Array:
    """Old log-probs recomputed by the weights that sampled: bitwise the learner's own, at the cost of a forward."""
    return jax.lax.stop_gradient(score_fn(rollout).log_probs)
