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
from mlrl.models import lora, pretrained
from mlrl.models.transformer import (
    CRITIC,
    Config,
    Transformer,
    initialize,
    plain,
    without_adapters,
    without_values,
)
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

    A value head (or critic) is taken over where the run had one of the same shape, and starts at random else. So do
    adapters: those of a run that had some are taken over, over the same frozen base.

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
        names = [*_parts(without_values(model)), *(name for name in CRITIC if _same_shapes(there, fresh, name))]
        kept = {name: fresh[name] for name in names}
        return fresh | checkpoints.restore_params(folder, kept)

    return start


def _same_shapes(there: Params, here: Params, name: str) -> bool:
    """Whether two models have a part of the same shapes and dtypes by this name."""
    shapes = lambda params: jax.tree.map(lambda x: (tuple(x.shape), jnp.dtype(x.dtype).name), params[name])  # noqa: E731
    return name in there and name in here and shapes(there) == shapes(here)


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


class FrozenModel(NamedTuple):
    """A model beside the policy that is not trained, as functions: a reference, a teacher, a reward model.

    model   policy's Transformer -> its own
    params  (policy's first parameters, its own Transformer, key) -> the parameters that the state holds for it
    held    parameters of its Transformer -> those of them that the state holds: the others it shares with the policy's
            frozen base
    """

    model: Callable[[Transformer], Transformer]
    params: Callable[[Params, Transformer, Array], Params]
    held: Callable[[Params], Params] = lambda params: params


def own_start() -> FrozenModel:
    """The reference is the policy as it was before the first step (or round, where a loop moves it).

    Of a policy with adapters it holds a copy of these alone, over the same frozen base.
    """
    held = lambda params: lora.split(params)[0]  # noqa: E731
    return FrozenModel(without_values, lambda first, model, key: as_reference(held(first), model), held)


def frozen_base() -> FrozenModel:
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

    return FrozenModel(model, lambda first, model, key: {}, lambda params: {})


def teacher(*, model: Config, start: StartFn) -> FrozenModel:
    """The reference is another model, of any shape but with the policy's vocabulary: a teacher to distil.

    Args:
      model: its shape; vocabulary_size 0 takes the policy's.
      start: (model, key) -> its parameters, as the experiment's own `start`.
    Raises: Refused, if its vocabulary has another size.
    """

    shaped = lambda policy: without_values(_over_same_ids(model, policy, "teacher"))  # noqa: E731
    return FrozenModel(shaped, lambda first, model, key: start(model, jax.random.fold_in(key, 0x74656163)))


def reward_model(*, model: Config, run_dir: str) -> FrozenModel:
    """A frozen model whose values judge rows: one that another run trained, as by gin/methods/reward_model.gin.

    A reward asks it by `models.reward_models[i](rollout)`, values [B,L]; `rewards.learned.score` is such a reward.

    Args:
      model: its shape, that of the run: with a value head, or a critic. vocabulary_size 0 takes the policy's.
      run_dir: the run's folder; its last complete checkpoint is taken, value head and adapters included.
    Raises: Refused, if the model has no values or another number of ids than the policy, if there is no checkpoint, or
      if the run's model has another shape.
    """
    folder = pathlib.Path(run_dir, "checkpoints")
    if not model.value_head:
        raise Refused("a reward model judges by its values: set Config.value_head of start.reward_model.model, "
                      "as the run that trained it did")  # fmt: skip
    if checkpoints.latest_step(folder) is None:
        raise Refused(f"{run_dir} holds no complete checkpoint of a reward model: train it first, as by "
                      "gin/methods/reward_model.gin, or name another start.reward_model.run_dir")  # fmt: skip

    def restored(first: Params, own: Transformer, key: Array) -> Params:
        return checkpoints.restore_params(folder, jax.eval_shape(functools.partial(initialize, own), key))

    return FrozenModel(lambda policy: _over_same_ids(model, policy, "reward model"), restored)


def pretrained_reward_model(*, path: str, base: Config = Config()) -> FrozenModel:
    """A frozen reward model from a Hugging Face folder: a sequence classifier with one label, as TRL trains them.

    Such a model was trained to be read behind the EOS: set learned.score.read = @learned.behind_last_action.

    Args:
      path: the folder; see models.pretrained.judge.
      base: what the folder does not say, such as dtype and param_dtype.
    Raises: Refused, as models.pretrained.judge does, or if it has another number of ids than the policy.
    """
    config, begin = pretrained.judge(path=path, base=base)
    return FrozenModel(lambda policy: _over_same_ids(config, policy, "reward model"),
                       lambda first, model, key: begin(model, key))  # fmt: skip


def _over_same_ids(config: Config, policy: Transformer, what: str) -> Transformer:
    """A model of the policy's vocabulary."""
    size = config.vocabulary_size or policy.config.vocabulary_size
    if size != policy.config.vocabulary_size:
        raise Refused(f"the {what} has {size} ids and the policy {policy.config.vocabulary_size}: they can read the "
                      "same rows only over one vocabulary")  # fmt: skip
    return Transformer(dataclasses.replace(config, vocabulary_size=size))


def as_reference(params: Params, model: Transformer) -> Params:
    """A copy of the part of a policy's parameters that the reference's `model` has: all but the values'."""
    return {name: jax.tree.map(jnp.copy, params[name]) for name in _parts(model) if name in params}


def _parts(model: Transformer) -> list[str]:
    """The names at the top of a model's parameters."""
    return list(jax.eval_shape(functools.partial(initialize, model), jax.random.key(0)))
