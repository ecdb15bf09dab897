"""The one decoder-only transformer: tokens to hidden states, hidden states to logits and values."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from mlrl import meshes
from mlrl.models import head, remat
from mlrl.models.attention import Cache, attend, columnwise, within_window
from mlrl.models.embedding import look_up
from mlrl.models.layers import Layers, scanned, stream
from mlrl.models.norms import RMSNorm
from mlrl.models.projections import float_dtype
from mlrl.models.rope import Scaling, unscaled
from mlrl.types import Array, Params, Refused, require_whole


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a transformer. Defaults are a model of half a million parameters that a laptop trains.

    vocabulary_size    rows of the embedding; 0 takes the size of the task's vocabulary
    width              D, the width of the residual stream
    layers             of the trunk
    heads              query heads
    kv_heads           K; the query heads must be a multiple of it
    head_width         of one head, in attention
    mlp_width          of the hidden layer of the MLP
    rope_theta         the base of the rotary wavelengths
    rope_scaling       what is done to the rotary frequencies; see mlrl.models.rope
    windows            how many tokens back a layer's attention sees, 0 for all; the tuple repeats over the layers
    window_rope_theta  rope_theta of the layers with a window, which are then not scaled; 0.0: as in the others
    learned_positions  rows of a table of positions that are added to the embedding, in place of rotation; 0: none
    norm               (eps, param_dtype) -> a normalization; see mlrl.models.norms
    norm_eps           what it adds to the variance
    post_norms         also normalizes what attention and MLP return (Gemma 2)
    qk_norm            normalizes each head's queries and keys (Qwen3)
    qkv_bias           biases on queries, keys and values (Qwen2 has them, Llama does not)
    out_bias, mlp_bias  biases on the attention's output, and on all of the MLP (GPT-2)
    gated_mlp          gate and up, or up only
    activation         the function between
    experts            gated MLPs of mlp_width in a layer, of which a token passes experts_per_token; 0: one MLP
    experts_per_token  how many experts a token passes
    experts_renormalized  the chosen experts' weights sum to 1
    scale_width        attention logits are divided by its root; 0: head_width
    attention_cap, logits_cap  soft caps of the attention's and the output's logits; 0.0: none (Gemma 2)
    embedding_scale    a factor on the embedding, but not on the tied head (Gemma)
    tied_head          the embedding is the output head too
    value_head         values of tokens, from a linear head on the policy's trunk, or on the critic's if there is one
    critic_layers      layers of a critic: a second trunk under the value head that shares nothing with the policy's
                       (same width and heads, an embedding and a final norm of its own); 0: no critic
    lora_rank          rank of adapters; only they are trained, and a value head or critic; 0: everything is trained
    lora_alpha         their scale times lora_rank
    lora_kernels       which kernels have one, of `kernels`; (): all of these
    scan_layers        one program is run in turn over the layers, so that a deep model compiles as fast as a shallow
                       one. Their parameters and caches are stacked; see `scanned` and mlrl.models.layers
    attention          how rows without a cache attend: attention.attend, or for long rows fused.by_platform
    remat              what a layer keeps for the backward pass; see mlrl.models.remat
    dtype              of activations and matrix products; log-softmax and normalization are always fp32
    cache_dtype        of the keys and values that samplers keep: float32, bfloat16, or int8 with a scale for each token
                       and head; "": as dtype. A learner keeps prompts in `dtype`, so in another one the sampler's
                       log-probs, which are recorded as they are, differ a little from the learner's: a ratio to
                       scoring.sampler_log_probs begins near 1 and not at it; one to scoring.recomputed_log_probs
                       begins at 1, and losses.corrections weigh the difference
    param_dtype        of parameters: float32, bfloat16, or int8 for kernels that are frozen, beside bfloat16 for the
                       rest. Under adapters it is that of what is frozen, and what is trained is fp32
    """

    vocabulary_size: int = 0
    width: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 32
    mlp_width: int = 384
    rope_theta: float = 10_000.0
    rope_scaling: Scaling = unscaled
    windows: tuple[int, ...] = (0,)
    window_rope_theta: float = 0.0
    learned_positions: int = 0
    norm: Callable[..., nn.Module] = RMSNorm
    norm_eps: float = 1e-6
    post_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = True
    activation: Callable[[Array], Array] = nn.silu
    experts: int = 0
    experts_per_token: int = 2
    experts_renormalized: bool = True
    scale_width: int = 0
    attention_cap: float = 0.0
    logits_cap: float = 0.0
    embedding_scale: float = 1.0
    tied_head: bool = True
    value_head: bool = False
    critic_layers: int = 0
    lora_rank: int = 0
    lora_alpha: float = 32.0
    lora_kernels: tuple[str, ...] = ()
    scan_layers: bool = False
    attention: Callable[..., Array] = attend
    remat: Callable[..., remat.Layer] = remat.none
    dtype: str = "float32"
    cache_dtype: str = ""
    param_dtype: str = "float32"

    def __post_init__(self):
        require_whole("Config", "vocabulary_size", self.vocabulary_size, 0)
        for name in ("width", "layers", "heads", "kv_heads", "head_width", "mlp_width"):
            require_whole("Config", name, getattr(self, name), 1)
        require_whole("Config", "critic_layers", self.critic_layers, 0)
        if self.critic_layers and not self.value_head:
            raise Refused(f"Config.critic_layers is {self.critic_layers}, but a critic is there for its values: set "
                          "Config.value_head = True, or critic_layers = 0")  # fmt: skip
        if self.heads % self.kv_heads:
            raise Refused(f"Config.heads ({self.heads}) must be a multiple of Config.kv_heads ({self.kv_heads})")
        for name in ("learned_positions", "scale_width", "experts"):
            require_whole("Config", name, getattr(self, name), 0)
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise Refused(f"Config.experts_per_token must be between 1 and Config.experts ({self.experts}), got "
                          f"{self.experts_per_token}")  # fmt: skip
        if self.experts and (self.mlp_bias or not self.gated_mlp):
            raise Refused("Config.experts are gated and have no biases: set gated_mlp = True and mlp_bias = False")
        if not isinstance(self.windows, tuple) or not self.windows:
            raise Refused(f"Config.windows must be a tuple of at least one number of tokens, got {self.windows!r}")
        for window in self.windows:
            require_whole("Config", "windows", window, 0)
        if self.head_width % 2 and not self.learned_positions:
            raise Refused(f"Config.head_width must be even for rotary positions, got {self.head_width}")
        self._check_adapters()
        if not isinstance(self.scan_layers, bool):
            raise Refused(f"Config.scan_layers must be True or False, got {self.scan_layers!r}")
        for name, module in (("attention", "attention or mlrl.models.fused"), ("remat", "remat")):
            if not callable(getattr(self, name)):
                raise Refused(f"Config.{name} must be a function, as those of mlrl.models.{module}, got "
                              f"{getattr(self, name)!r}")  # fmt: skip
        if self.dtype not in ("float32", "bfloat16"):
            raise Refused(f"Config.dtype must be 'float32' or 'bfloat16', got {self.dtype!r}")
        if self.cache_dtype not in ("", "float32", "bfloat16", "int8"):
            raise Refused(f"Config.cache_dtype must be '', 'float32', 'bfloat16' or 'int8', got {self.cache_dtype!r}")
        if self.param_dtype not in ("float32", "bfloat16", "int8"):
            raise Refused(f"Config.param_dtype must be 'float32', 'bfloat16' or 'int8', got {self.param_dtype!r}")

    def _check_adapters(self) -> None:
        require_whole("Config", "lora_rank", self.lora_rank, 0)
        if not isinstance(self.lora_alpha, int | float) or not 0 < self.lora_alpha < math.inf:
            raise Refused(f"Config.lora_alpha must be above 0, got {self.lora_alpha!r}; lora_rank = 0 is no adapters")
        if not isinstance(self.lora_kernels, tuple):
            raise Refused(f"Config.lora_kernels must be a tuple of names, got {self.lora_kernels!r}")
        for name in self.lora_kernels:
            if name not in self.kernels:
                experts = "; experts have no adapters" if self.experts else ""
                raise Refused(f"Config.lora_kernels names {name!r}, and the kernels that may have adapters are "
                              f"{', '.join(self.kernels)}{experts}")  # fmt: skip
        if self.lora_kernels and not self.lora_rank:
            raise Refused("Config.lora_kernels names kernels, but Config.lora_rank is 0: set it to the adapters' rank")

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernels of a layer that may have adapters."""
        mlp = () if self.experts else ("gate_up", "down") if self.gated_mlp else ("up", "down")
        return ("qkv", "out", *mlp)

    @property
    def scanned(self) -> tuple[int, int]:
        """(periods, layers in each) that are scanned; (0, 0) if none are.

        A period is the shortest run of layers that the following ones repeat, with their windows. Layers after the last
        whole period are not scanned, nor is any where there is only one period.
        """
        windows = [self.windows[i % len(self.windows)] for i in range(self.layers)]
        period = next(n for n in range(1, self.layers + 1) if windows[n:] == windows[:-n])
        periods = self.layers // period
        return (periods, period) if self.scan_layers and periods > 1 else (0, 0)


class Transformer(nn.Module):
    """Pre-norm decoder: grouped-query attention, MLP, tied or untied head; what else there is, Config says."""

    config: Config

    def setup(self):
        c = self.config
        dtypes = {"dtype": jnp.dtype(c.dtype), "param_dtype": float_dtype(c.param_dtype)}
        norm = functools.partial(c.norm, c.norm_eps, dtypes["param_dtype"])
        self.embedding = nn.Embed(c.vocabulary_size, c.width, embedding_init=nn.initializers.normal(0.02), **dtypes)
        if c.learned_positions:
            self.positions = nn.Embed(c.learned_positions, c.width, embedding_init=nn.initializers.normal(0.02),
                                      **dtypes)  # fmt: skip
        periods, period = c.scanned
        if periods:
            self.layers = scanned(periods)(c, 0, period)
        if periods * period < c.layers:
            self.rest = Layers(c, periods * period, c.layers - periods * period)
            if not periods:
                nn.share_scope(self, self.rest)  # a model that is not scanned has its layers' parameters at the top
        self.final_norm = norm()
        if not c.tied_head:
            self.head = head.Kernel((c.width, c.vocabulary_size), dtypes["param_dtype"])
        if c.critic_layers:
            # Its output head is never called, and so has no parameters.
            self.critic = Transformer(dataclasses.replace(plain(c), layers=c.critic_layers, critic_layers=0))
        elif c.value_head:
            self.value = nn.Dense(1, kernel_init=nn.initializers.zeros, dtype=jnp.float32, param_dtype=jnp.float32)

    def __call__(self, tokens: Array, positions: Array, mask: Array, caches: tuple[Cache, ...] = (),
                 column: Array | int = 0) -> tuple[Array, tuple[Cache, ...]]:  # fmt: skip
        """Hidden states of tokens, looking at the row itself or, with caches, at everything written to them.

        Args:
          tokens: [B,L] int32.
          positions: [B,L] int32, the rotary position of each token.
          mask: [B,L,M] bool, True where token l may look at column m. Without caches M = L.
          caches: from `empty_caches`, or () for none.
          column: the cache column where the first of the L tokens is written.
        Returns: hidden states after the final norm [B,L,D], and the caches with the new columns written.
        """
        c = self.config
        x = self._embedded(tokens, positions, mask.shape[-1])
        masks = {window: within_window(mask, window) for window in set(c.windows)}
        x, written = stream(x), ()
        periods, period = c.scanned
        if periods:
            (x, written), _ = self.layers((x, caches[:period]), (jnp.arange(periods),), positions, masks, column)
        if periods * period < c.layers:
            (x, more), _ = self.rest((x, caches[period:]), (), positions, masks, column)
            written += more
        return self.final_norm(x), written

    def _embedded(self, tokens: Array, positions: Array, columns: int) -> Array:
        """Tokens [B,L], and their positions where these are learned, as vectors [B,L,D]."""
        c = self.config
        x = look_up(self.embedding.embedding, tokens).astype(c.dtype)
        if c.embedding_scale != 1.0:
            x = x * jnp.asarray(c.embedding_scale, x.dtype)
        if not c.learned_positions:
            return x
        if columns > c.learned_positions:
            raise Refused(f"rows have {columns} columns, but Config.learned_positions is {c.learned_positions}: "
                          "shorten prompts or completions")  # fmt: skip
        return x + self.positions(positions)

    def logits(self, hidden: Array) -> Array:
        """Hidden states [...,D] to unnormalized log-probabilities [...,V], always fp32."""
        return head.logits(hidden, self.head_kernel(), self.config.logits_cap)

    def head_kernel(self) -> Array:
        """The output head's kernel [V,D], in the dtype of products."""
        kernel = self.embedding.embedding if self.config.tied_head else self.head().T
        return kernel.astype(self.config.dtype)

    def critic_hidden(self, tokens: Array, positions: Array, mask: Array, caches: tuple[Cache, ...] = (),
                      column: Array | int = 0) -> tuple[Array, tuple[Cache, ...]]:  # fmt: skip
        """As `__call__`, but of the critic's trunk, whose caches are its own; needs Config.critic_layers."""
        return self.critic(tokens, positions, mask, caches, column)

    def values(self, hidden: Array) -> Array:
        """Hidden states [...,D] of the trunk under the value head to estimates of the return [...], fp32.

        The trunk is the critic's (`critic_hidden`) or, without one, the policy's. Needs Config.value_head.
        """
        if self.config.critic_layers:
            return self.critic.values(hidden)
        return self.value(hidden.astype(jnp.float32))[..., 0]

    def everything(self, tokens: Array, positions: Array, mask: Array):
        """Runs every parameter once; what `initialize` traces."""
        hidden, _ = self(tokens, positions, mask)
        seen = self.critic_hidden(tokens, positions, mask)[0] if self.config.critic_layers else hidden
        return self.logits(hidden), self.values(seen) if self.config.value_head else ()


