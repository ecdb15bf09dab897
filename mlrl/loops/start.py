"""Where the first parameters come from: the policy's, and those of the frozen model that it is compared with."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlrl import checkpoints
from mlrl.models import lora
from mlrl.models.transformer import Config, Transformer, initialize, plain, without_adapters, without_values
from mlrl.types import Array, Params, Refused

StartFn = Callable[[Transformer, Array], Params]  # (model, key) -> its first parameters


def random_parameters(model: Transformer, key: Array) -> Params:
    """Random parameters; see mlrl.models.transformer.initialize."""
    return initialize(model, key)


def from_run(*, run_dir: str, seed: int = 0) -> StartFn:
    """The parameters that another run ended with: its last complete checkpoint's.

    Args:
      run_dir: the run's folder; "{seed}" in it stands for the number below.
      seed: bound to %SEED, each seed of an experiment begins where the run of the same seed ended, also under --seeds.

    A value head (or critic) that this model has and the run had not starts at random, and so do adapters: those of a
    run that had some are taken over, over the same frozen base.

    Raises: Refused, if there is no checkpoint, or the run's model has another shape, or other adapters.
    """
    run_dir = run_dir.replace("{seed}", str(seed))
    folder = pathlib.Path(run_dir, "checkpoints")
    if checkpoints.latest_step(folder) is None:
        raise Refused(f"{run_dir} holds no complete checkpoint to start from: train it first, or name another run_dir")

    def start(model: Transformer, key: Array) -> Params:
        there = checkpoints.parameters(folder)
        if not lora.adapters(there) and plain(model.config) != model.config:
            dtype = str(there["embedding"]["embedding"].dtype)
            whole = Transformer(dataclasses.replace(plain(model.config), param_dtype=dtype))
            return lora.adapted(start(whole, key), model, key)
        fresh = random_parameters(model, key)
        _require_same_adapters(run_dir, there, fresh)
        kept = {name: fresh[name] for name in _parts(without_values(model))}
        return fresh | checkpoints.restore_params(folder, kept)

    return start


def _require_same_adapters(run_dir: str, there: Params, here: Params) -> None:
    """Raises Refused unless a run's adapters are those of the model that starts from it, or both have none."""
    theirs, ours = lora.adapters(there), lora.adapters(here)
    if theirs != ours:
        words = lambda found: ", ".join(sorted({path[-2] for path in found})) or "no kernel"  # noqa: E731
        raise Refused(f"{run_dir} has adapters on {words(theirs)}, and this model has them on {words(ours)}, or of "
                      "another rank: make Config.lora_rank and lora_kernels equal, or begin with its export (mlrl "
                      "export, pretrained.start)")  # fmt: skip


def critic_from_policy(*, start: StartFn = random_parameters) -> StartFn:
    """A start whose critic is a copy of the policy's trunk, under a value head of zeros.

    Args:
      start: where the policy's parameters come from; it is asked for a model without values.
    Raises: Refused, when started, for a critic that is not as deep as the policy.
    """

    def begin(model: Transformer, key: Array) -> Params:
        config = model.config
        if config.critic_layers != config.layers:
            raise Refused(f"critic_from_policy copies all of the policy's {config.layers} layers, but "
                          f"Config.critic_layers is {config.critic_layers}: make the two equal")  # fmt: skip
        policy = start(without_values(model), key)
        whole, _ = lora.merge(policy, config)
        trunk = {name: jax.tree.map(jnp.copy, part) for name, part in whole.items() if name != "head"}
        head = jax.eval_shape(functools.partial(initialize, model), key)["critic"]["value"]
        return policy | {"critic": trunk | {"value": jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), head)}}

    return begin


class Reference(NamedTuple):
    """The frozen model whose log-probs losses read as reference_log_probs, as functions.

    model   policy's Transformer -> the reference's; it has no values
    params  (policy's first parameters, the reference's Transformer, key) -> the parameters that the state holds for it
    held    parameters of the reference's Transformer -> those of them that the state holds: the others it shares with
            the policy's frozen base
    """

    model: Callable[[Transformer], Transformer]
    params: Callable[[Params, Transformer, Array], Params]
    held: Callable[[Params], Params] = lambda params: params


def own_start() -> Reference:
    """The reference is the policy as it was before the first step (or round, where a loop moves it).

    Of a policy with adapters it holds a copy of these alone, over the same frozen base.
    """
    held = lambda params: lora.split(params)[0]  # noqa: E731
    return Reference(without_values, lambda first, model, key: as_reference(held(first), model), held)


def frozen_base() -> Reference:
    """The reference is the frozen base of a policy with adapters: these are switched off, and the state holds nothing.

    It is `own_start` wherever the adapters begin at zero, and saves their copy and their products. Where they do not
    (from_run of a run with adapters, warm_start) it is the model before that training.

    Raises: Refused for a policy without adapters.
    """

    def model(policy: Transformer) -> Transformer:
        if not policy.config.lora_rank:
            raise Refused("start.frozen_base is the policy with its adapters off, and it has none: set "
                          "Config.lora_rank, or Experiment.reference = @start.own_start()")  # fmt: skip
        return without_adapters(without_values(policy))

    return Reference(model, lambda first, model, key: {}, lambda params: {})


def teacher(*, model: Config, start: StartFn) -> Reference:
    """The reference is another model, of any shape but with the policy's vocabulary: a teacher to distil.

    Args:
      model: its shape; vocabulary_size 0 takes the policy's.
      start: (model, key) -> its parameters, as the experiment's own `start`.
    Raises: Refused, if its vocabulary has another size.
    """

    def shaped(policy: Transformer) -> Transformer:
        size = model.vocabulary_size or policy.config.vocabulary_size
        if size != policy.config.vocabulary_size:
            raise Refused(f"the teacher has {size} ids and the policy {policy.config.vocabulary_size}: log-probs can "
                          "be compared only over one vocabulary")  # fmt: skip
        return without_values(Transformer(dataclasses.replace(model, vocabulary_size=size)))

    return Reference(shaped, lambda first, model, key: start(model, jax.random.fold_in(key, 0x74656163)))


def as_reference(params: Params, model: Transformer) -> Params:
    """A copy of the part of a policy's parameters that the reference's `model` has: all but the values'."""
    return {name: jax.tree.map(jnp.copy, params[name]) for name in _parts(model) if name in params}


def _parts(model: Transformer) -> list[str]:
    """The names at the top of a model's parameters."""
    return list(jax.eval_shape(functools.partial(initialize, model), jax.random.key(0)))
