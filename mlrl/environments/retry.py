"""Several attempts at one prompt: the policy is asked again, always (SCoRe) or for as long as it is wrong (UFO).

What the policy is told between two attempts is the same text each time: that there may be an error, or that there was.
Attempts are judged in the graph, by the known answer of the prompt; a turn is an attempt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from mlrl.environments.nouns import Environment
from mlrl.types import Array, Refused, Task, require_whole

JudgeFn = Callable[[Any, Array, Array], Array]
"""(example of one prompt, tokens [A] int32, how many of them were written before the EOS) -> bool: are they right?"""


def exact_answer(example: Any, tokens: Array, written: Array) -> Array:
    """Whether the attempt is the example's answer token for token, as `graph.arithmetic` judges a single turn.

    Reads example["answer_tokens"] [T] and ["answer_valid"] [T], the answer without EOS, packed to the left.
    """
    answer, width = example["answer_tokens"], max(tokens.shape[0], example["answer_tokens"].shape[0])
    wide = lambda x: jnp.pad(x, (0, width - x.shape[0]))  # noqa: E731
    agree = (wide(answer) == wide(tokens)) | (jnp.arange(width) >= written)
    return (written == jnp.sum(example["answer_valid"])) & jnp.all(agree)


def always(*, task: Task, told: str = ":", attempts: int = 2, judge: JudgeFn = exact_answer) -> Environment:
    """Asks again whatever was said: attempt, "there may be an error: check and answer again", attempt.

    Each attempt is paid at its own last token: 1 if it is right and was ended by an EOS, else 0. So a reward of
    `graph.from_environment` holds r1 and r2 apart; `advantages.attempts` makes SCoRe's returns of them.

    Args:
      task: that of the experiment, whose vocabulary spells `told` and knows what an EOS is.
      told: what stands for the instruction; it must not say whether the attempt was right.
      attempts: K, also the rollout's max_turns; the episode is over after so many.
      judge: is one attempt right?
    Raises: Refused, if the vocabulary cannot spell `told`, or there are fewer than 2 attempts.
    Reference: Kumar et al. 2024, "Training Language Models to Self-Correct via Reinforcement Learning" (SCoRe).
    """
    words = _words("always", task, told, attempts)

    def reset(key: Array, example: Any) -> Any:
        return {"example": example, "turn": jnp.int32(0)}

    def step(state: Any, tokens: Array, length: Array) -> tuple[Any, Array, Array, Array, Array]:
        right = _judged(judge, task, state["example"], tokens, length)[0]
        turn = state["turn"] + 1
        return state | {"turn": turn}, words, jnp.int32(words.size), right.astype(jnp.float32), turn >= attempts

    return Environment(reset, step, words.size)


def until_right(
    *,
    task: Task,
    told: str = "*",
    attempts: int = 5,
    max_turn_tokens: int = 64,
    decay: float = 0.5,
    repetition: float = 0.5,
    malformed: float = 0.1,
    judge: JudgeFn = exact_answer,
) -> Environment:
    """Asks again for as long as the attempt is wrong: "wrong, think again" is all that is told.

    A right attempt number t (from 0) is paid decay^t, and ends the episode. Where an episode ends, right or not, it
    pays

        -repetition * (1 - E / W)

    for E distinct answers among the W well-formed ones; nothing if W is 0. Each attempt that is not well-formed
    (empty, or cut before an EOS) pays -malformed. Two answers are the same if their tokens are.

    Args:
      task, told, attempts, judge: as in `always`.
      max_turn_tokens: that of the rollout.
      decay: of the reward, per attempt.
      repetition: lambda, the penalty of saying the same again; 0.0 is off.
      malformed: 0.0 is off.
    Raises: Refused, as `always`, and if the rollout's max_turn_tokens is another.
    Reference: Liu et al. 2025, "A Simple 'Try Again' Can Elicit Multi-Turn LLM Reasoning" (UFO). Left out: answers
      that differ in spaces and capitals count as the same there, and the context also shows the reward and how many
      actions remain.
    """
    words = _words("until_right", task, told, attempts)
    require_whole("until_right", "max_turn_tokens", max_turn_tokens, 1)

    def reset(key: Array, example: Any) -> Any:
        said = jnp.full((attempts, max_turn_tokens), -1, jnp.int32)
        return {"example": example, "turn": jnp.int32(0), "said": said, "well": jnp.zeros((attempts,), bool)}

    def step(state: Any, tokens: Array, length: Array) -> tuple[Any, Array, Array, Array, Array]:
        if tokens.shape != (max_turn_tokens,):
            raise Refused(f"until_right.max_turn_tokens is {max_turn_tokens}, and that of the rollout "
                          f"{tokens.shape[0]}: make them the same")  # fmt: skip
        turn, (right, written, ended) = state["turn"], _judged(judge, task, state["example"], tokens, length)
        well_formed = ended & (written > 0)
        answer = jnp.where(jnp.arange(max_turn_tokens) < written, tokens, -1)
        said, well = state["said"].at[turn].set(answer), state["well"].at[turn].set(well_formed)
        done = right | (turn + 1 >= attempts)
        paid = jnp.where(right, decay ** turn.astype(jnp.float32), 0.0) - malformed * (1.0 - well_formed)
        paid -= jnp.where(done, repetition * _repeated(said, well), 0.0)
        state = state | {"turn": turn + 1, "said": said, "well": well}
        return state, words, jnp.int32(words.size), paid.astype(jnp.float32), done

    return Environment(reset, step, words.size)


def _words(name: str, task: Task, told: str, attempts: int) -> Array:
    require_whole(name, "attempts", attempts, 2)
    words = jnp.asarray(task.vocabulary.encode(told), jnp.int32)
    if not words.size:
        raise Refused(f"{name}.told is empty: the policy must be told something between two attempts")
    return words


def _judged(judge: JudgeFn, task: Task, example: Any, tokens: Array, length: Array) -> tuple[Array, Array, Array]:
    """(right, how many tokens were written before the EOS, whether there was one)."""
    last = tokens[jnp.maximum(length - 1, 0)]
    ended = (length > 0) & jnp.isin(last, jnp.asarray(task.vocabulary.eos_ids))
    written = length - ended
    return ended & judge(example, tokens, written), written, ended


def _repeated(said: Array, well: Array) -> Array:
    """1 - E / W: the share of well-formed answers [K,A] that an earlier one has said; 0 without any."""
    same = jnp.all(said[:, None] == said[None], axis=2) & well[None]
    seen_before = well & jnp.any(jnp.tril(same, -1), axis=1)
    return seen_before.sum() / jnp.maximum(well.sum(), 1)