def initialize(model: Transformer, key: Array) -> Params:
    """Random parameters of `model`: normal(0.02) embedding, fan-in scaled kernels, residual branches divided by
    2 * layers in variance, value head zero. With a critic, the policy's are those it has without one. On a mesh each
    device makes only what it holds."""
    return _initialized(model, key)


# One jit, since hundreds of small operations one by one take seconds to compile; of all models, so that one that was
# traced is not traced again.
@functools.partial(jax.jit, static_argnums=0)
def _initialized(model: Transformer, key: Array) -> Params:
    one = jnp.zeros((1, 1), jnp.int32)
    params = model.init(key, one, one, jnp.ones((1, 1, 1), bool), method=Transformer.everything)["params"]
    return meshes.split_parameters(params)


CRITIC = ("critic", "value")  # what the values come from, by name among the parameters: one of these, or neither


def without_values(model: Transformer) -> Transformer:
    """The policy alone: the same shape without value head or critic."""
    return Transformer(dataclasses.replace(model.config, value_head=False, critic_layers=0))


def without_adapters(model: Transformer) -> Transformer:
    """The frozen model under the adapters: it finds its parameters among those of the model that has them."""
    return Transformer(dataclasses.replace(model.config, lora_rank=0, lora_kernels=()))


def plain(config: Config) -> Config:
    """The same shape as one model in fp32, without adapters or int8; a config that has neither as it is."""
    if config.lora_rank or config.param_dtype == "int8":
        return dataclasses.replace(config, lora_rank=0, lora_kernels=(), param_dtype="float32")
    return config


