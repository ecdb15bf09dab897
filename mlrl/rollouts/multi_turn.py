"""Rollouts of several turns: the policy writes, an environment answers, and so on, all in the graph."""

from __future__ import annotations

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
    given = environment.given(prompts_lib.repeat(prompts, group_size))
    observed, steps, pad_id = environment.observation_tokens, max_turn_tokens, vocabulary.pad_id
    share = steps + 1 + observed  # of a turn in the cache, where its last token stands before the observation
    (n, width), more = prompts.tokens.shape, max_turns * share - 1 - observed
    turns.check_positions(model, width + more, "multi_turn.max_turns or max_turn_tokens")
    rows = jnp.arange(n * group_size)
    choose = generation.chooser(model, params, key, sampling, tuple(vocabulary.eos_ids))
    step = jax.vmap(environment.step)

    def turn(carry: Episodes) -> Episodes:
        k, column = carry.turn, width + carry.turn * share
        wrote = generation.decode(
            model, params, choose, carry.hidden, carry.caches, seen=carry.seen, column=column, lengths=carry.lengths,
            rows=rows, first_step=k * steps, steps=steps, pad_id=pad_id, silent=~carry.live,
        )  # fmt: skip
        state, told, count, reward, done = step(carry.state, wrote.tokens, wrote.lengths)
        live = carry.live & ~done
        goes_on = live & (k + 1 < max_turns)
        count = jnp.where(goes_on, jnp.clip(count, 0, observed), 0).astype(jnp.int32)
        at = k * (steps + observed)
        columns = turns.put(carry.columns, at, wrote.tokens, wrote.lengths, turn=k, log_probs=wrote.log_probs,
                            earned=jnp.where(carry.live, reward, 0.0))  # fmt: skip
        columns = turns.put(columns, at + steps, told, count, turn=k + 1)
        carry = carry._replace(
            turn=k + 1, caches=wrote.caches, state=turns.chosen(carry.live, state, carry.state), live=live,
            whole=jnp.where(carry.live, wrote.ended, carry.whole), turns=carry.turns + carry.live,
            lengths=carry.lengths + wrote.lengths, columns=columns,
        )  # fmt: skip
        last = jnp.take_along_axis(wrote.tokens, jnp.maximum(wrote.lengths - 1, 0)[:, None], axis=1)[:, 0]
        mine = jnp.arange(width + more)[None] - column
        before = carry.seen | ((mine >= 0) & (mine < wrote.lengths[:, None] - 1))

        def listen(carry: Episodes) -> Episodes:
            hidden, caches, seen = turns.read(model, params, carry.caches, last, told, count, seen=before,
                                              lengths=carry.lengths, column=column + steps)  # fmt: skip
            return carry._replace(hidden=hidden, caches=caches, seen=seen, lengths=carry.lengths + count)

        return carry if max_turns == 1 else lax.cond(jnp.any(goes_on), listen, lambda carry: carry, carry)

    hidden, caches = prefill(model, params, prompts)
    each = lambda x: jnp.repeat(x, group_size, axis=0)  # noqa: E731
    environment_keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, turns.ENVIRONMENT), rows)
    no = jnp.zeros(rows.shape, bool)
    start = Episodes(
        turn=jnp.int32(0), hidden=each(hidden), caches=widen_caches(caches, group_size, more),
        seen=jnp.pad(each(prompts.valid), ((0, 0), (0, more))),
        lengths=jnp.sum(each(prompts.valid), axis=1, dtype=jnp.int32),
        state=jax.tree.map(jnp.asarray, jax.vmap(environment.reset)(environment_keys, given)), live=~no, whole=no,
        turns=jnp.zeros(rows.shape, jnp.int32),
        columns=turns.no_columns(rows.size, max_turns * (steps + observed), pad_id),
    )  # fmt: skip
    end = lax.while_loop(lambda carry: (carry.turn < max_turns) & jnp.any(carry.live), turn, start)
    columns = turns.packed(end.columns, max_turns * (steps + observed) - observed, pad_id)
    return turns.as_rows(prompts, columns, truncated=end.live | ~end.whole, policy_version=policy_version,
                         facts={"turns": end.turns.astype(jnp.float32), "over": 1.0 - end.live})  # fmt: skip


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
