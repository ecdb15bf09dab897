"""Floating-point operations of sampling, scoring and learning, by formula from the model's shape."""

from __future__ import annotations

from mlrl.models.transformer import Config

# In every formula: D width, H query heads, K heads of keys and values, w head width, F MLP width, V vocabulary.
# Only matrix products count, 2 operations to each multiply-add. Everything else (norms, softmaxes, samplers, the
# optimizer) is below a few percent for models of some width.


def of_token(config: Config, layers: int) -> float:
    """A token through the trunk, attention between tokens left out: 2 x the parameters that it multiplies with.

        2 layers (D (H + 2K) w + H w D + MLP)      MLP = 3 D F if gated, 2 D F if not,
                                                   experts_per_token 3 D F + D experts with experts
    """
    c = config
    mlp = (3 if c.gated_mlp else 2) * c.width * c.mlp_width
    if c.experts:
        mlp = c.experts_per_token * mlp + c.width * c.experts
    attention = c.width * (c.heads + 2 * c.kv_heads) * c.head_width + c.heads * c.head_width * c.width
    return 2.0 * layers * (attention + mlp)


def of_attention(config: Config, layers: int, columns: int) -> float:
    """A token's attention to so many columns: 4 layers H w columns, for the products with keys and with values.

    All columns that the program looks at count, those behind a mask too: the causal half is computed as well.
    """
    return 4.0 * layers * config.heads * config.head_width * columns


def of_head(config: Config) -> float:
    """A hidden state to logits: 2 D V."""
    return 2.0 * config.width * config.vocabulary_size


def sampling(config: Config, *, prompts: int, prompt_columns: int, rows: int,
             completion_columns: int) -> dict[str, float]:  # fmt: skip
    """Sampling T = completion_columns tokens for each of so many rows, a prompt being prefilled once for its group.

        prefill   prompts P (token + attention to P columns) + rows head
        decode    rows (T - 1) (token + attention to P + T columns + head)

    Rows are counted to their full length: decoding ends earlier when every row has ended.
    """
    c, width = config, prompt_columns + completion_columns
    token = of_token(c, c.layers)
    one_more = token + of_attention(c, c.layers, width) + of_head(c)
    return {
        "prefill": prompts * prompt_columns * (token + of_attention(c, c.layers, prompt_columns)) + rows * of_head(c),
        "decode": rows * (completion_columns - 1) * one_more,
    }  # fmt: skip


def scoring(config: Config, *, rows: int, columns: int, scored: int) -> float:
    """A forward pass over rows of L columns, with logits at scored ones: rows (L (token + attention) + scored head).
    """
    c = config
    through = of_token(c, c.layers) + of_attention(c, c.layers, columns)
    return rows * (columns * through + scored * of_head(c))


def values(config: Config, *, rows: int, columns: int, scored: int) -> float:
    """Values of the scored columns: 2 D each, and a pass through the critic if there is one, of rows (L (token +
    attention)); without one the policy's pass is not counted here.
    """
    c = config
    through = of_token(c, c.critic_layers) + of_attention(c, c.critic_layers, columns)
    return rows * (columns * through + scored * 2.0 * c.width)


def learning(config: Config, *, rows: int, columns: int, scored: int, with_values: bool, chunked: bool) -> float:
    """A forward and backward pass: 3 x the forward, since a product has two in its backward pass.

    The output head costs 4 x where it is computed in chunks of columns, once more in the backward pass.
    """
    size = {"rows": rows, "columns": columns, "scored": scored}
    forward = scoring(config, **size) + (values(config, **size) if with_values else 0.0)
    return 3.0 * forward + (rows * scored * of_head(config) if chunked else 0.0)
