"""Self-play: games of two in which the policy is both players, or one of them, all in the graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mlrl import generation
from mlrl.environments.contracts import check_game, check_moves
from mlrl.environments.nouns import Game, OpponentFn, itself
from mlrl.models.attention import Cache
from mlrl.models.transformer import Transformer, widen_caches
from mlrl.rollouts import turns
from mlrl.sampling import Sampling
from mlrl.scoring import prefill
from mlrl.types import Array, Params, Prompts, Refused, Rollout, Vocabulary, require_whole


def self_play(
    model: Transformer,
    params: Params,
    prompts: Prompts,
    key: Array,
    *,
    vocabulary: Vocabulary,
    sampling: Sampling,
    group_size: int,
    policy_version: Array | int = 0,
    game: Game,
    max_moves: int = 8,
    max_move_tokens: int = 8,
    max_moves_each: int = 0,
    opponent: OpponentFn = itself,
) -> Rollout:
    """`group_size` / 2 games for every prompt, and two rows of each: what either player saw and wrote.

    Row 2 e + p is player p's view of game e: the prompt, an observation, a move, an observation, a move, ... The other
    player's tokens are in it only as far as observations repeat them. Both rows are learned from; `role` is p. A group
    of one, as evaluations and judges sample, is one view of a game of its own: of player 0 in even rows, of player 1 in
    odd ones.

    The two views of a game share one cache, since each move is read and written by one of them: its columns belong to
    the mover, and the other does not look at them. So only movers decode, whoever they are, and the prompt is kept once
    for both.

    Args:
      prompts: [N,P], what both players read first.
      key: the randomness of row b at step t of move m is fold_in(fold_in(key, b), m * max_move_tokens + t).
      vocabulary, sampling, group_size, policy_version: given by the loop.
      game: see mlrl.environments.nouns.
      max_moves: M, of both together; a game that is not over then pays nobody, and both rows are truncated.
      max_move_tokens: A, an EOS included; a move that fills them is handed to the game without one.
      max_moves_each: H, the most of one player; 0: half of M, rounded up, for games in which players take turns. A game
        in which it is the turn of a player without moves left is cut.
      opponent: itself (both are the policy), or a fixed player's moves. A fixed one is player 1 in even games and
        player 0 in odd ones. Its rows have an empty action mask: they are unscored by `graph.from_environment`.
    Returns: Rollout with B = N * group_size rows and L = P + H * (O + A) columns. `earned` has each player's outcome at
      the last token of the last own move. `facts`: "moves" of the row's player, "invalid" (1 where a move of the row's
      player broke the rules), "won" (1 where the outcome is above 0).
    Raises: Refused, if the game or the opponent does not keep its promises, or the group is odd.
    Reference: Liu et al. 2025, SPIRAL. Left out: drawing turns instead of whole games for a batch.
    """
    for name, value, lowest in (("max_moves", max_moves, 1), ("max_move_tokens", max_move_tokens, 1),
                                ("max_moves_each", max_moves_each, 0)):  # fmt: skip
        require_whole("self_play", name, value, lowest)
    if group_size > 1 and group_size % 2:
        raise Refused(f"self_play makes two rows of every game, but group_size is {group_size}: set it to an even "
                      "number")  # fmt: skip
    check_game(game, max_move_tokens)
    fixed = inspect.unwrap(opponent) is not itself
    if fixed:
        check_moves(opponent, game, max_move_tokens)
    observed, steps, each = game.observation_tokens, max_move_tokens, max_moves_each or -(-max_moves // 2)
    (n, width), per_prompt = prompts.tokens.shape, max(1, group_size // 2)
    share = 1 + observed + steps  # of a move in the cache
    turns.check_positions(model, width + max_moves * share, "self_play.max_moves or max_move_tokens")
    number = jnp.arange(n * per_prompt)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, turns.ENVIRONMENT), number)
    choose = generation.chooser(model, params, key, sampling, tuple(vocabulary.eos_ids))
    rules = Rules(
        model, params, choose, game, opponent, keys,
        rows=2 * number[:, None] + jnp.arange(2) if group_size > 1 else jnp.stack([number, number], axis=1),
        seat=(number + 1) % 2 if fixed else jnp.full_like(number, -1), width=width, observed=observed, steps=steps,
        each=each, pad_id=vocabulary.pad_id,
    )  # fmt: skip
    start = _start(rules, prompts, per_prompt=per_prompt, max_moves=max_moves)
    end = lax.while_loop(
        lambda games: (games.move < max_moves) & jnp.any(games.live), lambda games: _moved(rules, games, fixed), start)
    rows = _views(rules, end, max_moves)
    if group_size == 1:
        rows = jax.tree.map(lambda x: x[jnp.arange(n) * 2 + jnp.arange(n) % 2], rows)
    columns, role, truncated, facts = rows
    return turns.as_rows(prompts, columns, role=role, truncated=truncated, policy_version=policy_version, facts=facts)


class Rules(NamedTuple):
    """What stays the same from move to move, of E games.

    choose    from generation.chooser
    keys      [E]    of the games
    rows      [E,2]  which rows the players' views are
    seat      [E]    which player is a fixed opponent, -1: none
    width     P      columns of a prompt
    observed  O      steps  A      each  H
    """

    model: Transformer
    params: Params
    choose: Callable[..., tuple[Array, Array, Array]]
    game: Game
    opponent: OpponentFn
    keys: Array
    rows: Array
    seat: Array
    width: int
    observed: int
    steps: int
    each: int
    pad_id: int


class Games(NamedTuple):
    """E games between two moves.

    move     []       the number of the next
    caches            of M columns: prompts, then a share for every move
    state             the game's, [E,...]
    live     [E]      games that go on
    last     [E,2]    each player's last token, of the prompt or of a move
    seen     [E,2,M]  which columns each looks at: those of its tokens but the last
    lengths  [E,2]    tokens of each player's row
    moves    [E,2]    own moves
    mover    [E,K]    who moved, by move
    columns           what was read and written, by move
    """

    move: Array
    caches: tuple[Cache, ...]
    state: Any
    live: Array
    last: Array
    seen: Array
    lengths: Array
    moves: Array
    mover: Array
    columns: turns.Columns


def _start(rules: Rules, prompts: Prompts, *, per_prompt: int, max_moves: int) -> Games:
    """Before the first move: both players have read the prompt, but for its last token."""
    _, caches = prefill(rules.model, rules.params, prompts)
    state = jax.tree.map(jnp.asarray, jax.vmap(rules.game.reset)(rules.keys))
    valid, tokens = (jnp.repeat(x, per_prompt, axis=0) for x in (prompts.valid, prompts.tokens))
    both = lambda x: jnp.stack([x, x], axis=1)  # noqa: E731
    games, columns = tokens.shape[0], rules.observed + rules.steps
    more = max_moves * (1 + columns)
    return Games(
        move=jnp.int32(0), caches=widen_caches(caches, per_prompt, more), state=state,
        live=~jax.vmap(rules.game.done)(state), last=both(tokens[:, -1]),
        seen=both(jnp.pad(valid.at[:, -1].set(False), ((0, 0), (0, more)))),
        lengths=both(jnp.sum(valid, axis=1, dtype=jnp.int32)), moves=jnp.zeros((games, 2), jnp.int32),
        mover=jnp.full((games, max_moves), -1, jnp.int32),
        columns=turns.no_columns(games, max_moves * columns, rules.pad_id),
    )  # fmt: skip


def _moved(rules: Rules, games: Games, fixed: bool) -> Games:
    """After one more move of every game that goes on: the mover is told what is new, and writes."""
    game, observed, steps, m = rules.game, rules.observed, rules.steps, games.move
    mover = jnp.clip(jax.vmap(game.player)(games.state), 0, 1)
    of = lambda x: jnp.take_along_axis(x, mover.reshape(-1, *[1] * (x.ndim - 1)), axis=1)[:, 0]  # noqa: E731
    live = games.live & (of(games.moves) < rules.each)
    acts = live & (mover != rules.seat)
    told, count = jax.vmap(game.observation)(games.state)
    count = jnp.where(live, jnp.clip(count, 0, observed), 0).astype(jnp.int32)
    column = rules.width + m * (1 + observed + steps)
    hidden, caches, seen = turns.read(
        rules.model, rules.params, games.caches, of(games.last), told, count, seen=of(games.seen),
        lengths=of(games.lengths), column=column,
    )  # fmt: skip
    before, column = of(games.lengths) + count, column + 1 + observed
    wrote = generation.decode(
        rules.model, rules.params, rules.choose, hidden, caches, seen=seen, column=column, lengths=before,
        rows=of(rules.rows), first_step=m * steps, steps=steps, pad_id=rules.pad_id, silent=~acts,
    )  # fmt: skip
    tokens, written = _with_opponent(rules, games, live & ~acts, wrote) if fixed else (wrote.tokens, wrote.lengths)
    state = turns.chosen(live, jax.vmap(game.step)(games.state, tokens, written), games.state)
    at, turn = m * (observed + steps), of(games.moves)
    columns = turns.put(games.columns, at, told, count, turn=turn)
    columns = turns.put(columns, at + observed, tokens, written, turn=turn, log_probs=wrote.log_probs, acted=acts)
    last = jnp.take_along_axis(tokens, jnp.maximum(written - 1, 0)[:, None], axis=1)[:, 0]
    mine = jnp.arange(seen.shape[1])[None] - column
    seen |= (mine >= 0) & (mine < written[:, None] - 1)
    moving = (jnp.arange(2)[None] == mover[:, None]) & live[:, None]
    speaking = moving & (written > 0)[:, None]  # a fixed opponent may say nothing; nobody reads its row
    return Games(
        move=m + 1, caches=wrote.caches, state=state, live=live & ~jax.vmap(game.done)(state),
        last=jnp.where(speaking, last[:, None], games.last),
        seen=jnp.where(speaking[:, :, None], seen[:, None], games.seen),
        lengths=jnp.where(speaking, (before + written)[:, None], games.lengths), moves=games.moves + moving,
        mover=lax.dynamic_update_slice(games.mover, mover[:, None].astype(jnp.int32), (0, m)), columns=columns,
    )  # fmt: skip


def _with_opponent(rules: Rules, games: Games, theirs: Array, wrote: generation.Written) -> tuple[Array, Array]:
    """(tokens [E,A], lengths [E]) of all movers, a fixed opponent's where the move is `theirs` [E]."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 1 + games.move))(rules.keys)
    tokens, lengths = jax.vmap(rules.opponent)(keys, games.state)
    lengths = jnp.where(theirs, jnp.clip(lengths, 0, rules.steps), wrote.lengths).astype(jnp.int32)
    return jnp.where(theirs[:, None], tokens, wrote.tokens), lengths


