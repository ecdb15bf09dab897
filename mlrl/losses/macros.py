"""Losses that know macro actions: a ratio for each chunk, and a value only where a chunk begins.

The authors of MA-RLHF use neither: their ratios are of tokens (`policy.ppo_clip`), and the value of every token of a
chunk learns the chunk's return (`values.clipped_value_loss`). `termination` must be that of the advantages
(`advantages.macro_gae`). Weights stay those of the reduction: a chunk weighs what its tokens weigh.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from mlrl import importance
from mlrl import returns as along
from mlrl.advantages.terminations import Termination, fixed_chunks
from mlrl.losses.policy import ppo_clip
from mlrl.losses.values import clipped_value_loss
from mlrl.types import Array, Batch, LossFn, Metrics, Scores


def ratio_of_chunks(
    scores: Scores,
    batch: Batch,
    *,
    loss_fn: LossFn = ppo_clip,
    termination: Termination = fixed_chunks,
    ratio_of: Callable[..., Array] = along.chunk_sum,
) -> tuple[Array, Metrics]:
    """A policy loss with one ratio per macro action k: log r_k = ratio_of(log-ratios of its tokens).

    With chunk_sum r_k is the product of the tokens' ratios, pi(chunk) / pi_old(chunk), whose spread grows with the
    chunk; with chunk_mean it is their geometric mean, and with whole_sequence too it is `policy.gspo`. With
    single_tokens it is loss_fn itself.

    Args:
        scores: of the current policy.
        batch: reads old_log_probs and what loss_fn and termination read.
        loss_fn: policy.ppo_clip, policy.dual_clip or another that reads log-probs only in ratios.
        termination: batch -> chunk numbers.
        ratio_of: returns.chunk_sum or returns.chunk_mean.

    Returns:
        (loss, metrics) of loss_fn; kl/old is then of chunks.
    """
    chunk = termination(batch)
    of_chunk = ratio_of(importance.log_ratio(scores.log_probs, batch.old_log_probs, batch.mask), batch.mask, chunk)
    log_ratio = jnp.take_along_axis(of_chunk, chunk, axis=1)
    return loss_fn(scores.replace(log_probs=batch.old_log_probs + log_ratio), batch)


def at_beginnings(
    scores: Scores,
    batch: Batch,
    *,
    loss_fn: LossFn = clipped_value_loss,
    termination: Termination = fixed_chunks,
) -> tuple[Array, Metrics]:
    """A value loss at the first action of each macro action, with the weight of all the chunk's tokens.

    For advantages whose `value_of` is `returns.chunk_first`: the value of the state in which the chunk is decided.

    Args:
        scores: reads what loss_fn reads.
        batch: same, and what termination reads.
        loss_fn: values.clipped_value_loss or values.value_loss.
        termination: batch -> chunk numbers.

    Returns:
        (loss, metrics) of loss_fn; its means over tokens are over first tokens, each counted as often as its chunk
        has tokens.
    """
    chunk = termination(batch)
    first = along.begins_of(batch.mask, chunk)
    moved = lambda w: jnp.where(  # noqa: E731
        first, jnp.take_along_axis(along.chunk_sum(w, batch.mask, chunk), chunk, axis=1), 0.0
    )
    return loss_fn(scores, batch.replace(weights=moved(batch.weights), token_weights=moved(batch.token_weights)))
