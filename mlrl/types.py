"""The nouns of mlrl: frozen pytrees and function types that every other file imports.

Shape letters, used in every docstring of the package:
    N  prompts in a step            G  completions per prompt (group size)
    B  rows, B = N * G              L  row length, prompt and completion
    P  prompt columns               T  completion columns, L = P + T in a single turn
    V  vocabulary size              S  sources (tasks) in a mixture
    D  model width                  C  stored completions of a prompt
In models:
    K  key/value heads              H  query heads to each of them
    M  columns that are looked at   W  width of a head
Elsewhere, as their docstrings say:
    K  attempts, pairs, likeliest tokens   W  columns of what is no row (words, moves, symbols)
    A  tokens of an answer or a move       O  tokens of what is observed
    E  games that are played at once

A row is one episode: the tokens in the order the model saw them. Prompts are padded on the left,
so that the completions of a step share their columns; `valid` marks what is not padding. Masks come
from lengths that were recorded when a row was made, never from a comparison with the padding id.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array
Params = Any  # the nested dict of a Flax module's parameters
Metrics = dict[str, Array]  # scalars, by the name they are logged under


class Refused(ValueError):
    """A mistake of the user's, in one line that says what to change; the command line prints only that."""


def require_whole(noun: str, field: str, value: Any, lowest: int) -> None:
    """Raises Refused unless `value` is a whole number of at least `lowest`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        shown = repr(value)
        shown = f"a {type(value).__name__}" if len(shown) > 80 or " at 0x" in shown else shown  # a function, a task
        raise Refused(f"{noun}.{field} must be a whole number of at least {lowest}, got {shown}")


def _check_leaf(noun: str, field: str, leaf: Any, shape: tuple[int | None, ...], kind: str) -> None:
    """Raises Refused unless `leaf` has `shape` (None: any length) and a dtype of `kind` (numpy's letters)."""
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise Refused(f"{noun}.{field} must be an array, got {type(leaf).__name__}")
    if len(leaf.shape) != len(shape) or any(w not in (None, g) for g, w in zip(leaf.shape, shape)):
        want = "[" + ",".join("?" if w is None else str(w) for w in shape) + "]"
        raise Refused(f"{noun}.{field} must have shape {want}, got {list(leaf.shape)}")
    dtype = np.dtype(leaf.dtype)
    found = "f" if jnp.issubdtype(dtype, jnp.floating) else dtype.kind
    if found not in kind:
        names = {"i": "an integer", "iu": "an integer", "b": "a boolean", "f": "a floating-point"}
        raise Refused(f"{noun}.{field} must have {names.get(kind, kind)} dtype, got {dtype}")


@struct.dataclass
class Prompts:
    """A batch of prompts, padded on the left.

    tokens  [N,P] int32   token ids
    valid   [N,P] bool    True where not padding; in every row a suffix
    source  [N]   int32   which source of a mixture the prompt came from (0 for a single task)
    index   [N]   int32   which example of that source
    example pytree of arrays [N,...]: what an in-graph reward needs to judge a completion
    """

    tokens: Array
    valid: Array
    source: Array
    index: Array
    example: Any

    def check(self) -> Prompts:
        """Returns itself, or raises Refused naming the field whose shape or dtype is wrong."""
        _check_leaf("Prompts", "tokens", self.tokens, (None, None), "iu")
        n, p = self.tokens.shape
        _check_leaf("Prompts", "valid", self.valid, (n, p), "b")
        _check_leaf("Prompts", "source", self.source, (n,), "iu")
        _check_leaf("Prompts", "index", self.index, (n,), "iu")
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.example):
            if not hasattr(leaf, "shape") or leaf.shape[:1] != (n,):
                name = jax.tree_util.keystr(path)
                raise Refused(f"Prompts.example{name} must be an array with {n} rows, got {np.shape(leaf)}")
        return self


