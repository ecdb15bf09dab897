"""Between seqio and mlrl: tasks made of Python rows or TensorFlow Datasets, and any seqio task read into a table.

Importing this file loads TensorFlow, which takes seconds; no other file of the package does. A task is built in two
steps. `rows_source` or `tfds_source` makes a seqio.Task, whose examples have inputs and targets (token ids and, as
`..._pretokenized`, texts), answer (text) and extras (pickled, for rewards); it may be registered with seqio and used by
anything that reads seqio. Then `read` takes its examples, once, into a table that the training step draws from.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from mlrl.tasks.mixtures import mixture
from mlrl.tasks.prompt_templates import did_you_mean
from mlrl.tasks.tables import LongFn, refuse_long, table
from mlrl.types import Refused, Task, Vocabulary

Row = Mapping[str, Any]  # an example as a table takes it: prompt, answer, perhaps target, and what rewards need
SeqioTask = seqio.Task
_ROW_KEYS = ("prompt", "answer", "target")
_FEATURES = ("inputs", "targets", "answer", "extras")


class SeqioVocabulary(seqio.Vocabulary):
    """A vocabulary of mlrl's as one of seqio's."""

    def __init__(self, vocabulary: Vocabulary):
        super().__init__()
        self.vocabulary = vocabulary

    @property
    def bos_id(self) -> int | None:
        return getattr(self.vocabulary, "bos_id", None)

    @property
    def eos_id(self) -> int:
        return self.vocabulary.eos_ids[0]

    @property
    def pad_id(self) -> int:
        return self.vocabulary.pad_id

    @property
    def unk_id(self) -> None:
        return None

    @property
    def _base_vocab_size(self) -> int:
        return self.vocabulary.size

    def _encode(self, s: str) -> list[int]:
        return list(self.vocabulary.encode(s))

    def _decode(self, ids: Any) -> str:
        return self.vocabulary.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        encode = lambda text: np.asarray(self._encode(text.decode()), np.int32)  # noqa: E731
        ids = tf.numpy_function(encode, [s], tf.int32)
        ids.set_shape([None])
        return ids

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return tf.numpy_function(lambda row: self._decode(row).encode(), [ids], tf.string)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, SeqioVocabulary) and self.vocabulary == other.vocabulary

    def __hash__(self) -> int:
        return hash(self.vocabulary)


def from_seqio(name: str, split: str, vocabulary: Vocabulary, **limits: Any) -> Task:
    """A registered seqio task or mixture, read once; a mixture's tasks become the sources, at its rates.

    Args:
      name: as registered.
      vocabulary: encodes the texts anew, whatever vocabulary the seqio task has.
    Raises: Refused, if nothing is registered under the name, or the split does not exist or is empty.
    """
    if name not in (*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()):
        names = (*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names())
        raise Refused(f"seqio has no task or mixture {name!r}{did_you_mean(name, names)}: "
                      "import the module that registers it")  # fmt: skip
    found = seqio.get_mixture_or_task(name)
    if isinstance(found, seqio.Task):
        return read(found, split, vocabulary, **limits)
    parts = [task for task in found.tasks if split in task.splits]
    if not parts:
        raise Refused(f"no task of the mixture {name} has a split {split!r}")
    rates = [float(found.get_rate(task)) for task in parts]
    return mixture([read(task, split, vocabulary, **limits) for task in parts], rates, name=named(name, split))


def from_task(task: Task) -> seqio.Task:
    """A task of one source, such as a puzzle, as a seqio task with the one split "train"."""

    def rows(split: str) -> Iterator[Row]:
        for index in range(task.sizes[0]):
            example = task.example(0, index)
            tokens, valid = task.targets(np.zeros(1, np.int32), np.full(1, index, np.int32))
            yield {**example, "target": task.vocabulary.decode(np.asarray(tokens)[0][np.asarray(valid)[0]])}

    if len(task.sources) != 1:
        raise Refused(f"{task.name} has {len(task.sources)} sources: make each a seqio task, and mix those")
    return rows_source(task.name, rows, ("train",), task.vocabulary)


def register(task: seqio.Task) -> seqio.Task:
    """Adds a task to seqio's registry and returns it. Raises Refused if its name is taken."""
    if task.name in seqio.TaskRegistry.names():
        raise Refused(f"seqio already has a task {task.name!r}: give this one another name")
    seqio.TaskRegistry.add_provider(task.name, task)
    return task