def empty_caches(config: Config, rows: int, columns: int) -> tuple[Cache, ...]:
    """Zeroed caches for `rows` rows of `columns` columns, keys and values a layer; see attention.Cache.

    Where layers are scanned, there is one for each layer of a period, with a leading axis of periods, and after them
    one for each layer that is not scanned. Rows are the fourth axis from the last in all of their arrays.
    """
    dtype, heads, width = jnp.dtype(config.cache_dtype or config.dtype), config.kv_heads, config.head_width
    periods, period = config.scanned

    def cache(*stack: int) -> Cache:
        zeros = lambda shape, dtype: _split_cache(jnp.zeros((*stack, rows, heads, *shape), dtype))  # noqa: E731
        kept = (zeros((width, columns), dtype), zeros((columns, width), dtype))
        scales = (zeros((1, columns), jnp.float32), zeros((columns, 1), jnp.float32))
        return kept + (scales if dtype == jnp.int8 else ())

    return tuple([cache(periods)] * period + [cache()] * (config.layers - periods * period))


def cache_bytes(config: Config, rows: int, columns: int) -> int:
    """Bytes of a sampler's caches, scales included."""
    found = jax.eval_shape(functools.partial(empty_caches, config, rows, columns))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(found))


def in_own_dtype(model: Transformer) -> Transformer:
    """The model with caches in the dtype of its products: what a learner keeps prompts in, through which it learns."""
    return Transformer(dataclasses.replace(model.config, cache_dtype=""))


