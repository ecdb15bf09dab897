"""What is measured, in numbers that every side reads: models, rows, and how rows end. Imports nothing.

How rows end is in the weights, so that every library samples the same distribution by its own sampler: all embeddings
share a direction, which the final norm keeps, and the embedding of the end-of-sequence token has more (or less) of it.
The end-of-sequence logit then stands above the others by about the same in every state. See benchmarks.weights.
"""

from __future__ import annotations

from typing import NamedTuple

PAD, EOS, FIRST = 0, 1, 2  # ids; prompts are of tokens from FIRST on


class Model(NamedTuple):
    """A Llama with a tied head."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    vocabulary: int = 128
    theta: float = 10_000.0
    eps: float = 1e-6


class Rows(NamedTuple):
    """The rows of a step, and the probability that a token ends its row."""

    prompts: int
    group: int
    prompt_tokens: int
    new_tokens: int
    ending: float

    @property
    def count(self) -> int:
        """Prompts times group."""
        return self.prompts * self.group


class Settings(NamedTuple):
    """How a side does its work: rows of a micro-batch, and over how many of the machine's cores rows are split.

    With one device a library's products use all cores by themselves.
    """

    micro_batch_rows: int
    devices: int = 1


MODELS = {
    "tiny": Model(32, 1, 2, 1, 16, 64),
    "d128x2": Model(128, 2, 4, 2, 32, 384),
    "d256x4": Model(256, 4, 8, 4, 32, 768),
}
ROWS = {
    "tiny": Rows(4, 2, 4, 6, 0.0),
    "tinytail": Rows(4, 2, 4, 6, 0.3),
    "full": Rows(32, 8, 16, 64, 0.0),
    "tail": Rows(32, 8, 96, 128, 1 / 24),
}
LEARNING_RATE = 1e-6  # so small that lengths stay what they are


def prompt_ids(rows: Rows, model: Model, number: int) -> list[list[int]]:
    """The prompts of turn `number`: ids that need no tokenizer and no random numbers, no two rows alike."""
    span = model.vocabulary - FIRST
    at = lambda row, column: FIRST + (7 * number + 31 * row + 13 * column + row * column) % span  # noqa: E731
    return [[at(row, column) for column in range(rows.prompt_tokens)] for row in range(rows.prompts)]
