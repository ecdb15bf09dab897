"""Generation: prompts to completed rows, prefill and decode in one jittable function."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from mlrl.models.transformer import Transformer, widen_caches
from mlrl.sampling import Sampling, draw_tokens, top_k_filter, top_p_filter
from mlrl.scoring import log_distribution, prefill
from mlrl.types import Array, Params, Prompts, Rollout, require_whole


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
    Returns: Rollout with B = N * group_size rows, the groups in order, and L = P + T columns.
    """
    require_whole("generate", "max_completion_tokens", max_completion_tokens, 1)
    n, width = prompts.tokens.shape
    rows, steps = n * group_size, max_completion_tokens
    greedy = sampling.temperature == 0.0
    each = lambda x: jnp.repeat(x, group_size, axis=0)  # noqa: E731
    apply = lambda *args, **kwargs: model.apply({"params": params}, *args, **kwargs)  # noqa: E731
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))
    eos = jnp.asarray(eos_ids, jnp.int32)

    def choose(hidden: Array, t: Array | int) -> tuple[Array, Array, Array]:
        """Hidden states [B,D] -> token, its log-prob, whether it ends the row; each [B]."""
        log_p = log_distribution(apply(hidden, method=Transformer.logits), sampling.temperature)
        log_p = top_p_filter(top_k_filter(log_p, sampling.top_k), sampling.top_p)
        token = draw_tokens(jax.vmap(lambda k: jax.random.fold_in(k, t))(row_keys), log_p, greedy=greedy)
        return token, jnp.take_along_axis(log_p, token[:, None], axis=1)[:, 0], jnp.isin(token, eos)

    last, caches = prefill(model, params, prompts)
    caches = widen_caches(caches, group_size, steps)
    prompt_valid, prompt_lengths = each(prompts.valid), each(jnp.sum(prompts.valid, axis=1, dtype=jnp.int32))
    token, log_prob, done = choose(each(last), 0)
    write = lambda buffer, column, t: lax.dynamic_update_slice(buffer, column[:, None], (0, t))  # noqa: E731
    tokens = write(jnp.full((rows, steps), pad_id, jnp.int32), token, 0)
    log_probs = write(jnp.zeros((rows, steps), jnp.float32), log_prob, 0)

    def unfinished(carry):
        t, done = carry[0], carry[-1]
        return (t < steps) & ~jnp.all(done)

    def decode(carry):
        t, caches, token, tokens, log_probs, lengths, done = carry
        seen = jnp.concatenate([prompt_valid, jnp.broadcast_to(jnp.arange(steps) < t, (rows, steps))], axis=1)
        positions = (prompt_lengths + t - 1)[:, None]
        hidden, caches = apply(token[:, None], positions, seen[:, None], caches, width + t - 1)
        token, log_prob, ended = choose(hidden[:, 0], t)
        token = jnp.where(done, pad_id, token)
        tokens = write(tokens, token, t)
        log_probs = write(log_probs, jnp.where(done, 0.0, log_prob), t)
        return t + 1, caches, token, tokens, log_probs, lengths + ~done, done | ended

    lengths = jnp.ones((rows,), jnp.int32)
    start = (jnp.int32(1), caches, token, tokens, log_probs, lengths, done)
    _, _, _, tokens, log_probs, lengths, done = lax.while_loop(unfinished, decode, start)

    action = jnp.arange(steps)[None] < lengths[:, None]
    no_action = jnp.zeros((rows, width), bool)
    return Rollout(
        tokens=jnp.concatenate([each(prompts.tokens), tokens], axis=1),
        valid=jnp.concatenate([prompt_valid, action], axis=1),
        action_mask=jnp.concatenate([no_action, action], axis=1),
        behavior_log_probs=jnp.concatenate([no_action.astype(jnp.float32), log_probs], axis=1),
        turn=jnp.zeros((rows, width + steps), jnp.int32),
        role=jnp.zeros((rows,), jnp.int32),
        group=jnp.repeat(jnp.arange(n, dtype=jnp.int32), group_size),
        truncated=~done,
        policy_version=jnp.full((rows,), policy_version, jnp.int32),
    )