def widen_caches(caches: tuple[Cache, ...], rows_each: int, more_columns: int) -> tuple[Cache, ...]:
    """Repeats every row `rows_each` times and appends `more_columns` empty columns."""
    def widen(x: Array, axis: int) -> Array:
        padding = [(0, more_columns if i == x.ndim + axis else 0) for i in range(x.ndim)]
        return _split_cache(jnp.pad(jnp.repeat(x, rows_each, axis=-4), padding))

    return tuple(columnwise(widen, cache) for cache in caches)


def _split_cache(x: Array) -> Array:
    return meshes.split(x, *[""] * (x.ndim - 4), "rows", "kv_heads")


def row_positions(valid: Array) -> Array:
    """Rotary positions of padded rows: the first valid token of a row is 0. valid [B,L] bool -> [B,L] int32."""
    return jnp.maximum(jnp.cumsum(valid.astype(jnp.int32), axis=1) - 1, 0)


def causal_mask(valid: Array, *, first_column: int = 0) -> Array:
    """Which columns a token may look at: valid ones up to its own. valid [B,L] bool -> [B,L,L] bool.

    With `first_column`, only the tokens from that column on look: [B,L-first_column,L].
    """
    length = valid.shape[1]
    return jnp.tril(jnp.ones((length, length), bool))[None, first_column:] & valid[:, None, :]


def parameter_count(config: Config) -> int:
    """Number of parameters of a model of this shape."""
    shapes = jax.eval_shape(lambda key: initialize(Transformer(config), key), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))
