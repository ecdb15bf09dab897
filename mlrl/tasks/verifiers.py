"""Verifiers as array functions: (rollout, prompts repeated to B rows) -> [B], 1.0 where right, or how close it is."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlrl.types import Array, Prompts, Rollout

_MINUS, _TIMES = 11, 12  # positions in example["symbols"]: the digits, then plus, minus, times
_TOO_LARGE = 10**8


def arithmetic_verifier(rollout: Rollout, prompts: Prompts) -> Array:
    """1.0 iff what the policy wrote is exactly the answer, ended by an EOS; else 0.0.

    Reads example["answer_tokens"] and example["answer_valid"] [B,T], the answer without EOS.
    """
    written, count = _written(rollout)
    rank = jnp.cumsum(written, axis=1) - 1
    return _float(~rollout.truncated & (count == _answer_length(prompts)) & _agrees(rollout, prompts, written, rank))


def final_answer_verifier(rollout: Rollout, prompts: Prompts) -> Array:
    """1.0 iff what the policy wrote behind its last separator is exactly the answer, ended by an EOS; else 0.0.

    Reads example["separator"] [B] too; without a separator all that was written must be the answer.
    """
    written, count = _written(rollout)
    length = _answer_length(prompts)
    rank = jnp.cumsum(written, axis=1) - 1 - (count - length)[:, None]
    before = written & (rank == -1)
    separated = jnp.any(before & (rollout.tokens == prompts.example["separator"][:, None]), axis=1)
    right = _agrees(rollout, prompts, written & (rank >= 0), rank) & ((count == length) | separated)
    return _float(~rollout.truncated & (count >= length) & right)


def countdown_verifier(rollout: Rollout, prompts: Prompts) -> Array:
    """1.0 iff the policy wrote an expression over the given numbers that has the target's value, then an EOS; else 0.0.

    An expression is number (operation number)*, without leading zeros; each given number is used at most once, or
    exactly once where example["use_all"]. Reads example["numbers"] [B,K] (0: none), ["target"] [B], ["use_all"] [B]
    and ["symbols"] [B,13] (token ids of 0-9, plus, minus, times; -1: not allowed).
    """
    written, _ = _written(rollout)
    numbers, target = prompts.example["numbers"], prompts.example["target"]
    rows = target.shape[0]
    match = rollout.tokens[:, :, None] == prompts.example["symbols"][:, None, :]
    symbol = jnp.where(match.any(axis=2), jnp.argmax(match, axis=2), -1)

    def close(state: dict[str, Array]) -> dict[str, Array]:
        """Takes the number that was read into the expression."""
        fits = (numbers == state["number"][:, None]) & (numbers > 0) & ~state["used"]
        first = fits & (jnp.cumsum(fits, axis=1) == 1)
        value, times = state["number"], state["operation"] == _TIMES
        signed = jnp.where(state["operation"] == _MINUS, -value, value)
        return state | {
            "ok": state["ok"] & state["reading"] & fits.any(axis=1),
            "used": state["used"] | first,
            "total": jnp.where(times, state["total"], state["total"] + state["term"]),
            "term": jnp.where(times, state["term"] * value, signed),
            "number": jnp.zeros_like(value),
            "reading": jnp.zeros_like(times),
        }

    def read(state: dict[str, Array], column: tuple[Array, Array]) -> tuple[dict[str, Array], None]:
        here, code = column
        leading_zero = state["reading"] & (state["number"] == 0)
        digit = state | {
            "ok": state["ok"] & ~leading_zero,
            "number": jnp.minimum(state["number"] * 10 + code, _TOO_LARGE),
            "reading": jnp.ones_like(here),
        }
        operation = close(state) | {"operation": code}
        other = state | {"ok": jnp.zeros_like(here)}

        def pick(kept: Array, d: Array, o: Array, wrong: Array) -> Array:
            cast = lambda condition: condition.reshape((-1,) + (1,) * (kept.ndim - 1))  # noqa: E731
            new = jnp.where(cast(code < 0), wrong, jnp.where(cast(code < 10), d, o))
            return jnp.where(cast(here), new, kept)

        return jax.tree.map(pick, state, digit, operation, other), None

    zero = jnp.zeros((rows,), jnp.int32)
    false = jnp.zeros((rows,), bool)
    start = {"ok": ~false, "used": jnp.zeros(numbers.shape, bool), "total": zero, "term": zero, "number": zero,
             "reading": false, "operation": zero}  # fmt: skip
    end, _ = jax.lax.scan(read, start, (written.T, symbol.T.astype(jnp.int32)))
    end = close(end)
    complete = ~prompts.example["use_all"] | jnp.all(end["used"] | (numbers <= 0), axis=1)
    return _float(end["ok"] & complete & (end["total"] + end["term"] == target) & ~rollout.truncated)


def ngram_f_verifier(rollout: Rollout, prompts: Prompts, *, max_order: int = 6, beta: float = 2.0) -> Array:
    """How close what the policy wrote comes to the answer, 0 to 1: `ngram_f` of its tokens but for the final EOS. [B].

    Reads example["answer_tokens"] and example["answer_valid"] [B,T], the answer without EOS.
    """
    written, _ = _written(rollout)
    written |= rollout.truncated[:, None] & rollout.action_mask
    order = jnp.argsort(~written, axis=1, stable=True)
    tokens, valid = (jnp.take_along_axis(x, order, axis=1) for x in (jnp.asarray(rollout.tokens), written))
    answer = (jnp.asarray(prompts.example[name]) for name in ("answer_tokens", "answer_valid"))
    return ngram_f(tokens, valid, *answer, max_order=max_order, beta=beta)


def ngram_f(tokens: Array, valid: Array, answer: Array, answer_valid: Array, *, max_order: int = 6,
            beta: float = 2.0) -> Array:  # fmt: skip
    """The F-score of n-grams of tokens, as chrF has it of characters.

        P = mean over n of matches_n / n-grams of the row,  R = mean over n of matches_n / n-grams of the answer,
        F = (1 + beta^2) P R / (beta^2 P + R)

    for n = 1 .. max_order. An n-gram matches as often as it is in both. An n that both are too short for is left out;
    if one is, it counts 0.

    Tokens are compared in pairs, which takes [B,T,T] and [B,T,A] booleans: it is for short rows.

    Args:
      tokens, valid: [B,T], packed to the left.
      answer, answer_valid: [B,A], packed to the left.
    Returns: [B] float32 in [0,1].
    Reference: Popovic 2015, "chrF: character n-gram F-score"; there beta is 2 and max_order 6. `chrf.chrf` is that.
    """
    same, among = tokens[:, :, None] == answer[:, None, :], tokens[:, :, None] == tokens[:, None, :]
    earlier = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
    shifted = lambda x, axes, n: jnp.pad(  # noqa: E731
        x[(slice(None), *(slice(n, None) if axis in axes else slice(None) for axis in range(1, x.ndim)))],
        [(0, 0), *((0, min(n, x.shape[axis])) if axis in axes else (0, 0) for axis in range(1, x.ndim))],
    )  # fmt: skip
    precision, recall, orders = (jnp.zeros(tokens.shape[0]) for _ in range(3))
    alike, like_itself = jnp.ones_like(same), jnp.ones_like(among)
    for n in range(max_order):
        here, there = shifted(valid, (1,), n), shifted(answer_valid, (1,), n)
        alike &= shifted(same, (1, 2), n)
        like_itself &= shifted(among, (1, 2), n)
        rank = jnp.sum(like_itself & earlier & here[:, None, :], axis=2)
        matches = jnp.sum(here & (rank <= jnp.sum(alike & there[:, None, :], axis=2)), axis=1)
        mine, theirs = jnp.sum(here, axis=1), jnp.sum(there, axis=1)
        precision += matches / jnp.maximum(mine, 1)
        recall += matches / jnp.maximum(theirs, 1)
        orders += (mine > 0) | (theirs > 0)
    precision, recall = (x / jnp.maximum(orders, 1) for x in (precision, recall))
    return (1 + beta**2) * precision * recall / jnp.maximum(beta**2 * precision + recall, 1e-30)


def _written(rollout: Rollout) -> tuple[Array, Array]:
    """(actions but for the final EOS [B,L], how many [B]); of a truncated row, which has no EOS, all but the last."""
    mask = jnp.asarray(rollout.action_mask)
    order = jnp.cumsum(mask, axis=1)
    written = mask & (order < order[:, -1:])
    return written, written.sum(axis=1)


def _answer_length(prompts: Prompts) -> Array:
    return jnp.sum(prompts.example["answer_valid"], axis=1)


def _agrees(rollout: Rollout, prompts: Prompts, where: Array, rank: Array) -> Array:
    """[B] whether the tokens in `where` are those of the answer at position `rank`."""
    answer = jnp.asarray(prompts.example["answer_tokens"])
    wanted = jnp.take_along_axis(answer, jnp.clip(rank, 0, answer.shape[1] - 1), axis=1)
    return jnp.all(~where | (rollout.tokens == wanted), axis=1)


def _float(x: Array) -> Array:
    return x.astype(jnp.float32)
