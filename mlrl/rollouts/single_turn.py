"""Single-turn rollouts: a prompt, a group of completions."""

from __future__ import annotations

from mlrl.generation import generate
from mlrl.models.transformer import Transformer
from mlrl.types import Array, Params, Prompts, Rollout, Vocabulary


def single_turn(
    model: Transformer,
    params: Params,
    prompts: Prompts,
    key: Array,
    *,
    vocabulary: Vocabulary,
    temperature: float = 1.0,
    policy_version: Array | int = 0,
    group_size: int = 8,
    max_completion_tokens: int = 64,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Rollout:
    """`group_size` completions of every prompt, each up to the first EOS or `max_completion_tokens`.

    Args:
      prompts: [N,P].
      temperature: given by the loop, which uses the same one when it scores.
      top_k, top_p: filters; a training run that reads the sampler's log-probs refuses them, since the learner's
        distribution is not filtered.
    Returns: Rollout with B = N * group_size rows and L = P + max_completion_tokens columns.
    """
    return generate(
        model, params, prompts, key,
        max_completion_tokens=max_completion_tokens, eos_ids=vocabulary.eos_ids, pad_id=vocabulary.pad_id,
        group_size=group_size, temperature=temperature, top_k=top_k, top_p=top_p, policy_version=policy_version,
    )  # fmt: skip
