"""Simple Negotiation over symbols: two players trade wood and gold that they value differently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlrl.environments.games import words as w
from mlrl.environments.nouns import Game, OpponentFn
from mlrl.tasks.episodes import one_prompt
from mlrl.types import Array, Prompts, Refused, Task, Vocabulary, require_whole

GOODS = "WG"
ACCEPT, DENY = 0, 1  # places in `offers`; the rest are offers
PROMPT = "N:WG="  # negotiation, and what is traded
VALUES = ((5, 15), (15, 5))
START = (10, 10)


def larger_gain(gains: Array) -> Array:
    """Whose goods gained more by the own values wins 1, the other -1; as much is a draw. [2] -> [2]."""
    lead = jnp.sign(gains[0] - gains[1])
    return jnp.stack([lead, -lead]).astype(jnp.float32)


def negotiation(
    vocabulary: Vocabulary = w.VOCABULARY,
    *,
    values: tuple[tuple[int, int], tuple[int, int]] = VALUES,
    start: tuple[int, int] = START,
    turns: int = 10,
    payoff: Callable[[Array], Array] = larger_gain,
    marker: str = "",
    broken: tuple[float, float] = w.ZERO_SUM,
) -> Game:
    """Simple Negotiation: players offer in turn, accept or deny, and want their goods to gain in value.

        gains[p] = sum over goods of values[p] * (what p has - start)

    An offer 2W>3G gives two wood for three gold; the mover must have what it gives. A accepts the other's last offer,
    which then is done, and is legal only where there is one and the mover has what it asks for. D denies it, or says
    nothing where there is none; another offer denies too. Trades do not end the game: player 0 begins, and it is over
    after `turns` moves.

    The mover is first told its values, as 05W15G; then, each time, what it has, as 10W10G, and the other's last move.
    Numbers in moves have no leading zero. A move has an EOS where there is room.

    Args:
      vocabulary: spells "0123456789WG>AD" as one token each.
      values: [player][good] of wood and gold, below 100.
      start: how much of each both players have at first, below 50.
      turns: of both players together.
      payoff: gains [2] int32 -> outcome [2] float32.
      marker: see words.reader; what is written before it is free, and nobody is told.
      broken: what (the offender, the other player) win where a move is illegal or not readable. The default keeps the
        game zero-sum, so that breaking the rules is a loss; SPIRAL's code pays (-1.5, 0.5), which makes both players'
        mean returns depend on how often rules are broken.
    Returns: a Game of at most `turns` moves of at most 8 tokens, EOS included.
    Raises: Refused, if a setting is out of range, or the vocabulary or the marker do not fit.
    Reference: Liu et al. 2025, SPIRAL, whose own list of legal moves lacks most offers. Left out: talk, and offers of
      both goods at once.
    """
    _check(values, start, turns)
    broken = w.check_broken("negotiation", broken)
    known, give, ask = offers(vocabulary, start)
    read = w.reader(vocabulary, known, marker)

    def reset(key: Array) -> dict[str, Array]:
        del key
        have = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (2, 2))
        return {"have": have, "offer": jnp.int32(-1), "said": jnp.int32(-1), "turn": jnp.int32(0),
                "broke": jnp.int32(-1)}  # fmt: skip

    def step(state: Any, tokens: Array, length: Array) -> Any:
        me, move = player(state), read(tokens, length)
        fine = (move >= 0) & legal(state, give, ask)[move]
        traded = jnp.asarray(ask - give)[state["offer"]]  # what the one who offered has more of
        change = jnp.where(jnp.arange(2)[:, None] == me, -traded, traded)
        after = {
            "have": state["have"] + jnp.where(move == ACCEPT, change, 0), "offer": jnp.where(move > DENY, move, -1),
            "said": move, "turn": state["turn"] + 1, "broke": state["broke"],
        }  # fmt: skip
        return jax.tree.map(lambda new, old: jnp.where(fine, new, old), after, state | {"broke": me})

    def done(state: Any) -> Array:
        return (state["turn"] >= turns) | (state["broke"] >= 0)

    def outcome(state: Any) -> Array:
        gained = jnp.sum(jnp.asarray(values) * (state["have"] - jnp.asarray(start)), axis=1)
        return w.when_broken(state["broke"], broken, 1.0, payoff(gained))

    observation, observed = _observation(vocabulary, values, known)
    return Game(reset, player, observation, step, done, outcome, lambda state: state["broke"], observed)


def player(state: Any) -> Array:
    """Who moves: 0 or 1, int32."""
    return state["turn"] % 2


def offers(vocabulary: Vocabulary, start: tuple[int, int] = START) -> tuple[w.Words, np.ndarray, np.ndarray]:
    """All moves: A, D, and every offer of what there is. (words, what each gives [W,2], what it asks for [W,2])."""
    texts, give, ask = ["A", "D"], [(0, 0), (0, 0)], [(0, 0), (0, 0)]
    for mine, his in ((0, 1), (1, 0)):
        for a in range(1, 2 * start[mine] + 1):
            for b in range(1, 2 * start[his] + 1):
                texts.append(f"{a}{GOODS[mine]}>{b}{GOODS[his]}")
                give.append((a, 0) if mine == 0 else (0, a))
                ask.append((b, 0) if his == 0 else (0, b))
    return w.words(vocabulary, texts), np.asarray(give, np.int32), np.asarray(ask, np.int32)


def legal(state: Any, give: np.ndarray, ask: np.ndarray) -> Array:
    """Which moves are, [W] bool in the order of `offers`."""
    mine, offer = state["have"][player(state)], state["offer"]
    fine = jnp.all(mine >= give, axis=1)
    accepts = (offer >= 0) & jnp.all(mine >= jnp.asarray(ask)[offer])
    return fine.at[ACCEPT].set(accepts)


def lead(give: np.ndarray, ask: np.ndarray, values: tuple[tuple[int, int], tuple[int, int]] = VALUES) -> np.ndarray:
    """How much further ahead of the other a trade puts who offered it, [W] in the order of `offers`.

        change of gains[me] - gains[other] = sum over goods of (values[0] + values[1]) * (ask - give)

    No trade puts both ahead, so by `larger_gain` nobody has a reason to accept what the other does well to offer. By
    VALUES both goods count alike: who gives fewer pieces than it gets is ahead.
    """
    return (ask - give) @ np.sum(values, axis=0)


def at_random(vocabulary: Vocabulary = w.VOCABULARY, *, start: tuple[int, int] = START,
              max_move_tokens: int = 8) -> OpponentFn:  # fmt: skip
    """An opponent that accepts (where it can), denies or offers, each as likely; of legal offers each is as likely.

    Among all legal moves alike it would next to never accept, and never trade.
    """
    known, give, ask = offers(vocabulary, start)
    tokens, lengths = w.spelled(vocabulary, known, max_move_tokens)
    kind = np.minimum(np.arange(len(tokens)), 2)

    def move(key: Array, state: Any) -> tuple[Array, Array]:
        first, second = jax.random.split(key)
        allowed = legal(state, give, ask)
        kinds = jnp.stack([jnp.any(allowed & (kind == k)) for k in range(3)])
        chosen = w.uniform(second, allowed & (kind == w.uniform(first, kinds)))
        return jnp.asarray(tokens)[chosen], jnp.asarray(lengths)[chosen]

    return move


def careful(
    vocabulary: Vocabulary = w.VOCABULARY, *, values: tuple[tuple[int, int], tuple[int, int]] = VALUES,
    start: tuple[int, int] = START, max_move_tokens: int = 8,
) -> OpponentFn:  # fmt: skip
    """An opponent that is never behind, and so by `larger_gain` never loses: against it the best player draws.

    It accepts what puts it further ahead. If there is no such offer it makes one that would, and that the other can
    accept, each as likely; if there is none, it denies.

    Args:
      values, start: those of the game.
    """
    known, give, ask = offers(vocabulary, start)
    tokens, lengths = w.spelled(vocabulary, known, max_move_tokens)
    ahead = lead(give, ask, values)

    def move(key: Array, state: Any) -> tuple[Array, Array]:
        allowed = legal(state, give, ask)
        good = allowed & (ahead > 0) & jnp.all(state["have"][1 - player(state)] >= ask, axis=1)
        answer = jnp.where(jnp.any(good), w.uniform(key, good), DENY)
        accepts = allowed[ACCEPT] & (jnp.asarray(ahead)[state["offer"]] < 0)  # behind for who offered it
        chosen = jnp.where(accepts, ACCEPT, answer)
        return jnp.asarray(tokens)[chosen], jnp.asarray(lengths)[chosen]

    return move


def prompts(vocabulary: Vocabulary = w.VOCABULARY, *, text: str = PROMPT, name: str = "negotiation") -> Task:
    """A Task of one prompt that names the game and the goods; `text` may be another in the vocabulary's words."""
    return one_prompt(prompt=text, vocabulary=vocabulary, name=name)


