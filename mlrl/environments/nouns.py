"""The nouns of what happens between turns: environments of one policy, games of two, opponents.

All are pure functions of ONE episode on pytrees of arrays, without a batch axis: the rollouts vmap them over episodes,
inside jit. Tokens in, tokens out: what a policy wrote and what it is told are token ids, and are never tokenized again.
Marks around a turn (as those of a chat template) are tokens of the observation.

    A  tokens of a turn or move, at most        O  tokens of an observation, at most
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from mlrl.types import Array, Prompts, Refused


def examples(prompts: Prompts) -> Any:
    """What the task offers for judging."""
    return prompts.example


class Environment(NamedTuple):
    """What answers one policy, turn by turn. The prompt is what the policy is told first.

    reset        (key, given) -> state: a pytree of arrays. What is given is `Prompts.example` of this prompt, so that
                 the environment can know its right answer
    step         (state, tokens [A] int32, length int32) -> (state, observation [O] int32, observation length int32,
                 reward float32, done bool). Of `tokens` the first `length` were written, an EOS included where there is
                 one. What is observed when it is done is not read
    observation_tokens  O
    given        Prompts -> what reset is given, with a row for each prompt
    """

    reset: Callable[[Array, Any], Any]
    step: Callable[[Any, Array, Array], tuple[Any, Array, Array, Array, Array]]
    observation_tokens: int
    given: Callable[[Prompts], Any] = examples


class Game(NamedTuple):
    """A game of two, of one episode, as pure functions; rollouts vmap them over episodes. Players are 0 and 1.

    reset        (key) -> state
    player       (state) -> int32: who moves next
    observation  (state) -> (tokens [O] int32, length int32): what the player to move is told before moving; everything
                 that is new to that player since the last own move
    step         (state, tokens [A] int32, length int32) -> state: the mover's tokens; what breaks the rules loses
    done         (state) -> bool
    outcome      (state) -> float32 [2]: what each player won, where done
    invalid      (state) -> int32: the player whose move broke the rules and so ended the game, -1 if none
    observation_tokens  O
    """

    reset: Callable[[Array], Any]
    player: Callable[[Any], Array]
    observation: Callable[[Any], tuple[Array, Array]]
    step: Callable[[Any, Array, Array], Any]
    done: Callable[[Any], Array]
    outcome: Callable[[Any], Array]
    invalid: Callable[[Any], Array]
    observation_tokens: int


OpponentFn = Callable[[Array, Any], tuple[Array, Array]]
"""(key, state of a game) -> (tokens [A] int32, length int32): the move of a player who is not the policy and does not
learn, such as one that plays at random, by minimax, or an equilibrium."""


def itself(key: Array, state: Any) -> tuple[Array, Array]:
    """Stands for the policy, which then plays both sides; it is never called."""
    raise Refused("itself has no moves of its own: it stands for the policy in self_play.opponent")
