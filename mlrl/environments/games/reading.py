"""What a language model would play: the probability of every move, read by scoring it, and what that is worth."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlrl import scoring
from mlrl.environments.games import kuhn_exact, kuhn_poker, negotiation
from mlrl.environments.games import words as w
from mlrl.models.transformer import Transformer
from mlrl.types import Array, Params, Prompts, Rollout, Vocabulary


class Policy(NamedTuple):
    """What a model does where it is to move.

    moves    [N,W] float32  the probability of each legal move; 0 where illegal
    illegal  [N] float32    all the rest: illegal moves, and what is no move
    """

    moves: Array
    illegal: Array


def policy_at_information_sets(
    model: Transformer, params: Params, prompts: Prompts, known: w.Words, legal: Array, *, vocabulary: Vocabulary,
    max_move_tokens: int, temperature: float = 1.0,
) -> Policy:  # fmt: skip
    """The probabilities of all words of a game after each of N prompts.

        p(move | prompt) = sum over EOS e of prod_t softmax(logits_t / temperature)[move + e]

    without EOS for a move that fills A tokens. Exact for what `self_play` samples with this temperature and nothing cut
    off (top_k, top_p, min_p), by a game without a marker: what is written before a marker cannot be enumerated.

    Args:
      prompts: [N,P], all that the player has read and written before this move, as kuhn_poker.information_sets.
      known: the W words; N W rows are scored for each EOS.
      legal: [N,W] bool.
      max_move_tokens: A of the rollout.
      temperature: of the rollout's Sampling, above 0.
    """
    first, lengths = w.spelled(vocabulary, known, max_move_tokens)
    ended = lengths > known.lengths
    at_end = ended[:, None] & (np.arange(max_move_tokens)[None] == lengths[:, None] - 1)
    tokens = np.concatenate([np.where(at_end, eos, first) for eos in vocabulary.eos_ids])
    counts = np.concatenate([ended | (k == 0) for k, _ in enumerate(vocabulary.eos_ids)])
    lengths = np.tile(lengths, len(vocabulary.eos_ids))
    n, each = prompts.tokens.shape[0], len(tokens)
    answer = jnp.tile(jnp.asarray(tokens), (n, 1))
    real = jnp.tile(jnp.arange(tokens.shape[1])[None] < lengths[:, None], (n, 1))
    valid = jnp.concatenate([jnp.repeat(prompts.valid, each, axis=0), real], axis=1)
    zeros = jnp.zeros(n * each, jnp.int32)
    rollout = Rollout(
        tokens=jnp.concatenate([jnp.repeat(prompts.tokens, each, axis=0), answer], axis=1), valid=valid,
        action_mask=valid, behavior_log_probs=jnp.zeros(valid.shape), turn=jnp.zeros(valid.shape, jnp.int32),
        role=zeros, group=jnp.repeat(jnp.arange(n), each), truncated=zeros.astype(bool), policy_version=zeros,
    )  # fmt: skip
    width = prompts.tokens.shape[1]
    scores = scoring.score(model, params, rollout, temperature=temperature, first_column=width)
    chances = jnp.exp(jnp.sum(scores.log_probs[:, width:], axis=1)).reshape(n, each) * counts
    moves = jnp.where(legal, jnp.sum(chances.reshape(n, len(vocabulary.eos_ids), -1), axis=1), 0.0)
    return Policy(moves, jnp.maximum(1.0 - jnp.sum(moves, axis=1), 0.0))


def kuhn_table(
    model: Transformer, params: Params, *, vocabulary: Vocabulary = w.VOCABULARY, text: str = kuhn_poker.PROMPT,
    max_move_tokens: int = 2, temperature: float = 1.0,
) -> Array:  # fmt: skip
    """A model's policy at Kuhn poker as a table of kuhn_exact, [12,2]; what a row lacks to 1 breaks the rules.

    Args: as those of `policy_at_information_sets`; `text` is that of kuhn_poker.prompts.
    """
    prompts = kuhn_poker.information_sets(vocabulary, text=text, max_move_tokens=max_move_tokens)
    options = np.repeat(kuhn_poker.OPTIONS, 3, axis=0)
    legal = np.any(np.arange(4)[None, :, None] == options[:, None], axis=2)
    policy = policy_at_information_sets(
        model, params, prompts, w.words(vocabulary, kuhn_poker.MOVES), jnp.asarray(legal), vocabulary=vocabulary,
        max_move_tokens=max_move_tokens, temperature=temperature,
    )  # fmt: skip
    return jnp.take_along_axis(policy.moves, jnp.asarray(options), axis=1)


def kuhn_exploitability(
    model: Transformer, params: Params, *, broken: tuple[float, float] = w.ZERO_SUM, **settings: Any
) -> dict[str, Array]:
    """How far a model's policy at one round of Kuhn poker is from an equilibrium, in chips, for the logs.

    Args:
      broken: that of the game.
      **settings: of `kuhn_table`.
    Returns: the fields of kuhn_exact.Exploitability, and illegal: the mean probability of breaking the rules at the 12
      information sets.
    """
    table = kuhn_table(model, params, **settings)
    found = kuhn_exact.exploitability(table, broken)
    return found._asdict() | {"illegal": jnp.mean(1.0 - jnp.sum(table, axis=1))}


def negotiation_openings(
    model: Transformer, params: Params, *, vocabulary: Vocabulary = w.VOCABULARY, text: str = negotiation.PROMPT,
    values: tuple[tuple[int, int], tuple[int, int]] = negotiation.VALUES, start: tuple[int, int] = negotiation.START,
    max_move_tokens: int = 8, temperature: float = 1.0,
) -> dict[str, Array]:  # fmt: skip
    """How a model opens Simple Negotiation as player 0, and what openings it accepts as player 1; exact.

    Args:
      values, start: those of the game; `text` is that of negotiation.prompts. The rest as `policy_at_information_sets`.
    Returns: opens_ahead, opens_behind: the probability of an opening that the other can accept, and that would put who
      made it ahead, or behind; opens_illegal: that of breaking the rules by it. accepts_ahead, accepts_behind: the mean
      probability of accepting, over all openings that can be accepted and would put who accepts ahead, or behind.
    """
    known, give, ask = negotiation.offers(vocabulary, start)
    prompts, openings = negotiation.first_moves(vocabulary, text=text, values=values, start=start)
    settings = dict(vocabulary=vocabulary, max_move_tokens=max_move_tokens, temperature=temperature)
    first, later = jax.tree.map(lambda x: x[:1], prompts), jax.tree.map(lambda x: x[1:], prompts)
    legal = (give <= np.asarray(start)).all(1) & (np.arange(len(give)) != negotiation.ACCEPT)
    opens = policy_at_information_sets(model, params, first, known, jnp.asarray(legal[None]), **settings)
    accepts = policy_at_information_sets(
        model, params, later, w.words(vocabulary, ["A"]), jnp.ones((len(openings), 1), bool), **settings,
    ).moves[:, 0]  # fmt: skip
    ahead = negotiation.lead(give, ask, values)[openings]
    mean = lambda where: jnp.sum(accepts * where) / max(1, where.sum())  # noqa: E731
    made = opens.moves[0, openings]
    return {"opens_ahead": jnp.sum(made * (ahead > 0)), "opens_behind": jnp.sum(made * (ahead < 0)),
            "opens_illegal": opens.illegal[0], "accepts_ahead": mean(ahead < 0), "accepts_behind": mean(ahead > 0)}