def first_moves(
    vocabulary: Vocabulary = w.VOCABULARY, *, text: str = PROMPT,
    values: tuple[tuple[int, int], tuple[int, int]] = VALUES, start: tuple[int, int] = START,
) -> tuple[Prompts, np.ndarray]:  # fmt: skip
    """What players have before them at their first move, as rows of a rollout have it, and the openings they answer.

    Row 0 is player 0's. Row 1 + i is player 1's after the i-th of those openings that it can accept.

    Returns: (Prompts with 1 + I rows, the places of the I openings in `offers`).
    """
    known, give, ask = offers(vocabulary, start)
    openings = np.flatnonzero((give.sum(1) > 0) & (np.maximum(give, ask) <= start).all(1))
    told = ["".join(f"{n:02}{g}" for pair in (own, start) for n, g in zip(pair, GOODS)) for own in values]
    rows = [list(vocabulary.encode(text)) + w.symbol_ids(vocabulary, said).tolist()
            for said in (told[0], *(told[1] + known.texts[i] for i in openings))]  # fmt: skip
    width, number = max(map(len, rows)), np.arange(len(rows), dtype=np.int32)
    tokens = np.asarray([[vocabulary.pad_id] * (width - len(row)) + row for row in rows], np.int32)
    valid = np.asarray([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return Prompts(*map(jnp.asarray, (tokens, valid, np.zeros_like(number), number)), {}), openings


def _observation(vocabulary: Vocabulary, values: Any, known: w.Words) -> tuple[Callable[[Any], Any], int]:
    """(the function, O): values at the first own move, goods, and what the other said."""
    digits, goods = (jnp.asarray(w.symbol_ids(vocabulary, text)) for text in ("0123456789", GOODS))

    def shown(pair: Array) -> Array:
        return jnp.stack([digits[pair // 10], digits[pair % 10], goods], axis=1).reshape(6)

    def observation(state: Any) -> tuple[Array, Array]:
        me, said = player(state), state["said"]
        move = jnp.asarray(known.tokens)[said]
        told = jnp.concatenate([shown(jnp.asarray(values)[me]), shown(state["have"][me]), move])
        count = jnp.where(said >= 0, jnp.asarray(known.lengths)[said], 0)
        keep = jnp.concatenate([jnp.repeat(state["turn"] < 2, 6), jnp.ones(6, bool),
                                jnp.arange(known.tokens.shape[1]) < count])  # fmt: skip
        return w.packed(told, keep, vocabulary.pad_id)

    return observation, 12 + known.tokens.shape[1]


def _check(values: Any, start: Any, turns: int) -> None:
    require_whole("negotiation", "turns", turns, 1)
    for i, amount in enumerate(start):
        require_whole("negotiation", f"start[{i}]", amount, 1)
    if np.shape(values) != (2, 2) or np.shape(start) != (2,) or not 0 <= np.min(values) <= np.max(values) < 100:
        raise Refused("negotiation.values must be two pairs of numbers from 0 to 99, one for each player, and start "
                      f"one pair, got {values} and {start}")  # fmt: skip
    if max(start) > 49:
        raise Refused(f"negotiation.start must be below 50, since there is twice as much in all, got {start}")
