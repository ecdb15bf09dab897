"""Judges: a model grades completions in words of its own, and its grades are the reward."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mlrl import groups
from mlrl.rewards.lifting import as_rewards
from mlrl.rollouts.single_turn import single_turn
from mlrl.sampling import GREEDY, Sampling
from mlrl.tasks import judgements
from mlrl.tasks.judgements import Form
from mlrl.types import (
    Array,
    Models,
    Prompts,
    Refused,
    RewardFn,
    Rewards,
    Rollout,
    Task,
    Vocabulary,
    require_whole,
)

GenerateFn = Callable[..., Rollout]  # (prompts, key, *, sampling, rollout_fn, group_size) -> Rollout


def current(models: Models) -> GenerateFn:
    """The policy judges, with the weights that wrote the completions (SSR-Zero)."""
    return models.generate


def frozen(models: Models) -> GenerateFn:
    """The reference judges: by default the policy as it was before the first step."""
    return models.generate_reference


def judge(
    *,
    form: Form = Form(),
    by: Callable[[Models], GenerateFn] = current,
    samples: int = 1,
    sampling: Sampling = GREEDY,
    answer_tokens: int = 0,
    rows_at_once: int = 0,
    seed: int = 0,
    name: str = "judge",
) -> RewardFn:
    """A completion's reward is the grade that a model gives it, who sees the prompt and no reference.

        r = [the completion ended] * mean over samples of grade / top

    A grade that cannot be read (`judgements.read`) is no grade: the mean is over those that can, and a row without any
    is unscored, so that it leaves baseline and loss. More of them than Recording.max_unscored_share stop the run. What
    the judge writes is not learned from, and no gradient flows through it.

    A completion that several rows of a step share is judged once: all of them get the first one's grades, also where
    these are sampled. With `rows_at_once` they are not generated again either.

    Args:
      form: what the judge reads, and the grades it may give.
      by: whose weights judge: `current` or `frozen`.
      samples: grades of a completion.
      sampling: of them.
      answer_tokens: the longest answer, its EOS included; 0: that of the top grade in single digits.
      rows_at_once: judge so many distinct completions at a time, and as often as there are more. It pays where many are
        alike. 0: all rows at once, alike or not.
      seed: of the sampled grades.
      name: of the part in the logs.
    Returns: a RewardFn with the parts `judge`, `judge/repeated` (1 where an earlier row says the same),
      `unscored/judge`, and `unscored/judge/answers` (the share of answers that could not be read).
    Raises: Refused, if several samples are greedy.
    Reference: Yang et al. 2025, "SSR-Zero: Simple Self-Rewarding Reinforcement Learning for Machine Translation". Its
      code is not public. Ours: a grade that cannot be read is unscored and not 0, a completion that did not end earns
      0, and grades are greedy. Left out: the reward of the format of thoughts, which needs a model that thinks; `Form`
      has a separator for judges that do.
    """
    for knob, value, lowest in (("samples", samples, 1), ("answer_tokens", answer_tokens, 0),
                                ("rows_at_once", rows_at_once, 0)):  # fmt: skip
        require_whole("judge", knob, value, lowest)
    if samples > 1 and sampling.greedy:
        raise Refused(f"judge: {samples} greedy grades of a completion are all the same: set samples to 1, or "
                      "judge.sampling = @sampling.Sampling()")  # fmt: skip

    def update(calls: Array, rollout: Rollout, prompts: Prompts, task: Task, models: Models) -> tuple[Rewards, Array]:
        tokens, valid = asked_of(form, task.vocabulary, rollout, prompts)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0x6A756467), calls)
        ask = functools.partial(grades, by(models), form=form, vocabulary=task.vocabulary, samples=samples,
                                sampling=sampling, answer_tokens=answer_tokens)  # fmt: skip
        place = groups.place_of_first_equal(jnp.where(valid, tokens, -1), jnp.zeros(tokens.shape[0], jnp.int32))
        found = _once_each(ask, tokens, valid, place, rows_at_once, key)
        readable = jnp.isfinite(found)
        mean = jnp.where(readable, found, 0.0).sum(axis=1) / readable.sum(axis=1)  # NaN without any: unscored
        rewards = as_rewards(jnp.where(jnp.asarray(rollout.truncated), 0.0 * mean, mean), rollout, name)
        parts = {f"{name}/repeated": (place != jnp.arange(place.size)).astype(jnp.float32),
                 f"unscored/{name}/answers": 1.0 - readable.mean(axis=1)}  # fmt: skip
        return rewards.replace(parts=rewards.parts | parts), calls + 1

    names = (name, f"{name}/repeated", f"unscored/{name}", f"unscored/{name}/answers")
    return RewardFn(lambda: jnp.int32(0), update, True, names)


def asked_of(form: Form, vocabulary: Vocabulary, rollout: Rollout, prompts: Prompts) -> tuple[Array, Array]:
    """Judge prompts (tokens, valid) [B,W] about the rows' completions; prompts have one row for each of the rollout."""
    said = judgements.without_end(rollout.tokens, rollout.action_mask, vocabulary)
    width = prompts.tokens.shape[1]  # rows of a single turn begin with their prompt, and have no action in it
    return judgements.ask(form, vocabulary, (prompts.tokens, prompts.valid),
                          (rollout.tokens[:, width:], said[:, width:]))  # fmt: skip


def grades(generate: GenerateFn, tokens: Array, valid: Array, key: Array, *, form: Form, vocabulary: Vocabulary,
           samples: int = 1, sampling: Sampling = GREEDY, answer_tokens: int = 0) -> Array:  # fmt: skip
    """[B,samples] what a model answers to judge prompts [B,W], in [0,1]; NaN where the answer is no grade."""
    rows, width = tokens.shape
    zero = jnp.zeros(rows, jnp.int32)
    rollout_fn = functools.partial(single_turn, max_completion_tokens=answer_tokens or form.digits + 1)
    answers = generate(Prompts(tokens, valid, zero, zero, {}), key, sampling=sampling, rollout_fn=rollout_fn,
                       group_size=samples)  # fmt: skip
    said = judgements.without_end(answers.tokens, answers.action_mask, vocabulary)
    found = judgements.read(form, vocabulary, answers.tokens[:, width:], said[:, width:], ~answers.truncated)
    return found.reshape(rows, samples)


def _once_each(ask: Callable[[Array, Array, Array], Array], tokens: Array, valid: Array, place: Array, at_once: int,
               key: Array) -> Array:  # fmt: skip
    """What `ask` finds of rows, of equal ones once: `place` [B] says which is the first that a row equals."""
    rows = tokens.shape[0]
    if not 0 < at_once < rows:
        return ask(tokens, valid, key)[place]
    first = place == jnp.arange(rows)
    order = jnp.argsort(~first, stable=True)  # those that are asked about come first
    order = jnp.pad(order, (0, -rows % at_once))
    shape = jax.eval_shape(ask, tokens, valid, key)

    def some(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        number, found = carry
        own = jax.lax.dynamic_slice(order, (number * at_once,), (at_once,))
        answers = ask(tokens[own], valid[own], jax.random.fold_in(key, number))
        return number + 1, jax.lax.dynamic_update_slice(found, answers, (number * at_once, 0))

    found = jnp.full((order.size, shape.shape[1]), jnp.nan, shape.dtype)
    _, found = jax.lax.while_loop(lambda carry: carry[0] * at_once < first.sum(), some, (jnp.int32(0), found))
    return found[(jnp.cumsum(first) - 1)[place]]
