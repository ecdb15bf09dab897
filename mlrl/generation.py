"""Generation: prompts to completed rows, prefill and decode in one jittable function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mlrl.models.attention import Cache
from mlrl.models.transformer import Transformer, widen_caches
from mlrl.sampling import Sampling, draw_tokens, top_k_filter, top_p_filter
from mlrl.scoring import log_distribution, prefill
from mlrl.types import Array, Params, Prompts, Refused, Rollout, require_whole


def generate(
    model: Transformer,
    params: Params,
    prompts: Prompts,
    key: Array,
    *,
    max_completion_tokens: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    group_size: int = 1,
    sampling: Sampling = Sampling(),
    policy_version: Array | int = 0,
    grow_at: tuple[int, ...] = (),
) -> Rollout:
    """Samples `group_size` completions of every prompt.

    A prompt is prefilled once and its keys and values are shared by the group. Decoding is one `while_loop`
    over columns that stops when every row has emitted an EOS. The log-prob recorded is that of the sampled
    token under the distribution it was drawn from: temperature, then top-k, then top-p, renormalized.
    Masks come from the lengths recorded here, so the padding id may equal an EOS id.

    Args:
      prompts: [N,P], padded on the left.
      key: the randomness of row b at step t is fold_in(fold_in(key, b), t).
      max_completion_tokens: T, the columns reserved for completions.
      eos_ids: any of these ends a row; the EOS itself is an action.
      sampling: at temperature 0.0 (greedy) the recorded log-probs are those of temperature 1.
      grow_at: the caches are made for so many tokens of completions at first, and longer whenever they are full: for as
        many as the next number, and at last for T. Attention reads caches whole, so shorter ones are faster; each
        length is a program of its own, and growing copies. Ascending, numbers of T or more are left out. (): T at once.
    Returns: Rollout with B = N * group_size rows, the groups in order, and L = P + T columns.
    """
    require_whole("generate", "max_completion_tokens", max_completion_tokens, 1)
    grow_at = _below(grow_at, max_completion_tokens)
    n, width = prompts.tokens.shape
    rows, steps = jnp.arange(n * group_size), max_completion_tokens
    choose = chooser(model, params, key, sampling, eos_ids)
    last, caches = prefill(model, params, prompts)
    caches = widen_caches(caches, group_size, (*grow_at, steps)[0])
    last, prompt_valid = (jnp.repeat(x, group_size, axis=0) for x in (last, prompts.valid))
    wrote = decode(
        model, params, choose, last, caches, seen=jnp.pad(prompt_valid, ((0, 0), (0, steps))), column=width,
        lengths=jnp.sum(prompt_valid, axis=1, dtype=jnp.int32), rows=rows, steps=steps, pad_id=pad_id,
        grow_at=grow_at,
    )  # fmt: skip
    return as_rollout(prompts, wrote.tokens, wrote.log_probs, wrote.lengths, ended=wrote.ended,
                      policy_version=policy_version)  # fmt: skip


def _below(grow_at: Sequence[int], steps: int) -> tuple[int, ...]:
    if not isinstance(grow_at, tuple | list) or list(grow_at) != sorted(set(grow_at)):
        raise Refused(f"generate.grow_at must be ascending numbers of tokens, as (64, 256), got {grow_at!r}")
    for tokens in grow_at:
        require_whole("generate", "grow_at", tokens, 1)
    return tuple(tokens for tokens in grow_at if tokens < steps)


class Written(NamedTuple):
    """What rows wrote in one go.

    tokens, log_probs  [B,T] padding and 0 behind what was written
    lengths            [B] int32 how many tokens were, an EOS included
    ended              [B] bool whether the last of them is an EOS
    caches             with all that was written but each row's last token, which may be missing
    """

    tokens: Array
    log_probs: Array
    lengths: Array
    ended: Array
    caches: tuple[Cache, ...]


def decode(model: Transformer, params: Params, choose: Callable[..., tuple[Array, Array, Array]], hidden: Array,
           caches: tuple[Cache, ...], *, seen: Array, column: Array | int, lengths: Array, rows: Array, steps: int,
           pad_id: int, first_step: Array | int = 0, silent: Array | bool = False,
           grow_at: Sequence[int] = ()) -> Written:  # fmt: skip
    """Rows write until each has emitted an EOS or `steps` tokens: one `while_loop` over columns, or one for each length
    of the caches.

    Args:
      choose: from `chooser`.
      hidden: [B,D] the states in which the first tokens are chosen.
      caches: of M columns, those from `column` on are written.
      seen: [B,M] bool, the columns that rows look at besides what they write now.
      column: where the first token is written.
      lengths: [B] how many tokens each row has before; the next one's position.
      rows, first_step: which rows these are, and at which of their steps: what their randomness depends on.
      steps: T, the most that is written.
      silent: [B] bool, rows that write nothing.
      grow_at: the tokens at which the caches, made for the first of these numbers, become longer; see `generate`.
    """
    first = jnp.int32(first_step)
    silent = jnp.broadcast_to(silent, rows.shape)
    write = lambda buffer, x, t: lax.dynamic_update_slice(buffer, x[:, None], (0, t))  # noqa: E731
    token, log_prob, ended = choose(hidden, rows, first)
    token, done = jnp.where(silent, pad_id, token), silent | ended
    tokens = write(jnp.full((rows.size, steps), pad_id, jnp.int32), token, 0)
    log_probs = write(jnp.zeros((rows.size, steps), jnp.float32), jnp.where(silent, 0.0, log_prob), 0)

    def unfinished(until, carry):
        t, done = carry[0], carry[-1]
        return (t < until) & ~jnp.all(done)

    def step(seen, carry):
        t, caches, token, tokens, log_probs, written, done = carry
        columns = jnp.arange(seen.shape[1])
        looked_at = seen | ((columns >= column) & (columns < column + t))
        args = (token[:, None], (lengths + t - 1)[:, None], looked_at[:, None], caches, column + t - 1)
        hidden, caches = model.apply({"params": params}, *args)
        token, log_prob, ended = choose(hidden[:, 0], rows, first + t)
        token = jnp.where(done, pad_id, token)
        tokens = write(tokens, token, t)
        log_probs = write(log_probs, jnp.where(done, 0.0, log_prob), t)
        return t + 1, caches, token, tokens, log_probs, written + ~done, done | ended

    carry = (jnp.int32(1), caches, token, tokens, log_probs, (~silent).astype(jnp.int32), done)
    for until, following in zip((*grow_at, steps), (*grow_at[1:], steps, steps)):
        look = seen[:, : seen.shape[1] - (steps - until)]
        carry = lax.while_loop(functools.partial(unfinished, until), functools.partial(step, look), carry)
        if following > until:  # by now t is `until`, or every row is done; said so, the turns that are left are known
            carry = (jnp.int32(until), widen_caches(carry[1], 1, following - until), *carry[2:])
    _, caches, _, tokens, log_probs, written, done = carry
    return Written(tokens, log_probs, written, done & ~silent, caches)


def chooser(model: Transformer, params: Params, key: Array, sampling: Sampling,
            eos_ids: tuple[int, ...]) -> Callable[..., tuple[Array, Array, Array]]:  # fmt: skip
    """choose(hidden [B,D], rows [B], t) -> the token at step t of each row, its log-prob, whether it ends the row.

    All three are [B]; t is a number, or [B] where rows are at different steps. The randomness of row b at its step t is
    fold_in(fold_in(key, b), t), wherever and beside whatever the row is decoded.
    """
    eos = jnp.asarray(eos_ids, jnp.int32)

    def choose(hidden: Array, rows: Array, t: Array | int) -> tuple[Array, Array, Array]:
        logits = model.apply({"params": params}, hidden, method=Transformer.logits)
        log_p = log_distribution(logits, sampling.temperature)
        log_p = top_p_filter(top_k_filter(log_p, sampling.top_k), sampling.top_p)
        draw = jax.vmap(lambda row, t: jax.random.fold_in(jax.random.fold_in(key, row), t))
        keys = draw(rows, jnp.broadcast_to(t, rows.shape))
        token = draw_tokens(keys, log_p, greedy=sampling.greedy)
        return token, jnp.take_along_axis(log_p, token[:, None], axis=1)[:, 0], jnp.isin(token, eos)

    return choose


def as_rollout(prompts: Prompts, tokens: Array, log_probs: Array, lengths: Array, *, ended: Array,
               policy_version: Array | int) -> Rollout:  # fmt: skip
    """Prompts [N,P] and their completions as the rows of a single turn.

    Args:
      tokens, log_probs: [B,T], the groups in order; B is a multiple of N.
      lengths: [B] how many tokens of each row are actions.
      ended: [B] whether the last of them is an EOS.
    """
    (n, width), (rows, steps) = prompts.tokens.shape, tokens.shape
    each = lambda x: jnp.repeat(x, rows // n, axis=0)  # noqa: E731
    action = jnp.arange(steps)[None] < lengths[:, None]
    no_action = jnp.zeros((rows, width), bool)
    return Rollout(
        tokens=jnp.concatenate([each(prompts.tokens), tokens], axis=1),
        valid=jnp.concatenate([each(prompts.valid), action], axis=1),
        action_mask=jnp.concatenate([no_action, action], axis=1),
        behavior_log_probs=jnp.concatenate([no_action.astype(jnp.float32), log_probs], axis=1),
        turn=jnp.zeros((rows, width + steps), jnp.int32),
        role=jnp.zeros((rows,), jnp.int32),
        group=each(jnp.arange(n, dtype=jnp.int32)),
        truncated=~ended,
        policy_version=jnp.full((rows,), policy_version, jnp.int32),
    )