@struct.dataclass
class Rollout:
    """Episodes as rows: what the policy saw, what it chose, and how likely its choices were.

    tokens             [B,L] int32    token ids, in the order the model saw them
    valid              [B,L] bool     True where the row has a token (not padding)
    action_mask        [B,L] bool     True only where the policy chose the token, the first EOS included
    behavior_log_probs [B,L] float32  log-prob of each action under the sampler; 0 outside the action mask;
                                      NaN at actions nobody sampled (stored data)
    turn               [B,L] int32    which turn of the episode the token belongs to, from 0
    role               [B]   int32    which player, or which of proposer and solver, acted in the row
    group              [B]   int32    rows with the same id answer the same prompt; ids lie in [0, B)
    truncated          [B]   bool     the row ended because it was full, not because the policy stopped
    policy_version     [B]   int32    training step of the weights that acted
    earned             [B,L] float32  what an environment or game paid, each payment at the last action before it; ()
                                      where nothing pays but the reward function
    facts              {name: [B] float32}  what else an environment or game says of the episode, for the logs
    """

    tokens: Array
    valid: Array
    action_mask: Array
    behavior_log_probs: Array
    turn: Array
    role: Array
    group: Array
    truncated: Array
    policy_version: Array
    earned: Any = ()
    facts: dict[str, Array] = struct.field(default_factory=dict)

    def check(self) -> Rollout:
        """Returns itself, or raises Refused naming the field whose shape or dtype is wrong."""
        _check_leaf("Rollout", "tokens", self.tokens, (None, None), "iu")
        b, l = self.tokens.shape
        _check_leaf("Rollout", "valid", self.valid, (b, l), "b")
        _check_leaf("Rollout", "action_mask", self.action_mask, (b, l), "b")
        _check_leaf("Rollout", "behavior_log_probs", self.behavior_log_probs, (b, l), "f")
        _check_leaf("Rollout", "turn", self.turn, (b, l), "iu")
        _check_leaf("Rollout", "role", self.role, (b,), "iu")
        _check_leaf("Rollout", "group", self.group, (b,), "iu")
        _check_leaf("Rollout", "truncated", self.truncated, (b,), "b")
        _check_leaf("Rollout", "policy_version", self.policy_version, (b,), "iu")
        if not isinstance(self.earned, tuple):
            _check_leaf("Rollout", "earned", self.earned, (b, l), "f")
        for name, fact in self.facts.items():
            _check_leaf("Rollout", f"facts[{name!r}]", fact, (b,), "f")
        return self


@struct.dataclass
class Rewards:
    """What a rollout earned. Missing is not zero: a row with scored=False leaves baseline and loss.

    tokens  [B,L] float32  reward at each token; an outcome reward sits on the last action token of its
                           row, a step reward on the last token of its step; 0 elsewhere
    outcome [B]   float32  the unshaped score of the row (was it right?), which filters and pass rates use
    scored  [B]   bool     False where no reward could be computed
    parts   {name: [B] float32}  the named components, for the logs
    """

    tokens: Array
    outcome: Array
    scored: Array
    parts: dict[str, Array]

    def check(self) -> Rewards:
        """Returns itself, or raises Refused naming the field whose shape or dtype is wrong."""
        _check_leaf("Rewards", "tokens", self.tokens, (None, None), "f")
        b = self.tokens.shape[0]
        _check_leaf("Rewards", "outcome", self.outcome, (b,), "f")
        _check_leaf("Rewards", "scored", self.scored, (b,), "b")
        for name, part in self.parts.items():
            _check_leaf("Rewards", f"parts[{name!r}]", part, (b,), "f")
        return self


@struct.dataclass
class Scores:
    """What a model says of given tokens. Column t speaks of tokens[:, t] given tokens[:, :t].

    log_probs [B,L] float32  log-prob of each token (0 in column 0 and where not valid)
    entropy   [B,L] float32  entropy of the distribution each token was drawn from, in nats
    values    [B,L] float32  the value head's or critic's estimate of the return *before* each token is
                             chosen (0 everywhere for a model without one)
    logits    [B,L,V] float32  of the distribution each token was drawn from; () unless a loss reads it
    top       of that distribution, its likeliest tokens; () unless asked for
    """

    log_probs: Array
    entropy: Array
    values: Array
    logits: Any = ()
    top: Any = ()

    def check(self) -> Scores:
        """Returns itself, or raises Refused naming the field whose shape or dtype is wrong."""
        _check_leaf("Scores", "log_probs", self.log_probs, (None, None), "f")
        shape = self.log_probs.shape
        _check_leaf("Scores", "entropy", self.entropy, shape, "f")
        _check_leaf("Scores", "values", self.values, shape, "f")
        return self


@struct.dataclass
class Distribution:
    """What a model thinks of every next token: the ids it was asked about, and their log-probs.

    ids       [B,L,K] int32    K likeliest tokens, or all V in their order
    log_probs [B,L,K] float32  normalized over the whole vocabulary
    """

    ids: Array
    log_probs: Array


