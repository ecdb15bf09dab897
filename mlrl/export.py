"""Export of a run: its last checkpoint as a Hugging Face folder, with the tokenizer's files."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import shutil
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from mlrl import checkpoints, meshes, runs, tokenizer_files
from mlrl.models import lora, pretrained
from mlrl.models.families import OURS
from mlrl.models.settings import NO_MATTER
from mlrl.types import Refused, Vocabulary
from mlrl.vocabularies import HuggingFace, SentencePiece

# Settings that are the file's own, and not kept from the folder that a run started from.
_WRITTEN_ANEW = {"architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path"}


def export_run(folder: str | os.PathLike, experiment: Any, loop: Any, out: str | os.PathLike, *,
               shard_bytes: int = 5_000_000_000) -> list[str]:  # fmt: skip
    """Writes the policy of a run's last checkpoint to a folder that transformers loads.

    It takes a host's memory for the policy's parameters, and no accelerator, on whatever mesh the run was.

    A value head or critic is left out: no architecture has a place for it. Adapters are merged into the weights, which
    are then fp32, so that the folder's model is the one that was trained. Of a run that began with pretrained weights,
    config.json keeps the settings that change no logit, such as max_position_embeddings.

    Args:
      folder: the run's folder.
      experiment: as its config.gin describes it.
      loop: the module of its loop.
      out: a new folder.
      shard_bytes: above it the weights are cut into shards with an index.
    Returns: what was done, in lines to print.
    Raises: Refused, if there is no checkpoint, or no architecture has the model's shape, or `out` holds a model.
    """
    folder, out = pathlib.Path(folder), pathlib.Path(out)
    if shard_bytes < 1:
        raise Refused("mlrl export: --shard_gb must be above 0")
    runs.require_checkpoint(folder)
    with meshes.on(jax.devices("cpu")[:1]), meshes.use(meshes.mesh()) as mesh:
        parts, vocabulary = loop.prepare(_on_one_device(experiment)), experiment.task.vocabulary
        whole = NamedSharding(mesh, PartitionSpec())
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
                              lora.policy(loop.abstract_state(parts)))  # fmt: skip
        params = checkpoints.restore_params(folder / "checkpoints", wanted)
    step, config = checkpoints.latest_step(folder / "checkpoints"), parts.model.config
    params, merged = lora.merge(params, config)
    files = pretrained.write(out, params, merged, more=_more(experiment, vocabulary), shard_bytes=shard_bytes)
    copied = _copy_tokenizer(vocabulary, out)
    said = [f"step {step} of {folder} is in {out}: {', '.join([*files, *copied])}"]
    if merged != config:
        said.append(f"adapters of rank {config.lora_rank} are merged into the weights, which are {merged.param_dtype}")
    if not copied:
        said.append("no tokenizer was written: the vocabulary did not come from files")
    left = [name for name in OURS if name.startswith(("value", "critic")) and getattr(config, name, False)]
    if left:
        said.append(f"left out, since no architecture has a place for it: Config.{', Config.'.join(left)}")
    return said


def _on_one_device(experiment: Any) -> Any:
    """The experiment without its meshes, which this machine need not have the devices for."""
    alone = {"mesh": functools.partial(meshes.mesh, devices=1), "rollout_mesh": meshes.same}
    known = {field.name for field in dataclasses.fields(experiment)}
    return dataclasses.replace(experiment, **{name: one for name, one in alone.items() if name in known})


def _more(experiment: Any, vocabulary: Vocabulary) -> dict[str, Any]:
    """Settings of config.json beside the shape: those of the folder that the run started from, and special ids."""
    before = pretrained.settings(experiment.start.path) if isinstance(experiment.start, pretrained.Start) else {}
    kept = {name: value for name, value in before.items() if name in NO_MATTER - _WRITTEN_ANEW}
    kept.pop("n_positions", None)  # of GPT-2, whose shape says it
    eos = list(vocabulary.eos_ids)
    return kept | {"eos_token_id": eos if len(eos) > 1 else eos[0], "pad_token_id": vocabulary.pad_id}


def _copy_tokenizer(vocabulary: Vocabulary, out: pathlib.Path) -> list[str]:
    if isinstance(vocabulary, HuggingFace):
        return tokenizer_files.copy_files(vocabulary.path, vocabulary.config, out)
    if isinstance(vocabulary, SentencePiece):
        shutil.copyfile(vocabulary.path, out / "tokenizer.model")
        return ["tokenizer.model"]
    return []
