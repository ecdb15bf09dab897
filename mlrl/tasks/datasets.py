"""Data sets as tasks: GSM8K, knights and knaves, and reasoning-gym, each read once through seqio.

Importing this file loads TensorFlow. A function `..._source` makes the seqio task behind each.
"""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlrl.tasks import answers, prompt_templates
from mlrl.tasks.mixtures import mixture
from mlrl.tasks.seqio_tasks import Row, SeqioTask, named, read, rows_source, tfds_source
from mlrl.tasks.tables import read_jsonl
from mlrl.types import Refused, Task, Vocabulary


def gsm8k(
    path: str,
    vocabulary: Vocabulary,
    *,
    split: str = "train",
    tfds_data_dir: str = "",
    template: Callable[[str], str] = prompt_templates.question_answer,
    keep_annotations: bool = False,
    name: str = "gsm8k",
    **limits: Any,
) -> Task:
    """GSM8K: grade-school word problems whose answer is a number. Judge with answers.gsm8k_score.

    Demonstrations are the solutions, which end in "#### " and the answer.

    Args:
      path: a folder that holds train.jsonl and test.jsonl (or .jsonl.gz), with "question" and "answer"; or one such
        file, which is read whatever `split` is; or "tfds:gsm8k:1.0.0" to read it from TensorFlow Datasets.
      split: "train" or "test".
      tfds_data_dir: where TensorFlow Datasets keeps its files, if not in its default place.
      template: question -> prompt, such as vocabularies.as_user_message(...).
      keep_annotations: keep the calculator annotations <<48/2=24>> in demonstrations.
      name: in the logs; the test split's gets "_test".
      **limits: max_prompt_tokens, max_target_tokens, on_long_prompt, on_long_target: see tables.table.
    Raises: Refused, naming the file and row.
    """
    source = gsm8k_source(
        path, vocabulary, tfds_data_dir=tfds_data_dir, template=template, keep_annotations=keep_annotations, name=name
    )
    return read(source, split, vocabulary, **limits)


def gsm8k_source(
    path: str, vocabulary: Vocabulary, *, tfds_data_dir: str = "",
    template: Callable[[str], str] = prompt_templates.question_answer, keep_annotations: bool = False,
    name: str = "gsm8k",
) -> SeqioTask:  # fmt: skip
    """GSM8K as a seqio task; see `gsm8k`."""

    def row(raw: Mapping[str, Any], where: str) -> Row:
        question, solution = raw["question"], raw["answer"]
        answer = answers.extract_strict(solution) if isinstance(solution, str) else None
        if not isinstance(question, str) or answer is None:
            raise Refused(f"{where}: needs a text 'question', and an 'answer' that ends in '#### ' and a number")
        target = solution if keep_annotations else answers.without_annotations(solution)
        return {"prompt": template(question), "answer": answer, "target": target}

    if path.startswith("tfds:"):
        return tfds_source(name, path.removeprefix("tfds:"), row, vocabulary, keys=("question", "answer"),
                           data_dir=tfds_data_dir)  # fmt: skip

    def rows(split: str) -> list[Row]:
        file = split_file(path, f"{split}.jsonl")
        return [row(raw, f"{file}, row {number}") for number, raw in
                enumerate(read_jsonl(file, ("question", "answer")), 1)]  # fmt: skip

    return rows_source(name, rows, ("train", "test"), vocabulary)


def knights_and_knaves(
    path: str,
    vocabulary: Vocabulary,
    *,
    people: Sequence[int] = (3,),
    rates: Sequence[float] = (),
    split: str = "train",
    template: Callable[[str], str] = prompt_templates.knights_and_knaves,
    name: str = "knights_and_knaves",
    **limits: Any,
) -> Task:
    """Knights and knaves: who lies? One source per number of people. Judge with answers.knights_and_knaves_score.

    Every puzzle's stored solution is checked against its formal statements as it is read.

    Args:
      path: a folder that holds kk_3ppl_train.jsonl.gz and so on, or one such file, read whatever `people` and `split`.
      people: how many inhabitants, one source for each.
      rates: one per source; () samples them alike.
      split, template, name, **limits: as in `gsm8k`.
    Raises: Refused, naming the file and row.
    """
    sources = [knights_and_knaves_source(path, vocabulary, people=n, template=template, name=f"{name}_{n}")
               for n in people]  # fmt: skip
    return mixture([read(source, split, vocabulary, **limits) for source in sources], rates, name=named(name, split))


