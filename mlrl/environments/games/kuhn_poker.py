"""Kuhn poker over symbols: the game of one or several rounds, its prompts, and opponents that play by a table."""

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

CARDS = "JQK"
MOVES = ("x", "b", "c", "f")  # check, bet, call, fold
CHECK, BET, CALL, FOLD = range(4)
BETTING = ("", "x", "b", "xb")  # what was done in a round; who opened it moves at "" and "xb"
OPTIONS = np.asarray([[CHECK, BET], [CHECK, BET], [FOLD, CALL], [FOLD, CALL]])  # by betting: the timid, the bold
PROMPT = "P:JQK="  # poker, and the cards in their order
_DEALS = np.asarray([(i, j) for i in range(3) for j in range(3) if i != j], np.int32)


def net_chips(chips: Array) -> Array:
    """A player wins as many chips as the other loses."""
    return chips.astype(jnp.float32)


def more_chips(chips: Array) -> Array:
    """Who has more chips at the end wins 1, the other -1; as many is a draw. SPIRAL's rule for several rounds."""
    return jnp.sign(chips).astype(jnp.float32)


def kuhn_poker(
    vocabulary: Vocabulary = w.VOCABULARY,
    *,
    rounds: int = 1,
    payoff: Callable[[Array], Array] = net_chips,
    marker: str = "",
    broken: tuple[float, float] = w.ZERO_SUM,
) -> Game:
    """Kuhn's poker: three cards J < Q < K, one each, an ante of 1 and one bet of 1.

    Who opens the round checks (x) or bets (b); so does the other after a check. A bet is called (c) or folded (f). A
    fold loses 1; otherwise cards are shown and the higher wins 1, or 2 after a call. Player 0 opens rounds 0, 2, ...

    The mover is told what the other did since, and its card at its first move of a round: xJ to who moves second after
    a check, J and later b to who checked first. (Were the card told before it, Jx would be both the other's check, with
    a move to follow, and an own one, which is over.) After a round it is first told: the other's last move if that
    closed the round, the chips won in it as +2 or -1, and the other's card where cards were shown. A move is one of
    xbcf, and an EOS where there is room.

    Args:
      vocabulary: spells "JQKxbcf+-12" as one token each.
      rounds: R, each with new cards. Chips are counted over all of them, whoever wins the last.
      payoff: chips that player 0 won, of both an int32 -> what it wins; an odd function, monotone. `net_chips` is the
        game that `kuhn_exact` solves; `more_chips` compares.
      marker: see words.reader; what is written before it is free, and nobody is told.
      broken: what (the offender, the other player) win where a move is illegal or not readable, as shares of the most
        that can be won: payoff(2 R). By default it is all of it, so that the game stays zero-sum and no move is worse;
        SPIRAL's code pays (-1.5, 0.5), which makes both players' mean returns depend on how often rules are broken.
    Returns: a Game of at most 3 R moves, half of them (rounded up) of one player, who may move twice in a row.
    Raises: Refused, if the vocabulary, the marker, `rounds` or `broken` do not fit.
    Reference: Kuhn 1950; Liu et al. 2025, SPIRAL, with 5 rounds (in its code player 1 opens the first, and the winner
      of the last is the winner of all).
    """
    require_whole("kuhn_poker", "rounds", rounds, 1)
    broken = w.check_broken("kuhn_poker", broken)
    with jax.ensure_compile_time_eval():  # gin may make the game while the rollout is traced
        most = float(payoff(jnp.int32(2 * rounds)))
    read = w.reader(vocabulary, w.words(vocabulary, MOVES), marker)

    def reset(key: Array) -> dict[str, Array]:
        cards = jnp.asarray(_DEALS)[jax.random.randint(key, (rounds,), 0, len(_DEALS))]
        zero, none = jnp.int32(0), jnp.int32(-1)
        return {"cards": cards, "round": zero, "betting": zero, "chips": zero, "broke": none,
                "last": {"move": none, "player": none, "won": zero}}  # fmt: skip

    def done(state: Any) -> Array:
        return (state["round"] >= rounds) | (state["broke"] >= 0)

    def step(state: Any, tokens: Array, length: Array) -> Any:
        me, move = player(state), read(tokens, length)
        fine = (move >= 0) & legal(state)[move]
        return jax.tree.map(lambda new, old: jnp.where(fine, new, old), _moved(state, move),
                            state | {"broke": me})  # fmt: skip

    def outcome(state: Any) -> Array:
        won = payoff(state["chips"])
        return w.when_broken(state["broke"], broken, most, jnp.stack([won, -won]))

    return Game(reset, player, _observation(vocabulary, rounds), step, done, outcome, lambda state: state["broke"],
                observation_tokens=2 if rounds == 1 else 6)  # fmt: skip


def player(state: Any) -> Array:
    """Who moves: 0 or 1, int32."""
    plies = jnp.asarray([0, 1, 1, 2])[state["betting"]]
    return ((state["round"] + plies) % 2).astype(jnp.int32)


def card(state: Any, who: Array) -> Array:
    """A player's card in this round, 0 to 2; of the last round when all are over."""
    return state["cards"][jnp.minimum(state["round"], state["cards"].shape[0] - 1), who]


def legal(state: Any) -> Array:
    """Which moves are, [4] bool in the order of MOVES."""
    allowed = np.zeros((4, 4), bool)
    allowed[np.arange(4)[:, None], OPTIONS] = True
    return jnp.asarray(allowed)[state["betting"]]


