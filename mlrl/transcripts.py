"""Transcripts of two attempts that nobody sampled, made of a task's demonstrations: where self-correction starts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlrl import prompts as prompts_lib
from mlrl.batches import unannotated
from mlrl.tasks import symbols
from mlrl.tasks.pairs import one_digit_changed
from mlrl.types import Array, Batch, Prompts, Refused, Rollout, Task


def two_attempts(
    task: Task,
    key: Array,
    step: Array | int,
    rows: int,
    weights: Array,
    *,
    told: str = ":",
    first_right: float = 0.5,
    copied: float = 0.5,
    mended: float = 0.2,
    learn_first: bool = True,
) -> Batch:
    """Rows of prompt, first attempt, what is told, second attempt: for supervised learning, as Experiment.rows_fn.

    The first attempt is the demonstration, or the demonstration with one digit changed. The second is the first again,
    or the demonstration, or a noisy edit: the first with one digit changed, right or wrong alike. A wrong first attempt
    is read, and not learned. So a model of these rows edits without need, and mends hardly a wrong answer. With
    first_right=0.0, copied=0.0, mended=1.0 and learn_first=False the rows are pairs of a wrong and the right answer, of
    which the second is learned (Pair-SFT).

    Prompts are drawn as by `stored.demonstrations`, everything else from the key folded with the step.

    Args:
      task: in the graph; answers with digits, of which every other number is wrong, as of puzzles.arithmetic.
      key, step, rows, weights: as of `prompts.draw`.
      told: what is read between the attempts; that of the environment, as `environments.retry.always`.
      first_right: the share of first attempts that are right.
      copied: the share of second attempts that repeat the first.
      mended: the share of second attempts that are the right answer, whatever the first was; the rest are edits.
      learn_first: False leaves the tokens of right first attempts out of the mask too.
    Returns: Batch whose rows are packed as those of `rollouts.multi_turn`: the mask has holes where things are told.
    Raises: Refused, if shares are none, or the task is on the host.
    """
    shares = {"first_right": first_right, "copied": copied, "mended": mended, "copied + mended": copied + mended}
    for name, share in shares.items():
        if not 0.0 <= share <= 1.0 + 1e-9:
            raise Refused(f"two_attempts: {name} must lie in [0, 1], got {share}")
    if not task.in_graph:
        raise Refused(f"two_attempts needs a task in the graph, such as puzzles.arithmetic, got {task.name}")
    source, index = prompts_lib.choose(task, key, step, rows, weights)
    prompts, (right, valid) = task.at(source, index), task.targets(source, index)
    key = jax.random.fold_in(jax.random.fold_in(key, 0x74776F61), step)
    ids = jnp.asarray(symbols.token_ids(task.vocabulary, "0123456789"))[:10]
    keys = jax.random.split(key, (4, rows))
    edited = lambda which, tokens: one_digit_changed(keys[which], tokens, valid, ids)[0]  # noqa: E731
    uniform = jax.vmap(jax.random.uniform)
    is_right = uniform(keys[0])[:, None] < first_right
    first = jnp.where(is_right, right, edited(1, right))
    kind = uniform(keys[2])[:, None]
    second = jnp.where(kind < copied, first, jnp.where(kind < copied + mended, right, edited(3, first)))
    words = jnp.asarray(task.vocabulary.encode(told), jnp.int32)
    rollout = _rows(task, prompts, (first, second), valid, words)
    batch = unannotated(rollout)
    return batch.replace(mask=batch.mask & ((rollout.turn > 0) | (is_right & learn_first)))


def _rows(task: Task, prompts: Prompts, attempts: tuple[Array, Array], valid: Array, words: Array) -> Rollout:
    """Prompts, then attempts [B,T] of the same lengths with `words` [O] between them, packed to the left."""
    b = valid.shape[0]
    told = jnp.broadcast_to(words, (b, words.size))
    parts = [(attempts[0], valid, True, 0), (told, jnp.ones(told.shape, bool), False, 1), (attempts[1], valid, True, 1)]
    tokens, real, acted, turn = (
        jnp.concatenate([jnp.broadcast_to(part[i], part[0].shape) for part in parts], axis=1) for i in range(4)
    )
    order = jnp.argsort(~real, axis=1, stable=True)
    tokens, real, acted, turn = (jnp.take_along_axis(x, order, axis=1) for x in (tokens, real, acted, turn))
    rollout = prompts_lib.as_rows(
        task, prompts, jnp.where(real, tokens, task.vocabulary.pad_id), real, jnp.arange(b, dtype=jnp.int32)
    )
    width = prompts.tokens.shape[1]
    behind = lambda x: jnp.pad(x, ((0, 0), (width, 0)))  # noqa: E731
    action = behind(real & acted)
    return rollout.replace(
        action_mask=action, turn=behind(jnp.where(real, turn, 1)).astype(jnp.int32),
        behavior_log_probs=jnp.where(action, jnp.nan, 0.0).astype(jnp.float32),
    )  # fmt: skip
