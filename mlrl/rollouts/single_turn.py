"""Single-turn rollouts: a prompt, a group of completions."""

from __future__ import annotations

from collections.abc import Callable

from mlrl.generation import generate
from mlrl.models.transformer import Transformer
from mlrl.sampling import Sampling
from mlrl.types import Array, Params, Prompts, Rollout, Vocabulary


def single_turn(
    model: Transformer,
    params: Params,
    prompts: Prompts,
    key: Array,
    *,
    vocabulary: Vocabulary,
    sampling: Sampling,
    group_size: int,
    policy_version: Array | int = 0,
    max_completion_tokens: int = 64,
    sampler: Callable[..., Rollout] = generate,
) -> Rollout:
    """`group_size` completions of every prompt, each up to the first EOS or `max_completion_tokens`.

    Args:
      prompts: [N,P].
      vocabulary, sampling, group_size, policy_version: given by the loop.
      sampler: how rows are decoded: all at once, or in fewer slots that are refilled (`refilled.refilled`).
    Returns: Rollout with B = N * group_size rows and L = P + max_completion_tokens columns.
    """
    return sampler(
        model, params, prompts, key,
        max_completion_tokens=max_completion_tokens, eos_ids=tuple(vocabulary.eos_ids), pad_id=vocabulary.pad_id,
        group_size=group_size, sampling=sampling, policy_version=policy_version,
    )  # fmt: skip