def _moved(state: Any, move: Array) -> Any:
    """The state after a legal move."""
    me, betting = player(state), state["betting"]
    further = jnp.where(move == BET, jnp.where(betting == 1, 3, 2), 1)
    over = (move >= CALL) | ((move == CHECK) & (betting == 1))
    higher = jnp.sign(card(state, 0) - card(state, 1))
    shown = jnp.where(move == CALL, 2, 1) * higher
    won = jnp.where(over, jnp.where(move == FOLD, 2 * me - 1, shown), 0)
    last = {"move": move, "player": me, "won": won}
    return {
        "cards": state["cards"], "round": state["round"] + over, "betting": jnp.where(over, 0, further),
        "chips": state["chips"] + won, "broke": state["broke"],
        "last": jax.tree.map(lambda new, old: jnp.where(over, new, old).astype(jnp.int32), last, state["last"]),
    }  # fmt: skip


def _observation(vocabulary: Vocabulary, rounds: int) -> Callable[[Any], tuple[Array, Array]]:
    moves, cards = (jnp.asarray(w.symbol_ids(vocabulary, text)) for text in ("".join(MOVES), CARDS))
    signs, digits = (jnp.asarray(w.symbol_ids(vocabulary, text)) for text in ("-+", "12"))

    def observation(state: Any) -> tuple[Array, Array]:
        me, betting, last = player(state), state["betting"], state["last"]
        opening, others = betting < 3, betting > 0  # its first move of the round; the other has moved in it
        now = jnp.stack([moves[jnp.where(betting == 1, CHECK, BET)], cards[card(state, me)]])
        keep = jnp.stack([others, opening])
        if rounds == 1:
            return w.packed(now, keep, vocabulary.pad_id)
        after = opening & (state["round"] > 0)
        won = last["won"] * (1 - 2 * me)
        before = jnp.stack([
            moves[last["move"]], signs[(won > 0).astype(int)], digits[jnp.abs(won) - 1],
            cards[state["cards"][state["round"] - 1, 1 - me]],
        ])  # fmt: skip
        kept = after & jnp.stack([last["player"] != me, jnp.bool_(True), jnp.bool_(True), last["move"] != FOLD])
        return w.packed(jnp.concatenate([before, now]), jnp.concatenate([kept, keep]), vocabulary.pad_id)

    return observation


def plays(policy: np.ndarray, vocabulary: Vocabulary = w.VOCABULARY, *, max_move_tokens: int = 2) -> OpponentFn:
    """An opponent that plays a table, in every round alike; A is `max_move_tokens` of the rollout.

    Args:
      policy: [12,2] probabilities of the timid and the bold move; see kuhn_exact. Rows sum to 1.
    """
    policy = np.asarray(policy, np.float32)
    if policy.shape != (12, 2) or not (policy >= 0).all() or not np.allclose(policy.sum(1), 1.0, atol=1e-5):
        raise Refused("plays.policy must be [12,2] probabilities, each row summing to 1, as of kuhn_exact.equilibrium")
    tokens, lengths = w.spelled(vocabulary, w.words(vocabulary, MOVES), max_move_tokens)

    def move(key: Array, state: Any) -> tuple[Array, Array]:
        row = jnp.asarray(policy)[3 * state["betting"] + card(state, player(state))]
        bold = jax.random.uniform(key) < row[1]
        chosen = jnp.asarray(OPTIONS)[state["betting"], bold.astype(int)]
        return jnp.asarray(tokens)[chosen], jnp.asarray(lengths)[chosen]

    return move


def at_random(vocabulary: Vocabulary = w.VOCABULARY, *, max_move_tokens: int = 2) -> OpponentFn:
    """An opponent whose two legal moves are equally likely."""
    return plays(np.full((12, 2), 0.5), vocabulary, max_move_tokens=max_move_tokens)


def prompts(vocabulary: Vocabulary = w.VOCABULARY, *, text: str = PROMPT, name: str = "kuhn_poker") -> Task:
    """A Task of one prompt that names the game and the cards; `text` may be another in the vocabulary's words."""
    return one_prompt(prompt=text, vocabulary=vocabulary, name=name)


def information_sets(vocabulary: Vocabulary = w.VOCABULARY, *, text: str = PROMPT, max_move_tokens: int = 2) -> Prompts:
    """What a player has before it at each of the 12 information sets of the first round, as rows of a rollout have it.

    The prompt, then what the other did and the card; at "xb" the player's own check stands between. In the order of
    kuhn_exact: row 3 h + card for betting h.

    Args:
      text: of `prompts`.
      max_move_tokens: A of the rollout: if it is 1, moves have no EOS.
    """
    spell = lambda said: w.symbol_ids(vocabulary, said).tolist()  # noqa: E731
    start = list(vocabulary.encode(text))
    end = [vocabulary.eos_ids[0]] if max_move_tokens > 1 else []
    rows = [start + (spell(c + "x") + end + spell("b") if betting == "xb" else spell(betting + c))
            for betting in BETTING for c in CARDS]  # fmt: skip
    width = max(map(len, rows))
    tokens = np.asarray([[vocabulary.pad_id] * (width - len(row)) + row for row in rows], np.int32)
    valid = np.asarray([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    place = np.arange(12, dtype=np.int32)
    return Prompts(jnp.asarray(tokens), jnp.asarray(valid), jnp.zeros(12, jnp.int32), jnp.asarray(place), {})