def read(
    task: seqio.Task, split: str, vocabulary: Vocabulary, *, max_prompt_tokens: int = 0, max_target_tokens: int = 0,
    on_long_prompt: LongFn = refuse_long, on_long_target: LongFn = refuse_long,
) -> Task:  # fmt: skip
    """Reads a split of a seqio task, in its order and once, into a table; see tables.table for the limits.

    Takes the texts of inputs and targets, or decodes them. "answer" is the answer where examples have one, otherwise
    the target is.
    """
    if split not in task.splits:
        raise Refused(f"{task.name} has no split {split!r}, only {', '.join(sorted(task.splits))}")
    try:
        dataset = task.get_dataset(sequence_length=None, split=split, shuffle=False)
        examples = [_row_of(task, example) for example in dataset.as_numpy_iterator()]
    except (tf.errors.OpError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"reading {split} of {task.name} failed: {_what_failed(error)}") from error
    return table(
        examples, vocabulary, name=named(task.name, split), max_prompt_tokens=max_prompt_tokens,
        max_target_tokens=max_target_tokens, on_long_prompt=on_long_prompt, on_long_target=on_long_target,
    )  # fmt: skip


def rows_source(
    name: str, rows: Callable[[str], Sequence[Row] | Iterator[Row]], splits: Sequence[str], vocabulary: Vocabulary
) -> seqio.Task:
    """A seqio task over rows made in Python: rows(split) -> examples as tables.table takes them."""

    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        found = [_features(row) for row in rows(split)]
        if not found:
            raise Refused(f"{name} has no examples in its split {split!r}")
        return tf.data.Dataset.from_tensor_slices({key: [row[key] for row in found] for key in found[0]})

    return _task(name, seqio.FunctionDataSource(dataset, splits=splits), (), vocabulary)


def tfds_source(
    name: str, tfds_name: str, row: Callable[[Mapping[str, str], str], Row], vocabulary: Vocabulary, *,
    keys: Sequence[str], splits: Sequence[str] = ("train", "test"), data_dir: str = "",
) -> seqio.Task:  # fmt: skip
    """A seqio task over a TensorFlow Dataset: row({key: text}, name of the dataset) -> a row, for the text keys `keys`.

    A dataset that is not in `data_dir` (or TFDS's default place) yet is downloaded and prepared when it is first read.
    """

    def features(*values: bytes) -> list[bytes]:
        raw = {key: value.decode() for key, value in zip(keys, values)}
        return list(_features(row(raw, tfds_name)).values())

    def convert(raw: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        values = tf.numpy_function(features, [raw[key] for key in keys], [tf.string] * len(_FEATURES))
        return {key: tf.reshape(value, []) for key, value in zip(_FEATURES, values)}

    if ":" not in tfds_name:
        raise Refused(f"the TensorFlow Dataset {tfds_name!r} needs its version, such as '{tfds_name}:1.0.0'")
    source = seqio.TfdsDataSource(tfds_name, tfds_data_dir=data_dir or None, splits=splits)
    return _task(name, source, (lambda dataset: dataset.map(convert),), vocabulary)


def _task(name: str, source: seqio.DataSource, preprocessors: Sequence[Callable], vocabulary: Vocabulary) -> seqio.Task:
    adapter = SeqioVocabulary(vocabulary)
    features = {"inputs": seqio.Feature(adapter, add_eos=False), "targets": seqio.Feature(adapter, add_eos=True)}
    steps = [*preprocessors, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
    return seqio.Task(name, source, features, preprocessors=steps)


def _features(row: Row) -> dict[str, bytes]:
    """A row as the features of a seqio example, in a fixed order."""
    target = row.get("target", row["answer"])
    extras = {key: value for key, value in row.items() if key not in _ROW_KEYS}
    if target is None:
        extras["target"] = None
    return {"inputs": row["prompt"].encode(), "targets": (target or "").encode(), "answer": row["answer"].encode(),
            "extras": pickle.dumps(extras)}  # fmt: skip


def _row_of(task: seqio.Task, example: Mapping[str, Any]) -> Row:
    """A seqio example as a row."""

    def text(feature: str) -> str:
        found = example.get(f"{feature}_pretokenized", example.get(feature))
        if isinstance(found, bytes):
            return found.decode()
        if found is None:
            raise Refused(f"the seqio task {task.name} has no feature {feature!r}: its features are {sorted(example)}")
        return task.output_features[feature].vocabulary.decode([int(i) for i in found])

    answer = example.get("answer")
    extras = pickle.loads(example["extras"]) if isinstance(example.get("extras"), bytes) else {}
    others = {key: value.decode() if isinstance(value, bytes) else value for key, value in example.items()
              if key not in _FEATURES and not key.endswith("_pretokenized")}  # fmt: skip
    target = text("targets")
    return {"prompt": text("inputs"), "answer": answer.decode() if isinstance(answer, bytes) else target,
            "target": target} | others | extras  # fmt: skip


def _what_failed(error: Exception) -> str:
    """The line that says what went wrong: of a failure inside TensorFlow, that of the Python error behind it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    own = [line.partition("Refused: ")[2] for line in lines if "Refused: " in line]
    return (own or lines or [type(error).__name__])[0]


def named(name: str, split: str) -> str:
    """The name of a split's task: that of the training split is `name` itself."""
    return name if split == "train" else f"{name}_{split}"
