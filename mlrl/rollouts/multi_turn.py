"""Rollouts of several turns: the policy writes, an environment answers, and so on, all in the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mlrl import generation
from mlrl import prompts as prompts_lib
from mlrl.environments.contracts import check_environment
from mlrl.environments.nouns import Environment
from mlrl.models.attention import Cache
from mlrl.models.transformer import Transformer, widen_caches
from mlrl.rollouts import turns
from mlrl.sampling import Sampling
from mlrl.scoring import prefill
from mlrl.types import Array, Params, Prompts, Rollout, Vocabulary, require_whole


def multi_turn(
    model: Transformer,
    params: Params,
    prompts: Prompts,
    key: Array,
    *,
    vocabulary: Vocabulary,
    sampling: Sampling,
    group_size: int,
    policy_version: Array | int = 0,
    environment: Environment,
    max_turns: int = 4,
    max_turn_tokens: int = 64,
) -> Rollout:
    """`group_size` episodes of every prompt: turns of up to `max_turn_tokens` tokens, answered by the environment.

    Prompts are read once, keys and values are kept from turn to turn, and an observation is read in one chunk. An
    episode that is over stays silent, and turns end when all are over. Nothing is tokenized again: what is learned from
    is token for token what was sampled. A turn's number is that of its actions and of what was read before them.

    While it is made, a row has as many columns in each turn as the longest turn and observation. When it is made, its
    tokens are moved together: a row is its prompt, its turns without holes, and padding. Only the action mask has
    holes, at the observations. So rows are scored, cut to buckets and packed as those of a single turn are; with one
    turn, and an environment that then ends, they are those of `single_turn`, token for token.

    Args:
      prompts: [N,P]; their examples are given to `environment.reset`.
      key: the randomness of row b at step t of turn k is fold_in(fold_in(key, b), k * max_turn_tokens + t).
      vocabulary, sampling, group_size, policy_version: given by the loop.
      environment: what answers; see mlrl.environments.nouns.
      max_turns: K; an episode that is not over then is truncated.
      max_turn_tokens: T, an EOS included; a turn that fills them is handed to the environment without one.
    Returns: Rollout with B = N * group_size rows and L = P + K * T + (K - 1) * O columns. `earned` has each turn's
      payment at its last token; `facts`: "turns", and "over" (1 where the environment ended the episode). Truncated:
      the episode was cut, or its last turn was, which with turns of one token is always so.
    Raises: Refused, if the environment does not keep its promises, or the rows have no room.
    """
    require_whole("multi_turn", "max_turns", max_turns, 1)
    require_whole("multi_turn", "max_turn_tokens", max_turn_tokens, 1)
    check_environment(environment, prompts, max_turn_tokens)
    observed, steps, pad_id = environment.observation_tokens, max_turn_tokens, vocabulary.pad_id
    width, rows = prompts.tokens.shape[1], jnp.arange(prompts.tokens.shape[0] * group_size)
    more = max_turns * (steps + 1 + observed) - 1 - observed
    turns.check_positions(model, width + more, "multi_turn.max_turns or max_turn_tokens")
    choose = generation.chooser(model, params, key, sampling, tuple(vocabulary.eos_ids))
    setting = Setting(model, params, choose, environment, rows, width, steps, max_turns, pad_id)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, turns.ENVIRONMENT), rows)
    state = jax.vmap(environment.reset)(keys, environment.given(prompts_lib.repeat(prompts, group_size)))
    end = lax.while_loop(
        lambda episodes: (episodes.turn < max_turns) & jnp.any(episodes.live),
        lambda episodes: _continued(setting, episodes),
        _start(setting, prompts, jax.tree.map(jnp.asarray, state), more=more),
    )  # fmt: skip
    columns = turns.packed(end.columns, max_turns * (steps + observed) - observed, pad_id)
    return turns.as_rows(prompts, columns, truncated=end.live | ~end.whole, policy_version=policy_version,
                         facts={"turns": end.turns.astype(jnp.float32), "over": 1.0 - end.live})  # fmt: skip


class Setting(NamedTuple):
    """What stays the same from turn to turn: `choose` from generation.chooser, `rows` [B], P = width, T = steps."""

    model: Transformer
    params: Params
    choose: Callable[..., tuple[Array, Array, Array]]
    environment: Environment
    rows: Array
    width: int
    steps: int
    max_turns: int
    pad_id: int


class Episodes(NamedTuple):
    """Episodes between two turns.

    turn     []     the number of the next turn
    hidden   [B,D]  the states in which its first tokens are chosen
    caches          of M columns: prompts, then a share for every turn
    seen     [B,M]  which of them each row looks at
    lengths  [B]    tokens of each row
    state           the environment's, [B,...]
    live     [B]    episodes that are not over
    whole    [B]    whether the row's last turn ended in an EOS
    turns    [B]    turns that the row has had
    columns         what was written and read
    """

    turn: Array
    hidden: Array
    caches: tuple[Cache, ...]
    seen: Array
    lengths: Array
    state: Any
    live: Array
    whole: Array
    turns: Array
    columns: turns.Columns


def _start(setting: Setting, prompts: Prompts, state: Any, *, more: int) -> Episodes:
    """Before the first turn: prompts are read, and there are `more` empty columns behind each."""
    hidden, caches = prefill(setting.model, setting.params, prompts)
    rows, group_size = setting.rows.size, setting.rows.size // prompts.tokens.shape[0]
    valid, no = jnp.repeat(prompts.valid, group_size, axis=0), jnp.zeros((rows,), bool)
    columns = setting.max_turns * (setting.steps + setting.environment.observation_tokens)
    return Episodes(
        turn=jnp.int32(0), hidden=jnp.repeat(hidden, group_size, axis=0), caches=widen_caches(caches, group_size, more),
        seen=jnp.pad(valid, ((0, 0), (0, more))), lengths=jnp.sum(valid, axis=1, dtype=jnp.int32),
        state=state, live=~no, whole=no, turns=jnp.zeros((rows,), jnp.int32),
        columns=turns.no_columns(rows, columns, setting.pad_id),
    )  # fmt: skip


def _continued(setting: Setting, episodes: Episodes) -> Episodes:
    """After one more turn of every episode that goes on: the policy writes, the environment answers, rows read that."""
    k, steps, observed = episodes.turn, setting.steps, setting.environment.observation_tokens
    column = setting.width + k * (steps + 1 + observed)  # a turn's last token stands again before the observation
    wrote = generation.decode(
        setting.model, setting.params, setting.choose, episodes.hidden, episodes.caches, seen=episodes.seen,
        column=column, lengths=episodes.lengths, rows=setting.rows, first_step=k * steps, steps=steps,
        pad_id=setting.pad_id, silent=~episodes.live,
    )  # fmt: skip
    answer = jax.vmap(setting.environment.step)(episodes.state, wrote.tokens, wrote.lengths)
    state, told, count, reward, done = answer
    live = episodes.live & ~done
    goes_on = live & (k + 1 < setting.max_turns)
    count = jnp.where(goes_on, jnp.clip(count, 0, observed), 0).astype(jnp.int32)
    at = k * (steps + observed)
    columns = turns.put(episodes.columns, at, wrote.tokens, wrote.lengths, turn=k, log_probs=wrote.log_probs,
                        earned=jnp.where(episodes.live, reward, 0.0))  # fmt: skip
    after = episodes._replace(
        turn=k + 1, caches=wrote.caches, state=turns.chosen(episodes.live, state, episodes.state), live=live,
        whole=jnp.where(episodes.live, wrote.ended, episodes.whole), turns=episodes.turns + episodes.live,
        lengths=episodes.lengths + wrote.lengths, columns=turns.put(columns, at + steps, told, count, turn=k + 1),
    )  # fmt: skip
    if setting.max_turns == 1:
        return after
    last = jnp.take_along_axis(wrote.tokens, jnp.maximum(wrote.lengths - 1, 0)[:, None], axis=1)[:, 0]
    mine = jnp.arange(episodes.seen.shape[1])[None] - column
    before = episodes.seen | ((mine >= 0) & (mine < wrote.lengths[:, None] - 1))

    def listened(after: Episodes) -> Episodes:
        hidden, caches, seen = turns.read(setting.model, setting.params, after.caches, last, told, count, seen=before,
                                          lengths=after.lengths, column=column + steps)  # fmt: skip
        return after._replace(hidden=hidden, caches=caches, seen=seen, lengths=after.lengths + count)

    return lax.cond(jnp.any(goes_on), listened, lambda after: after, after)
