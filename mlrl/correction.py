"""How a second attempt changes a first one: accuracies, flips, confidence and critique, with intervals. Host numpy."""

from __future__ import annotations

import math

import numpy as np

from mlrl.types import Refused

NAMES = ("accuracy@t1", "accuracy@t2", "delta", "i->c", "c->i", "CL", "CS", "RSS", "solved")


def shares(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of each question's K pairs, how many are right at first, right twice, and right only at second.

        a = P(c1),  a b = P(c1 and c2),  (1 - a) d = P(not c1 and c2),   b = P(c2 | c1),  d = P(c2 | not c1)

    Args:
        first: [N,K] bool, whether the first attempts are right.
        second: [N,K] bool, the second attempt that followed each.

    Returns:
        [N,3] float64: a, a b and (1 - a) d, as means over the question's pairs.

    Raises:
        Refused: if there is no pair, or the shapes differ.
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    if first.ndim != 2 or first.shape != second.shape or not first.size:
        raise Refused(f"correction needs pairs as two arrays [N,K], got {list(first.shape)} and {list(second.shape)}")
    return np.stack([x.mean(axis=1) for x in (first, first & second, ~first & second)], axis=1)


def measures(means: np.ndarray) -> dict[str, np.ndarray]:
    """Every measure of `NAMES` from the means of `shares` over questions.

        accuracy@t1  Acc1 = mean a                        accuracy@t2  Acc2 = mean (a b + (1 - a) d)
        delta        Acc2 - Acc1 = (i->c) - (c->i)        solved       Acc1 + (i->c): right in one of two attempts
        i->c         mean (1 - a) d, over all pairs       c->i         mean a (1 - b), over all pairs
        CL           confidence level, sum a b / sum a    CS           critique score, sum (1 - a) d / sum (1 - a)
        RSS          (Acc2 - Acc1^2) / (2 Acc1 (1 - Acc1))

    Acc2 = Acc1 CL + (1 - Acc1) CS. The relative self-correction score is 1/2 for a second attempt that is a fresh
    sample, if questions are equally hard; 1 and 0 are not its bounds. CL is not defined at Acc1 = 0, CS at 1, RSS at
    both: NaN.

    Args:
        means: [...,3], the mean of `shares` over questions, or over several draws of them.

    Returns:
        {name: [...] float64}.

    Reference: Kumar et al. 2024, "Training Language Models to Self-Correct via Reinforcement Learning" (flips); Yang et
    al. 2024, "Confidence v.s. Critique: A Decomposition of Self-Correction Capability for LLMs" (CL, CS, RSS). Left
    out: the exact form for multiple choice.
    """
    right, kept, gained = np.moveaxis(np.asarray(means, np.float64), -1, 0)
    after = kept + gained
    with np.errstate(divide="ignore", invalid="ignore"):
        some_right, some_wrong = right > 0, right < 1
        level = np.where(some_right, kept / right, np.nan)
        score = np.where(some_wrong, gained / (1 - right), np.nan)
        relative = np.where(some_right & some_wrong, (after - right**2) / (2 * right * (1 - right)), np.nan)
    found = (right, after, after - right, gained, right - kept, level, score, relative, right + gained)
    return dict(zip(NAMES, found, strict=True))


def statistics(
    first: np.ndarray, second: np.ndarray, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> dict[str, dict[str, float]]:
    """The measures of pairs of attempts, each with a percentile bootstrap interval over questions.

    A question's pairs stay together. Draws of questions in which a measure is not defined are left out of its interval.

    Args:
        first: [N,K] bool, as in `shares`.
        second: same.
        resamples: how many draws of N questions.
        confidence: in (0, 1).
        seed: of the draws; the same seed gives the same interval.

    Returns:
        {name: {"value", "low", "high", "prompts"}}, NaN where not defined.
    """
    by_question = shares(first, second)
    n = len(by_question)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples) @ by_question / n
    value, drawn = measures(by_question.mean(axis=0)), measures(draws)
    tails = [0.5 - confidence / 2, 0.5 + confidence / 2]
    found = {}
    for name in NAMES:
        known = drawn[name][~np.isnan(drawn[name])]
        low, high = np.quantile(known, tails) if known.size else (math.nan, math.nan)
        found[name] = {"value": float(value[name]), "low": float(low), "high": float(high), "prompts": n}
    return found
