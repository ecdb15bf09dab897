"""A tiny TensorFlow Dataset with GSM8K's features, built on the spot; a builder must live in an importable module."""

import tensorflow_datasets as tfds


class TinyGsm8k(tfds.core.GeneratorBasedBuilder):
    """Rows handed to `build`, as the train and the test split."""

    VERSION = tfds.core.Version("1.0.0")
    rows = ()

    def _info(self):
        features = tfds.features.FeaturesDict({"question": tfds.features.Text(), "answer": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {split: enumerate(self.rows) for split in ("train", "test")}

    def _generate_examples(self):
        raise NotImplementedError


def build(data_dir, rows):
    """Writes a data set of `rows` under `data_dir`."""
    TinyGsm8k.rows = rows
    TinyGsm8k(data_dir=data_dir).download_and_prepare()
