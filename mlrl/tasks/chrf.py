"""chrF, the F-score of character n-grams, as a judge of text: plain Python, importable without jax."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any


def chrf(completion: str, example: Mapping[str, Any], *, max_order: int = 6, beta: float = 2.0) -> float:
    """How close a translation comes to example["answer"], 0 to 1; white space does not count.

        P = mean over n of matches_n / n-grams of the completion,  R = mean over n of matches_n / n-grams of the answer,
        F = (1 + beta^2) P R / (beta^2 P + R)

    for n = 1 .. max_order. An n that both are too short for is left out; if one is, it counts 0.

    Reference: Popovic 2015, "chrF: character n-gram F-score for automatic MT evaluation".
    """
    said, wanted = ("".join(text.split()) for text in (completion, str(example["answer"])))
    shares = []
    for n in range(1, max_order + 1):
        mine, theirs = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (said, wanted))
        if mine or theirs:
            matches = (mine & theirs).total()
            shares.append((matches / max(mine.total(), 1), matches / max(theirs.total(), 1)))
    if not any(p for p, _ in shares):
        return 0.0
    precision, recall = (sum(x) / len(shares) for x in zip(*shares))
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)
