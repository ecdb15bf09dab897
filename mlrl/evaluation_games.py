"""Evaluation of a policy that plays games: matches against players who do not learn, and what can be read exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mlrl import processes, prompts
from mlrl.environments.games import kuhn_exact, negotiation, reading
from mlrl.environments.games.words import ZERO_SUM
from mlrl.evaluation import Measured, Results, due, interval
from mlrl.sampling import Sampling
from mlrl.types import Array, Params, Prompts, Refused, RolloutFn, Task, require_whole


@dataclasses.dataclass(frozen=True)
class Match:
    """Games against a fixed player, half of them as player 0, half as player 1.

    task         the prompt that games begin with; its name is that of the results
    rollout_fn   self_play with the game and a fixed opponent
    prompts      how many games
    every_steps  measured before, after, and every so many steps; 0: before and after only
    sampling     how the policy moves
    """

    task: Task
    rollout_fn: RolloutFn
    prompts: int = 512
    every_steps: int = 0
    sampling: Sampling = Sampling()
    seed: int = 0

    def __post_init__(self):
        _check(self)

    def due(self, step: int, last_step: int) -> bool:
        """Whether this is measured after `step` steps of a run that ends at `last_step`."""
        return due(self.every_steps, step, last_step)

    def rollout(self, in_training: RolloutFn) -> RolloutFn:
        """How this samples."""
        return self.rollout_fn

    def words(self) -> str:
        """What is measured."""
        return "a match, each game by a new sample"

    def measure(self, models: Measured) -> Callable[[Params, Params], Results]:
        """(params, reference's) -> shares won, drawn, lost and broken by an own move; payoff, of each seat too."""
        batch = prompts.first(self.task, self.prompts)

        def play(params: Params, batch: Prompts) -> dict[str, Array]:
            key = jax.random.key(self.seed)
            rows = self.rollout_fn(models.model, params, batch, key, vocabulary=self.task.vocabulary,
                                   sampling=self.sampling, group_size=1)  # fmt: skip
            if isinstance(rows.earned, tuple) or "invalid" not in rows.facts:
                raise Refused("Match.rollout_fn must be self_play.self_play with an opponent: its rows have no payoffs")
            payoff = jnp.sum(jnp.where(rows.action_mask, rows.earned, 0.0), axis=1)
            return {"payoff": jnp.where(rows.action_mask.any(axis=1), payoff, jnp.nan), "role": rows.role,
                    "invalid": rows.facts["invalid"]}  # fmt: skip

        played = models.compiled(play, batch)
        return lambda params, reference: {
            self.task.name: match_statistics(
                **processes.on_host(played(params, batch)))
        }  # fmt: skip


def match_statistics(payoff: np.ndarray, role: np.ndarray, invalid: np.ndarray) -> dict[str, dict[str, float]]:
    """won, drawn, lost, invalid (shares of games), payoff, and won_0, payoff_0 and so on of each seat; 95% intervals.

    Args:
      payoff: [B], NaN where the policy never moved: such a game is in no number.
      role: [B], 0 or 1: the policy's seat.
      invalid: [B], 1 where the policy broke the rules; that is among the lost games.
    """
    known = ~np.isnan(payoff)
    share = lambda x, mine=True: interval(np.where(known & mine, x, np.nan))  # noqa: E731
    found = {"won": share(payoff > 0), "drawn": share(payoff == 0), "lost": share(payoff < 0),
             "invalid": share(invalid), "payoff": share(payoff)}  # fmt: skip
    for seat in (0, 1):
        found |= {f"won_{seat}": share(payoff > 0, role == seat), f"payoff_{seat}": share(payoff, role == seat)}
    return found


@dataclasses.dataclass(frozen=True)
class KuhnTable:
    """One round of Kuhn poker, exactly: the policy's move probabilities are read, and no game is played.

    task             kuhn_poker.prompts; its name is that of the results
    every_steps      measured before, after, and every so many steps; 0: before and after only
    max_move_tokens  A of the rollout
    temperature      of the rollout's Sampling
    broken           of the game
    """

    task: Task
    every_steps: int = 0
    prompts: int = 1
    max_move_tokens: int = 2
    temperature: float = 1.0
    broken: tuple[float, float] = ZERO_SUM

    def __post_init__(self):
        _check(self)

    def due(self, step: int, last_step: int) -> bool:
        """Whether this is measured after `step` steps of a run that ends at `last_step`."""
        return due(self.every_steps, step, last_step)

    def words(self) -> str:
        """What is measured."""
        return "exploitability, exactly"

    def measure(self, models: Measured) -> Callable[[Params, Params], Results]:
        """(params, reference's) -> the fields of kuhn_exact.Exploitability, illegal (the mean probability of breaking
        the rules at the 12 information sets), and what the policy wins, as the mean of both seats, against a random
        player (payoff_random) and against the equilibrium of alpha 1/3 (payoff_equilibrium; at most 0).
        """
        broken, text = tuple(self.broken), self.task.example(0, 0)["prompt"]

        @jax.jit
        def measured(params: Params) -> dict[str, Array]:
            table = reading.kuhn_table(models.model, params, vocabulary=self.task.vocabulary, text=text,
                                       max_move_tokens=self.max_move_tokens, temperature=self.temperature)  # fmt: skip
            found = kuhn_exact.exploitability(table, broken)._asdict()
            others = {"random": jnp.full((12, 2), 0.5), "equilibrium": jnp.asarray(kuhn_exact.equilibrium())}
            for name, other in others.items():
                as_first, as_second = (kuhn_exact.values(*both, broken)[seat]
                                       for seat, both in enumerate(((table, other), (other, table))))  # fmt: skip
                found[f"payoff_{name}"] = (as_first + as_second) / 2
            return found | {"illegal": jnp.mean(1.0 - jnp.sum(table, axis=1))}

        return lambda params, reference: {
            self.task.name: {name: _exact(float(x), 12) for name, x in processes.on_host(measured(params)).items()}
        }


@dataclasses.dataclass(frozen=True)
class Openings:
    """Simple Negotiation's first moves, exactly: the policy's probabilities are read, and no game is played.

    task             negotiation.prompts; its name is that of the results
    every_steps      measured before, after, and every so many steps; 0: before and after only
    start, values    of the game
    max_move_tokens  A of the rollout
    temperature      of the rollout's Sampling
    """

    task: Task
    every_steps: int = 0
    prompts: int = 1
    start: tuple[int, int] = negotiation.START
    values: tuple[tuple[int, int], tuple[int, int]] = negotiation.VALUES
    max_move_tokens: int = 8
    temperature: float = 1.0

    def __post_init__(self):
        _check(self)

    def due(self, step: int, last_step: int) -> bool:
        """Whether this is measured after `step` steps of a run that ends at `last_step`."""
        return due(self.every_steps, step, last_step)

    def words(self) -> str:
        """What is measured."""
        return "first moves, exactly"

    def measure(self, models: Measured) -> Callable[[Params, Params], Results]:
        """(params, reference's) -> what reading.negotiation_openings returns."""
        text = self.task.example(0, 0)["prompt"]
        read = jax.jit(lambda params: reading.negotiation_openings(
            models.model, params, vocabulary=self.task.vocabulary, text=text, values=self.values, start=self.start,
            max_move_tokens=self.max_move_tokens, temperature=self.temperature))  # fmt: skip
        return lambda params, reference: {
            self.task.name: {name: _exact(float(x), 1) for name, x in processes.on_host(read(params)).items()}
        }


def _exact(x: float, prompts: int) -> dict[str, float]:
    return {"value": x, "low": x, "high": x, "prompts": prompts}


def _check(evaluation: Match | KuhnTable | Openings) -> None:
    name = type(evaluation).__name__
    require_whole(name, "prompts", evaluation.prompts, 1)
    require_whole(name, "every_steps", evaluation.every_steps, 0)
    if not isinstance(evaluation.task, Task):
        raise Refused(f"{name}.task must be a Task, got {evaluation.task!r}: call a function, as @name()")
