"""A bare whole GRPO step, the measure of the online loop: decode, reward, advantage, update, in one jit."""

import jax.numpy as jnp

from benchmarks import decode_baseline, update_baseline


def step(params, opt_state, prompts, key, *, group, new_tokens, eos, optimizer, micro_batch_rows):
    """One step from prompts [N,P] int32: every row is padded to `new_tokens`, and has its prompt read for itself.

    Returns (params, opt_state, loss, lengths [N * group]).
    """
    rows = jnp.repeat(prompts, group, axis=0)
    completions = decode_baseline.decode(params, rows, key, new_tokens=new_tokens, eos=eos)
    before = jnp.cumsum(completions == eos, axis=1) - (completions == eos)
    mask = (before == 0).astype(jnp.float32)
    lengths = mask.sum(axis=1)
    rewards = ((completions % 2 == 0) * mask).sum(axis=1) / lengths
    grouped = rewards.reshape(-1, group)
    advantages = (grouped - grouped.mean(1, keepdims=True)) / (grouped.std(1, keepdims=True) + 1e-4)
    tokens = jnp.concatenate([rows, completions], axis=1)
    params, opt_state, loss = update_baseline.step(
        params, opt_state, tokens, None, advantages.reshape(-1, 1) * mask, optimizer=optimizer,
        prompt_tokens=prompts.shape[1], micro_batch_rows=micro_batch_rows, all_tokens=mask.sum(),
    )  # fmt: skip
    return params, opt_state, loss, lengths