@struct.dataclass
class Batch:
    """The rows an update learns from. Every leaf has B rows, so splitting a batch is indexing its leaves.

    rollout               Rollout        the rows
    rewards               Rewards        what they earned
    old_log_probs         [B,L] float32  denominator of the importance ratio
    reference_log_probs   [B,L] float32  log-probs under the frozen reference (NaN when there is none)
    values                [B,L] float32  value estimates before the update (NaN when there are none)
    advantages            [B,L] float32
    returns               [B,L] float32  targets of the value function
    mask                  [B,L] bool     the one effective mask: actions of scored, kept rows
    weights               [B,L] float32  the loss is sum(weights * per_token); weights come from a named
                                         reduction over the whole minibatch, so micro-batches and data
                                         shards only add up; 0 outside the mask
    token_weights         [B,L] float32  mask / sum(mask) over the minibatch: the weights of token means in metrics
    reference_distribution  Distribution of the reference at each token; () unless a loss reads it
    """

    rollout: Rollout
    rewards: Rewards
    old_log_probs: Array
    reference_log_probs: Array
    values: Array
    advantages: Array
    returns: Array
    mask: Array
    weights: Array
    token_weights: Array
    reference_distribution: Any = ()

    def check(self) -> Batch:
        """Returns itself, or raises Refused naming the field whose shape or dtype is wrong."""
        shape = self.rollout.check().tokens.shape
        self.rewards.check()
        for name in ("old_log_probs", "reference_log_probs", "values", "advantages", "returns",
                     "weights", "token_weights"):  # fmt: skip
            _check_leaf("Batch", name, getattr(self, name), shape, "f")
        _check_leaf("Batch", "mask", self.mask, shape, "b")
        return self


@struct.dataclass
class TrainState:
    """Everything that persists from step to step. What is not in it is not state.

    step         [] int32   training steps done
    key          PRNG key of the run; every random choice folds the step into it
    params       the parameters that are trained, those of a value head or critic among them
    opt_state    the optimizer's state
    reference    the parameters of the reference (or teacher) that are not in `frozen`; () when nothing reads them
    curriculum   state of the curriculum          (CurriculumFn)
    reward       state of the reward function     (RewardFn)
    controllers  what each controlled knob stands at, by name (mlrl.controllers)
    bad_updates  [] int32   updates in a row that were skipped because loss or gradient was not finite
    frozen       the parameters under adapters, which policy, reference and values share (mlrl.models.lora); () without
    pending      (Prompts, Rollout) of the next step, where rollouts are a step ahead of updates; else ()
    configuration  what a round samples and selects by, where rounds choose it (loops.configurations); else ()
    reward_models  the parameters of each frozen model that a reward asks, in the experiment's order; () without
    """

    step: Array
    key: Array
    params: Params
    opt_state: Any
    reference: Params
    curriculum: Any
    reward: Any
    controllers: Any
    bad_updates: Array
    frozen: Params = ()
    pending: Any = ()
    configuration: Any = ()
    reward_models: tuple[Params, ...] = ()

    def check(self) -> TrainState:
        """Returns itself, or raises Refused naming the field whose shape or dtype is wrong."""
        _check_leaf("TrainState", "step", self.step, (), "iu")
        _check_leaf("TrainState", "bad_updates", self.bad_updates, (), "iu")
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            if not hasattr(leaf, "shape"):
                raise Refused(f"TrainState.params{jax.tree_util.keystr(path)} must be an array, got {leaf!r}")
        return self


class Candidates(NamedTuple):
    """Stored completions of prompts, C to each, ending in the vocabulary's first EOS; no field of them was sampled.

    tokens   [N,C,T] int32   token ids, padded on the right
    valid    [N,C,T] bool    True where not padding
    outcome  [N,C]   float32 how good each is: the higher is preferred; NaN where nobody said, or where there is none
    labels   [N,C,T] float32 whether the step that ends before the token is right, 0 to 1; NaN elsewhere
    """

    tokens: Array
    valid: Array
    outcome: Array
    labels: Array


def no_candidates(source: Array, index: Array) -> Candidates:
    """Raises Refused: the task has prompts, and demonstrations perhaps, but nothing to compare."""
    raise Refused("the task has no stored completions that were compared, rated or labelled: name one that has, such "
                  "as pairs.against_corrupted or preferences.read")  # fmt: skip