def _views(rules: Rules, end: Games, max_moves: int) -> tuple[turns.Columns, Array, Array, dict[str, Array]]:
    """(columns [2 E, H * (O + A)], role, truncated, facts) of both players' rows of every game, player 0 first."""
    games, total = end.columns.tokens.shape
    player = jnp.tile(jnp.arange(2), games)
    double = lambda x: jnp.repeat(x, 2, axis=0)  # noqa: E731
    columns = turns.Columns(*map(double, end.columns))
    mine = jnp.repeat(double(end.mover) == player[:, None], total // max_moves, axis=1)
    action = columns.action_mask & mine
    over = jax.vmap(rules.game.done)(end.state)
    outcome = jnp.where(over[:, None], jax.vmap(rules.game.outcome)(end.state), 0.0).reshape(-1)
    place = jnp.max(jnp.where(action, jnp.arange(total), -1), axis=1)
    columns = columns._replace(
        valid=columns.valid & mine, action_mask=action,
        earned=jnp.where(jnp.arange(total)[None] == place[:, None], outcome[:, None], 0.0),
    )  # fmt: skip
    broke = double(jnp.where(over, jax.vmap(rules.game.invalid)(end.state), -1)) == player
    number = lambda x: x.astype(jnp.float32)  # noqa: E731
    facts = {"moves": number(end.moves.reshape(-1)), "invalid": number(broke), "won": number(outcome > 0)}
    width = rules.each * (rules.observed + rules.steps)
    return turns.packed(columns, width, rules.pad_id), player, double(~over), facts
