"""Advantage functions: batch -> (advantages [B,L], returns [B,L]), over the whole batch and before it is split.

The mathematics is in `mlrl.groups` (across rows) and `mlrl.returns` (along rows). A row's score is the sum of its
reward tokens. Advantages are 0 outside batch.mask; nothing is whitened unless the name says so. Returns are
undiscounted rewards-to-go wherever no value function defines them better.
"""

from mlrl.advantages.along import (
    gae,
    last_value,
    length_adaptive_gae,
    macro_gae,
    no_bootstrap,
    reinforce,
    reinforce_pp,
    step_level,
    turn_level,
)
from mlrl.advantages.attempts import attempt_scores, attempts
from mlrl.advantages.relative import (
    by_score,
    gdpo,
    grpo,
    maxrl,
    one_role,
    opo,
    own_role,
    reinforce_pp_baseline,
    remax,
    rloo,
    role_conditioned,
    role_relative,
    spo,
    task_relative,
)
from mlrl.advantages.rows import row_scores, whiten
from mlrl.advantages.targets import kto, trajectory_balance
from mlrl.advantages.terminations import (
    after_tokens,
    fixed_chunks,
    last_apart,
    random_chunks,
    rising_perplexity,
    single_tokens,
    spelled,
    turns,
    whole_sequence,
)
from mlrl.advantages.wrappers import kl_in_reward, whitened, without_outliers

__all__ = [
    "after_tokens",
    "attempt_scores",
    "attempts",
    "by_score",
    "fixed_chunks",
    "gae",
    "gdpo",
    "grpo",
    "kl_in_reward",
    "kto",
    "last_apart",
    "last_value",
    "length_adaptive_gae",
    "macro_gae",
    "maxrl",
    "one_role",
    "no_bootstrap",
    "opo",
    "own_role",
    "random_chunks",
    "reinforce",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "remax",
    "rising_perplexity",
    "rloo",
    "role_conditioned",
    "role_relative",
    "row_scores",
    "single_tokens",
    "spelled",
    "spo",
    "step_level",
    "task_relative",
    "trajectory_balance",
    "turn_level",
    "turns",
    "whiten",
    "whitened",
    "whole_sequence",
    "without_outliers",
]
