"""Rewards of lengths: a right answer earns more where it is short enough. Targets are fixed, or follow the policy.

Each takes a reward that says what is right (an outcome above 0.5) and makes a score of its own from that and the row's
length in tokens, the EOS included; the outcome stays what it was. A bonus enters before any normalization by the group,
so that where a whole group is right, it is all there is to learn from. A linear penalty needs no function of its own:
`weighted_sum` of a reward and `graph.length_tokens` with a negative weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mlrl import groups
from mlrl.rewards.combinators import Reward
from mlrl.rewards.graph import length_tokens
from mlrl.rewards.lifting import at_last_action, lift
from mlrl.types import Array, Prompts, Refused, RewardFn, Rewards, Rollout, require_whole

LEVELS = ("low", "medium", "high")  # of a group's accuracy: below 1/3, below 2/3, and from 2/3 on

ScoreFn = Callable[..., tuple[dict[str, Array], Any]]  # (state, rollout, right, scored) -> ({part: [B]}, state)
ExploreFn = Callable[[Rollout], Array]  # rollout -> [B] bool: rows whose long wrong answers are spared


def truncation(correct: Reward, *, target_tokens: int, wrong: float = -0.5) -> RewardFn:
    """1 for a right answer of at most `target_tokens` tokens; `wrong` for all others, right or not.

    What a context of that length would do to rows that do not fit, without cutting them.

    Raises: Refused, unless target_tokens is a whole number of at least 1.
    """
    require_whole("truncation", "target_tokens", target_tokens, 1)

    def score(state: Any, rollout: Rollout, right: Array, scored: Array) -> tuple[dict[str, Array], Any]:
        within = length_tokens(rollout, None) <= target_tokens
        return {"reward": jnp.where(right & within, 1.0, wrong), "within": _share(within)}, state

    return _scored("truncation", correct, tuple, score, ("within",))


def laser(correct: Reward, *, target_tokens: int, bonus: float = 0.5, wrong: float = -0.5) -> RewardFn:
    """LASER: a right answer of at most `target_tokens` tokens earns a bonus.

        score = c + bonus * [right and length <= target_tokens],   c = 1 if right, else `wrong`

    Args:
      correct: what is right.
      target_tokens: L.
      bonus: alpha.
      wrong: what a wrong answer earns.
    Returns: a RewardFn with the parts `laser` and `laser/within` (the share of rows within the target).
    Raises: Refused, unless target_tokens is a whole number of at least 1.
    Reference: Liu et al. 2025, "Learn to Reason Efficiently with Adaptive Length-based Reward Shaping". Left out: the
      -1 of answers without the tags of its prompt; add `shipped.format_tags` for it.
    """
    require_whole("laser", "target_tokens", target_tokens, 1)

    def score(state: Any, rollout: Rollout, right: Array, scored: Array) -> tuple[dict[str, Array], Any]:
        within = length_tokens(rollout, None) <= target_tokens
        reward = jnp.where(right, 1.0, wrong) + bonus * (right & within)
        return {"reward": reward, "within": _share(within)}, state

    return _scored("laser", correct, tuple, score, ("within",))


def nowhere(rollout: Rollout) -> Array:
    """No wrong answer is spared: LASER-D. [B] bool."""
    return jnp.zeros(rollout.tokens.shape[:1], bool)


def laser_d(
    correct: Reward, *, lower_tokens: int, step_tokens: int, max_tokens: int, bonus: float = 0.5, wrong: float = -0.5,
    every_steps: int = 20, explore: ExploreFn = nowhere, name: str = "laser_d",
) -> RewardFn:  # fmt: skip
    """LASER-D: the target is that of the prompt's difficulty, and follows the lengths that were lately measured.

        score = c + bonus * [right and length <= target(level)] + bonus * [wrong and length > target(level) and explore]

    with c as in `laser` and the level from the accuracy of the row's own group (`levels`). The targets are set by
    `targets_of` in the first step, from its own rows, and then every `every_steps` steps, from all rows since. They
    ride in TrainState.reward, and so are saved and resumed.

    Args:
      lower_tokens, step_tokens, max_tokens: the targets to choose from are lower, lower + step, ... up to the first
        that is not below max.
      explore: [B] bool; `nowhere` gives LASER-D, `unrepetitive` LASER-DE.
      name: in the logs.
    Returns: a RewardFn with the parts `name`, `name/within` and `name/target_low`, `_medium`, `_high` in tokens.
    Raises: Refused, unless 1 <= lower <= max and the steps are whole numbers of at least 1.
    Reference: as `laser`. Departures: the authors measure lengths every 20 steps on 500 questions that are sampled for
      that alone; here the rows of the training steps are measured, which costs nothing and lags by half a window. Their
      edges of the levels are closed on one side when measuring and on the other when rewarding; here they are the same.
      A level that had no rows keeps its target.
    """
    for knob, value in (("lower_tokens", lower_tokens), ("step_tokens", step_tokens), ("every_steps", every_steps)):
        require_whole(name, knob, value, 1)
    require_whole(name, "max_tokens", max_tokens, lower_tokens)
    ladder = jnp.asarray([*range(lower_tokens, max_tokens + step_tokens, step_tokens)], jnp.float32)

    def init() -> dict[str, Array]:
        return {"calls": jnp.int32(0), "targets": jnp.full((3,), float(max_tokens)), **_nothing_seen(len(ladder))}

    def score(state: Any, rollout: Rollout, right: Array, scored: Array) -> tuple[dict[str, Array], Any]:
        group, lengths = jnp.asarray(rollout.group), length_tokens(rollout, None)
        level = levels(right, group, scored)
        seen = _seen(state, level, lengths, scored, ladder)
        expected = expected_right(groups.count(group, jnp.ones_like(scored)).max())
        due = state["calls"] % every_steps == 0
        adapted = targets_of(seen["below"], seen["rows"], seen["longest"], ladder, expected, state["targets"])
        targets = jnp.where(due, adapted, state["targets"])
        seen = jax.tree.map(lambda new, old: jnp.where(due, new, old), _nothing_seen(len(ladder)), seen)
        within = lengths <= targets[level]
        spared = ~right & ~within & explore(rollout)
        parts = {"reward": jnp.where(right, 1.0, wrong) + bonus * ((right & within) | spared), "within": _share(within)}
        parts |= {f"target_{word}": jnp.full(right.shape, targets[i]) for i, word in enumerate(LEVELS)}
        return parts, {"calls": state["calls"] + 1, "targets": targets, **seen}

    return _scored(name, correct, init, score, ("within", *(f"target_{word}" for word in LEVELS)))


def laser_de(correct: Reward, *, ngram: int = 4, times: int = 3, **settings: Any) -> RewardFn:
    """LASER-DE: LASER-D that also pays wrong answers beyond the target, unless they repeat themselves.

    Args:
      ngram, times: as in `repeats`.
      settings: of `laser_d`.
    Reference: as `laser`. Departure: the authors' search for repetitions chooses n and the count by the row's length,
      and wants two places to be near each other.
    """
    return laser_d(correct, explore=lambda rollout: ~repeats(rollout, ngram=ngram, times=times),
                   **({"name": "laser_de"} | settings))  # fmt: skip


def self_rewarded_efficiency(correct: Reward, *, beta: float = 0.2, eps: float = 1e-6) -> RewardFn:
    """Right answers earn more, the shorter they are among the right ones of their group.

        score = [right] * (1 + beta * (1 - (length - shortest) / (longest - shortest + eps)))

    Raises: Refused, if beta is negative.
    Reference: ours, after the abstract of Self-Rewarded Efficiency RL (arXiv 2506.15647), which says that correct
      answers are rewarded more where they are concise. The paper's own formula and constants were not at hand.
    """
    if not beta >= 0:
        raise Refused(f"self_rewarded_efficiency: beta must not be negative, got {beta}")

    def score(state: Any, rollout: Rollout, right: Array, scored: Array) -> tuple[dict[str, Array], Any]:
        group, lengths = jnp.asarray(rollout.group), length_tokens(rollout, None)
        rows = group.shape[0]
        shortest = jax.ops.segment_min(jnp.where(right, lengths, jnp.inf), group, num_segments=rows)[group]
        longest = jax.ops.segment_max(jnp.where(right, lengths, -jnp.inf), group, num_segments=rows)[group]
        place = jnp.where(right, (lengths - shortest) / (longest - shortest + eps), 1.0)
        return {"reward": right * (1.0 + beta * (1.0 - place))}, state

    return _scored("self_rewarded_efficiency", correct, tuple, score, ())


def levels(right: Array, group: Array, scored: Array) -> Array:
    """A row's difficulty by its group's accuracy: 2 (high) from 2/3 on, 1 (medium) from 1/3 on, else 0. [B] int32."""
    accuracy = groups.group_mean(right.astype(jnp.float32), group, scored)
    return (accuracy >= 1 / 3).astype(jnp.int32) + (accuracy >= 2 / 3)


def expected_right(group_size: Array | int) -> Array:
    """How many of a group's answers a level can count on: 1, G // 3 and 2 G // 3, and at least 1. [3] int32."""
    size = jnp.asarray(group_size, jnp.int32)
    return jnp.maximum(jnp.stack([jnp.ones_like(size), size // 3, 2 * size // 3]), 1)


def targets_of(below: Array, rows: Array, longest: Array, ladder: Array, expected: Array, before: Array) -> Array:
    """For each level the least length at which one right answer a group can be expected to be complete.

        target = min { L in ladder : floor(below(L) / rows * expected) >= 1 }, or `longest` if there is none

    Args:
      below: [3,K] how many rows of a level, right or wrong, had at most ladder[k] tokens.
      rows: [3] how many rows a level had. One without any keeps its target.
      longest: [] tokens of the longest row.
      ladder: [K] tokens, ascending.
      expected: [3] of `expected_right`.
      before: [3] the targets until now.
    Returns: [3] float32.
    """
    share = below / jnp.maximum(rows, 1.0)[:, None]
    enough = share * expected[:, None] >= 1.0 - 1e-6  # 1/2 of 2 is enough in any rounding
    found = jnp.where(enough.any(axis=1), ladder[jnp.argmax(enough, axis=1)], longest)
    return jnp.where(rows > 0, found, before)


def repeats(rollout: Rollout, *, ngram: int = 4, times: int = 3) -> Array:
    """Whether some `ngram` successive actions of a row occur, overlaps included, at least `times` times. [B] bool.

    Raises: Refused, unless ngram is a whole number of at least 1, and times of at least 2.
    """
    require_whole("repeats", "ngram", ngram, 1)
    require_whole("repeats", "times", times, 2)
    tokens, mask = jnp.asarray(rollout.tokens), jnp.asarray(rollout.action_mask)
    width = max(tokens.shape[1] - ngram + 1, 0)
    shifted = lambda x: [x[:, i : i + width] for i in range(ngram)]  # noqa: E731
    whole = jnp.stack(shifted(mask)).all(axis=0)
    # Sorted side by side, equal n-grams are neighbours: the first and last of `times` being equal, all are.
    outside, *grams = jax.lax.sort([~whole, *shifted(tokens)], dimension=1, num_keys=ngram + 1)
    apart = min(times - 1, width)
    same = jnp.stack([gram[:, apart:] == gram[:, : width - apart] for gram in grams]).all(axis=0)
    return (same & ~outside[:, apart:]).any(axis=1)


def _nothing_seen(rungs: int) -> dict[str, Array]:
    return {"below": jnp.zeros((3, rungs)), "rows": jnp.zeros((3,)), "longest": jnp.zeros(())}


def _seen(state: dict[str, Array], level: Array, lengths: Array, scored: Array, ladder: Array) -> dict[str, Array]:
    """The counts of `targets_of` with a step's rows added."""
    own = (jax.nn.one_hot(level, 3) * scored[:, None]).T  # [3,B]
    below = state["below"] + own @ (lengths[:, None] <= ladder).astype(jnp.float32)
    longest = jnp.maximum(state["longest"], jnp.where(scored, lengths, 0.0).max())
    return {"below": below, "rows": state["rows"] + own.sum(axis=1), "longest": longest}


def _share(condition: Array) -> Array:
    return condition.astype(jnp.float32)


def _scored(name: str, correct: Reward, init: Callable[[], Any], score: ScoreFn, parts: tuple[str, ...]) -> RewardFn:
    """A RewardFn that scores rows by whether they are right, on their last action."""
    inner = lift(correct)

    def update(state: Any, rollout: Rollout, prompts: Prompts, task: Any, models: Any) -> tuple[Rewards, Any]:
        found, inner_state = inner.update(state["inner"], rollout, prompts, task, models)
        scored = jnp.asarray(found.scored)
        own, next_state = score(state["own"], rollout, (found.outcome > 0.5) & scored, scored)
        reward = jnp.where(scored, own.pop("reward"), 0.0)
        logged = {name: reward} | {f"{name}/{part}": value for part, value in own.items()}
        rewards = Rewards(at_last_action(reward, jnp.asarray(rollout.action_mask)), found.outcome, scored,
                          found.parts | logged)  # fmt: skip
        return rewards if inner.in_graph else jax.device_get(rewards), {"inner": inner_state, "own": next_state}

    names = (*inner.names, name, *(f"{name}/{part}" for part in parts))
    return RewardFn(lambda: {"inner": inner.init(), "own": init()}, update, inner.in_graph, names)
