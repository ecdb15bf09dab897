"""A bare GRPO step, the measure of mlrl.update: loss, gradient and Adam on given advantages, and nothing else."""

import jax
import jax.numpy as jnp
import optax

from benchmarks.decode_baseline import layer, norm


def log_probs(params, tokens, *, prompt_tokens):
    """Log-probs of the completion's tokens: tokens [B,L] -> [B, L - prompt_tokens]."""
    length = tokens.shape[1]
    x = params["embedding"][tokens]
    for w in params["layers"]:
        x, _ = layer(w, x, jnp.arange(length), jnp.tril(jnp.ones((length, length), bool)), None, 0)
    logits = norm(x[:, prompt_tokens - 1 : -1], params["norm"]) @ params["embedding"].T
    chosen = jnp.take_along_axis(logits, tokens[:, prompt_tokens:, None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def loss(params, tokens, old, advantages, *, prompt_tokens, all_tokens):
    """PPO's clipped surrogate: a sum over the rows given, divided by the tokens of the whole minibatch.

    Without old log-probs, the policy is its own: the ratio is 1, and has a gradient.
    """
    new = log_probs(params, tokens, prompt_tokens=prompt_tokens)
    ratio = jnp.exp(new - (jax.lax.stop_gradient(new) if old is None else old))
    surrogate = jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.2) * advantages)
    return -jnp.sum(surrogate) / all_tokens


def step(params, opt_state, tokens, old, advantages, *, optimizer, prompt_tokens, micro_batch_rows=0,
         all_tokens=None):
    """One optimizer step; gradients are accumulated over micro-batches by a scan (0 rows: one batch).

    tokens [B,L] int32; old (or None), advantages [B, L - prompt_tokens], 0 where there is no token; all_tokens: how
    many there are, None if all columns are. Returns (params, opt_state, loss).
    """
    count = advantages.size if all_tokens is None else all_tokens
    grad = jax.value_and_grad(lambda p, *rows: loss(p, *rows, prompt_tokens=prompt_tokens, all_tokens=count))
    rows = (tokens, old, advantages)
    if micro_batch_rows:
        pieces = jax.tree.map(lambda x: x.reshape(-1, micro_batch_rows, x.shape[1]), rows)
        zeros = (0.0, jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(lambda sum_, piece: (jax.tree.map(jnp.add, sum_, grad(params, *piece)), None),
                                zeros, pieces)  # fmt: skip
    else:
        total = grad(params, *rows)
    value, grads = total
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value