def knights_and_knaves_source(
    path: str, vocabulary: Vocabulary, *, people: int,
    template: Callable[[str], str] = prompt_templates.knights_and_knaves, name: str = "knights_and_knaves",
) -> SeqioTask:  # fmt: skip
    """Knights and knaves with `people` inhabitants as a seqio task; see `knights_and_knaves`."""
    keys = ("quiz", "names", "solution", "solution_text_format", "statements")

    def row(raw: Mapping[str, Any], where: str) -> Row:
        try:
            sound = answers.statements_hold(ast.literal_eval(raw["statements"]), raw["solution"])
        except (ValueError, SyntaxError, IndexError, TypeError) as error:
            raise Refused(f"{where}: 'statements' cannot be read: {error}") from error
        if not sound or len(raw["names"]) != len(raw["solution"]):
            raise Refused(f"{where}: 'solution' contradicts 'statements'")
        facts = {"names": raw["names"], "solution": raw["solution"], "statements": raw["statements"]}
        return {"prompt": template(raw["quiz"]), "answer": raw["solution_text_format"]} | facts

    def rows(split: str) -> list[Row]:
        file = split_file(path, f"kk_{people}ppl_{split}.jsonl")
        return [row(raw, f"{file}, row {number}") for number, raw in enumerate(read_jsonl(file, keys), 1)]

    return rows_source(name, rows, ("train", "test"), vocabulary)


def reasoning_gym(
    generators: Sequence[str],
    vocabulary: Vocabulary,
    *,
    rates: Sequence[float] = (),
    size: int = 1000,
    test_size: int = 100,
    seed: int = 0,
    config: Mapping[str, Any] = {},  # noqa: B006
    split: str = "train",
    template: Callable[[str], str] = prompt_templates.plain,
    name: str = "",
    **limits: Any,
) -> Task:
    """Generators of reasoning-gym as the sources of a task. Judge with answers.reasoning_gym_score.

    `size` + `test_size` questions are generated; the first `test_size` are the test split, and the training split is
    the rest without any question that is also in the test split.

    Args:
      generators: names, such as ["chain_sum", "basic_arithmetic"].
      rates: one per generator; () samples them alike.
      size, test_size: how many questions of each generator.
      seed: of the generators.
      config: settings of the generator; with several generators, {name: settings}.
      split, template, name, **limits: as in `gsm8k`.
    Raises: Refused, if a generator or a setting does not exist.
    """
    if isinstance(generators, str):
        raise Refused(f"reasoning_gym: generators must be a list of names, got the text {generators!r}")
    settings = {generators[0]: config} if len(generators) == 1 and generators[0] not in config else dict(config)
    stray = sorted(set(settings) - set(generators))
    if stray:
        raise Refused(f"reasoning_gym: config has settings for {stray[0]!r}, which is not among {list(generators)}")
    sources = [
        reasoning_gym_source(g, vocabulary, size=size, test_size=test_size, seed=seed, config=settings.get(g, {}),
                             template=template)
        for g in generators
    ]  # fmt: skip
    name = named(name or "reasoning_gym", split)
    return mixture([read(source, split, vocabulary, **limits) for source in sources], rates, name=name)


def reasoning_gym_source(
    generator: str, vocabulary: Vocabulary, *, size: int = 1000, test_size: int = 100, seed: int = 0,
    config: Mapping[str, Any] = {}, template: Callable[[str], str] = prompt_templates.plain,  # noqa: B006
) -> SeqioTask:  # fmt: skip
    """One generator of reasoning-gym as a seqio task; see `reasoning_gym`."""
    import reasoning_gym as gym
    from reasoning_gym.factory import DATASETS

    if generator not in DATASETS:
        near = prompt_templates.did_you_mean(generator, DATASETS)
        raise Refused(f"reasoning-gym has no generator {generator!r}{near}")
    if size < 1 or test_size < 0:
        raise Refused(f"{generator}: size must be at least 1 and test_size at least 0, got {size} and {test_size}")
    try:
        dataset = gym.create_dataset(generator, size=size + test_size, seed=seed, **config)
    except (TypeError, AssertionError, ValueError) as error:
        raise Refused(f"reasoning-gym's {generator} refuses config={dict(config)}: {error}") from error

    def rows(split: str) -> list[Row]:
        tests = [dataset[i] for i in range(test_size)]
        if split == "test":
            return [row(entry) for entry in tests]
        seen = {entry["question"] for entry in tests}
        entries = (dataset[test_size + i] for i in range(size))
        return [row(entry) for entry in entries if entry["question"] not in seen]

    def row(entry: Mapping[str, Any]) -> Row:
        answer = entry["answer"]  # some generators have none: they only judge
        facts = {"generator": generator, "config": dict(config), "entry": dict(entry)}
        return {"prompt": template(entry["question"]), "answer": "" if answer is None else str(answer),
                "target": None if answer is None else str(answer)} | facts  # fmt: skip

    return rows_source(generator, rows, ("train", "test"), vocabulary)


def split_file(path: str, name: str) -> pathlib.Path:
    """`path` itself if it is a file, else the file `name` in it, gzipped or not. Raises Refused if there is none."""
    where = pathlib.Path(path)
    candidates = [where] if where.is_file() else [where / name, where / f"{name}.gz"]
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        missing = f"the folder {path} holds no {name} or {name}.gz" if where.is_dir() else f"there is no {path}"
        raise Refused(f"{missing}: name the data's folder, or one of its files")
    return found