class Vocabulary(Protocol):
    """Text to token ids and back. Plain Python, no TensorFlow."""

    size: int  # V: ids lie in [0, size)
    pad_id: int
    eos_ids: tuple[int, ...]  # any of these ends a completion; the first is the one appended to targets

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS or EOS. Raises Refused naming a character it cannot spell."""

    def decode(self, ids: Any) -> str:
        """Text of a sequence of ids. Special tokens (padding, BOS, EOS) are left out."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A random-access set of prompts from one or several sources.

    at(source [N], index [N]) -> Prompts is pure. If `in_graph`, it is also jittable (the prompts are computed,
    or small enough to be constants); otherwise it takes and returns numpy arrays.

    example(source, index) -> the example as plain Python, for host rewards and for people to read. It has at
    least "prompt" (str) and "answer" (str); "task" names the source.

    targets(source [N], index [N]) -> (tokens [N,T] int32, valid [N,T] bool): the demonstrations for supervised
    learning, padded on the right, ending in the vocabulary's first EOS. Same purity as `at`.

    candidates(source [N], index [N]) -> Candidates: stored completions that were compared, rated or labelled, with the
    same number C for every prompt. Same purity as `at`; a task without any refuses.
    """

    name: str
    sources: tuple[str, ...]
    sizes: tuple[int, ...]
    rates: tuple[float, ...]  # default sampling weights of the sources, summing to 1
    vocabulary: Vocabulary
    at: Callable[[Array, Array], Prompts]
    targets: Callable[[Array, Array], tuple[Array, Array]]
    example: Callable[[int, int], Mapping[str, Any]]
    in_graph: bool
    candidates: Callable[[Array, Array], Candidates] = no_candidates


class Models(NamedTuple):
    """Models bound to their weights, for rewards that ask models.

    generate(prompts: Prompts, key) -> Rollout         sampled by the current policy
    score(rollout) -> Scores                           under the current policy
    reference(rollout) -> Scores                       under the frozen reference
    generate_reference(prompts, key) -> Rollout        sampled by the frozen reference
    reward_models[i](rollout) -> values [B,L]          of Experiment.reward_models[i], as in Scores.values

    Both samplers sample as the experiment does, one completion of a prompt, unless they are told otherwise:
    generate(prompts, key, sampling=..., rollout_fn=..., group_size=...).
    """

    generate: Callable[..., Rollout]
    score: Callable[[Rollout], Scores]
    reference: Callable[[Rollout], Scores]
    generate_reference: Callable[..., Rollout]
    reward_models: Sequence[Callable[[Rollout], Array]] = ()


def refusing_models(words: str) -> Models:
    """Models that raise Refused(words) when they are asked, where none are bound."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise Refused(words)

    none = type("Refusing", (Sequence,), {"__getitem__": refuse, "__len__": refuse})()
    return Models(refuse, refuse, refuse, refuse, none)


class RewardFn(NamedTuple):
    """A reward with explicit state, as an optax-like pair; `mlrl.rewards.lift` makes one from a plain function.

    init() -> state                                   a pytree, () for a stateless reward
    update(state, rollout, prompts, task, models) -> (Rewards, state)
        `prompts` has one row per rollout row: it was repeated to B rows beforehand.
    in_graph  True if update is jittable; otherwise it is given and returns numpy arrays
    names     the names of the parts it will report
    """

    init: Callable[[], Any]
    update: Callable[..., tuple[Rewards, Any]]
    in_graph: bool
    names: tuple[str, ...]


class CurriculumFn(NamedTuple):
    """Sampling weights over a task's sources, as a pair with explicit state; jittable.

    init(task) -> state
    weights(state) -> [S], summing to 1
    update(state, prompts, batch) -> state             prompts repeated to B rows; batch after the advantages
    """

    init: Callable[[Task], Any]
    weights: Callable[[Any], Array]
    update: Callable[..., Any]


class StatefulAdvantage(NamedTuple):
    """An advantage function that remembers, as a pair with explicit state; jittable. For the online loop.

    Stands where a plain advantage function may stand. Its state rides in TrainState.controllers, under `name`.

    name    in the state and, behind "controller/", in the logs
    init()  -> state, an array of any shape
    update(state, batch) -> ((advantages [B,L], returns [B,L]), state)
    """

    name: str
    init: Callable[[], Array]
    update: Callable[[Array, Batch], tuple[tuple[Array, Array], Array]]


RolloutFn = Callable[..., Rollout]  # (model, params, prompts, key, *, vocabulary, sampling, group_size, policy_version)
AdvantageFn = Callable[[Batch], tuple[Array, Array]]  # batch -> (advantages [B,L], returns [B,L])
SelectFn = Callable[[Batch], Array]  # batch -> keep [B] bool: rows that stay in the loss
LossFn = Callable[[Scores, Batch], tuple[Array, Metrics]]  # -> (scalar, metrics), both plain sums over rows
ReductionFn = Callable[[Array], Array]  # mask [B,L] -> weights [B,L]
StateFn = Callable[[TrainState], TrainState]
