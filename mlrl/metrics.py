"""Statistics for evaluation and logs: pass@k, votes, intervals, calibration, explained variance. Host numpy."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from mlrl.types import Refused


class Interval(NamedTuple):
    """An estimate with a confidence interval."""

    mean: float
    low: float
    high: float


def pass_at_k(samples: np.ndarray | int, correct: np.ndarray | int, k: int) -> np.ndarray:
    """Unbiased chance that at least one of k samples is right: 1 - C(n - c, k) / C(n, k).

    Args:
        samples: how many samples a prompt has, n: a number or [N].
        correct: how many of them are right, c: a number or [N].
        k: how many are drawn without replacement.

    Returns:
        [N] float64 (or a scalar), one estimate per prompt; average them.

    Raises:
        Refused: if a prompt has fewer than k samples, or c is not in [0, n].

    Reference: Chen et al. 2021, "Evaluating Large Language Models Trained on Code".
    """
    n, c = np.broadcast_arrays(samples, correct)
    if k < 1 or (n < k).any():
        raise Refused(f"pass@{k} needs at least {max(k, 1)} samples per prompt, found {n.min() if n.size else 0}")
    if (c < 0).any() or (c > n).any():
        raise Refused("pass@k: the number of right samples must lie between 0 and the number of samples")
    draws = np.arange(k)
    wrong = np.maximum(n[..., None] - c[..., None] - draws, 0)
    return 1.0 - np.prod(wrong / (n[..., None] - draws), axis=-1)


def majority_correct(answers: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    """Whether the most frequent answer is right (maj@n), for one prompt.

    Args:
        answers: one per sample; None (no answer found) never votes.
        correct: whether each sample is right.

    Returns:
        1.0 or 0.0; with tied answers, the chance of picking a right one of them; 0.0 if nobody votes. Where equal
        answers were judged differently, an answer counts as right by the share of its samples that are.
    """
    votes: dict[Hashable, list[bool]] = {}
    for answer, right in zip(answers, correct, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(bool(right))
    if not votes:
        return 0.0
    most = max(len(v) for v in votes.values())
    return float(np.mean([np.mean(v) for v in votes.values() if len(v) == most]))


def majority_at_k(answers: Sequence[Hashable | None], correct: Sequence[bool], *, k: int) -> float:
    """maj@k of one prompt: `majority_correct` averaged over its consecutive blocks of k samples.

    Args:
        answers: at least k, one per sample; samples beyond the last whole block are not used.
        correct: whether each sample is right.
        k: votes per election.

    Returns:
        in [0, 1].

    Raises:
        Refused: if there are fewer than k samples.
    """
    if k < 1 or len(answers) < k:
        raise Refused(f"maj@{k} needs at least {max(k, 1)} samples per prompt, found {len(answers)}")
    blocks = range(0, len(answers) - k + 1, k)
    return float(np.mean([majority_correct(answers[i : i + k], correct[i : i + k]) for i in blocks]))


# Intervals.


def wilson_interval(successes: float, trials: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a proportion of independent yes-or-no trials; sound near 0 and 1.

    Args:
        successes: in [0, trials].
        trials: at least 1.
        confidence: in (0, 1).

    Returns:
        Interval whose mean is successes / trials.

    Raises:
        Refused: if there are no trials.
    """
    if trials < 1:
        raise Refused("an interval needs at least one trial, found 0")
    z = float(special.ndtri(0.5 + confidence / 2))
    p = successes / trials
    middle = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * np.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return Interval(float(p), float(max(0.0, middle - half)), float(min(1.0, middle + half)))


def t_interval(samples: Sequence[float] | np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Student's interval for the mean of a few independent runs (seeds), ddof 1.

    Args:
        samples: [n], one number per run.
        confidence: in (0, 1).

    Returns:
        Interval; infinitely wide for a single run.

    Raises:
        Refused: if there are none.
    """
    x = np.asarray(samples, np.float64)
    if x.size == 0:
        raise Refused("an interval needs at least one sample, found 0")
    if x.size == 1:
        return Interval(float(x[0]), -np.inf, np.inf)
    quantile = float(special.stdtrit(x.size - 1, 0.5 + confidence / 2))
    half = quantile * x.std(ddof=1) / np.sqrt(x.size)
    return Interval(float(x.mean()), float(x.mean() - half), float(x.mean() + half))


def bootstrap_interval(
    samples: np.ndarray,
    *,
    statistic: Callable[..., np.ndarray] = np.mean,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over prompts: resample the first axis, so that a prompt's samples stay together.

    Args:
        samples: [N,...]; for pass@k the per-prompt estimates.
        statistic: called as statistic(resampled, axis=0), must reduce that axis; what is left is averaged.
        confidence: in (0, 1).
        resamples: how many.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        Interval whose mean is the statistic of the sample itself.

    Raises:
        Refused: if there are none.
    """
    x = np.asarray(samples, np.float64)
    if x.shape[0] == 0:
        raise Refused("an interval needs at least one sample, found 0")
    rng = np.random.default_rng(seed)
    draws = [np.mean(statistic(x[rng.integers(0, len(x), len(x))], axis=0)) for _ in range(resamples)]
    low, high = np.quantile(draws, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(np.mean(statistic(x, axis=0))), float(low), float(high))


# Values and probabilities.


def explained_variance(predictions: np.ndarray, targets: np.ndarray, mask: np.ndarray) -> float:
    """1 - Var(target - prediction) / Var(target) inside the mask: 1 is perfect, 0 no better than a constant.

    Args:
        predictions: any shape.
        targets: same.
        mask: same, bool.

    Returns:
        float; NaN where the targets do not vary, for there is nothing to explain.
    """
    keep = np.asarray(mask, bool)
    target = np.asarray(targets, np.float64)[keep]
    if target.size == 0 or target.var() == 0:
        return float("nan")
    return float(1.0 - (target - np.asarray(predictions, np.float64)[keep]).var() / target.var())


def brier(probabilities: np.ndarray, correct: np.ndarray) -> float:
    """Mean squared distance of a stated probability from what happened: mean (p - y)^2, [n], [n] -> float."""
    return float(np.mean(np.square(np.asarray(probabilities, np.float64) - np.asarray(correct, np.float64))))


def expected_calibration_error(probabilities: np.ndarray, correct: np.ndarray, *, bins: int = 10) -> float:
    """How far stated probabilities lie from frequencies: sum_b (n_b / n) |mean y - mean p|, bins of equal mass.

    Args:
        probabilities: [n] in [0, 1].
        correct: [n] bool.
        bins: at most n are used.

    Returns:
        float in [0, 1].

    Reference: Kadavath et al. 2022, "Language Models (Mostly) Know What They Know", for bins of equal mass.
    """
    p, y = np.asarray(probabilities, np.float64), np.asarray(correct, np.float64)
    order = np.argsort(p, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    return float(sum(len(i) * abs(y[i].mean() - p[i].mean()) for i in parts) / len(order))


def auroc(scores: np.ndarray, correct: np.ndarray) -> float:
    """Chance that a right sample scores above a wrong one, ties 1/2: [n], [n] -> float; NaN without both kinds."""
    s, y = np.asarray(scores, np.float64), np.asarray(correct, bool)
    right, wrong = s[y], np.sort(s[~y])
    if right.size == 0 or wrong.size == 0:
        return float("nan")
    below = np.searchsorted(wrong, right, side="left") + np.searchsorted(wrong, right, side="right")
    return float(below.mean() / (2 * wrong.size))
