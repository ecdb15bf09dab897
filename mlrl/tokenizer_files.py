"""Tokenizer files: reads what SentencePiece and Hugging Face tokenizers are stored in, once per process."""

from __future__ import annotations

import functools
import gzip
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mlrl.types import Refused

# How the tokenizers that are stored as vocabulary and merges cut a text before merging. GPT-2's cut is built in.
_QWEN2_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


@functools.lru_cache(maxsize=8)
def sentencepiece_model(path: str) -> Any:
    """The SentencePiece processor of a file. Raises Refused if it is missing or unreadable."""
    import sentencepiece as spm

    if not pathlib.Path(path).is_file():
        raise Refused(f"there is no SentencePiece model {path}")
    try:
        return spm.SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError) as error:
        raise Refused(f"{path} is not a SentencePiece model: {_first_line(error)}") from error


def train_sentencepiece_model(texts: Iterable[str], out_path: str, size: int, *, byte_fallback: bool) -> None:
    """Trains a model and writes it to `out_path`."""
    import sentencepiece as spm

    if isinstance(texts, str):
        raise Refused("train_sentencepiece needs a list of texts, got one string")
    out = pathlib.Path(out_path)
    if not out.parent.is_dir():
        raise Refused(f"there is no folder {out.parent} to write {out.name} to")
    try:
        with out.open("wb") as file:
            spm.SentencePieceTrainer.train(
                sentence_iterator=_non_empty(texts), model_writer=file, vocab_size=size, model_type="unigram",
                pad_id=0, bos_id=1, eos_id=2, unk_id=3, byte_fallback=byte_fallback, split_digits=True,
                normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
                user_defined_symbols=["\n"], character_coverage=1.0, minloglevel=2,
            )  # fmt: skip
    except (OSError, RuntimeError) as error:
        out.unlink(missing_ok=True)
        reason = _first_line(error).rpartition("] ")[2]  # behind the library's own file and line
        raise Refused(f"SentencePiece could not train {size} pieces for {out_path}: {reason}") from error
    sentencepiece_model.cache_clear()


@functools.lru_cache(maxsize=8)
def hugging_face_tokenizer(path: str, config: str) -> Any:
    """The `tokenizers` tokenizer stored at `path`, with added tokens. Raises Refused."""
    import tokenizers

    where = pathlib.Path(path)
    if not where.exists():
        raise Refused(f"there is no tokenizer {path}: name a folder, or a tokenizer.json")
    stored = _found(where, "tokenizer.json") if where.is_dir() else where
    if stored is not None:
        try:
            tokenizer = tokenizers.Tokenizer.from_str(_text(stored))
        except Exception as error:  # the library raises bare Exception
            raise Refused(f"{stored} is not a tokenizer.json: {_first_line(error)}") from error
    else:
        tokenizer = _byte_pair_tokenizer(where, config)
    _add_tokens(tokenizer, _folder(path), config)
    return tokenizer


def special_tokens(path: str, config: str) -> tuple[dict[str, str], str]:
    """({"eos_token": text, ...}, chat template or ""), as the tokenizer's configuration names them."""
    folder = _folder(path)
    settings = _json(folder, config)
    merged = _json(folder, "special_tokens_map.json") | {k: v for k, v in settings.items() if v is not None}
    texts = {name: _token_text(folder, name, merged[name]) for name in _NAMES if merged.get(name)}
    template = settings.get("chat_template") or ""
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):  # several, by name
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), "")
    if not isinstance(template, str):
        raise Refused(f"{folder / config}: chat_template must be a text, or a list with one named default")
    stored = folder / "chat_template.jinja"
    return texts, _text(stored) if not template and stored.is_file() else template


def generation_eos_ids(path: str) -> list[int]:
    """EOS ids that generation_config.json names, or else config.json; several are possible."""
    for name in ("generation_config.json", "config.json"):
        found = _json(_folder(path), name).get("eos_token_id")
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
                raise Refused(f"{_folder(path) / name}: eos_token_id must be an id or a list of ids, got {found!r}")
            return ids
    return []


def copy_files(path: str, config: str, out: pathlib.Path) -> list[str]:
    """Copies the files of a Hugging Face tokenizer to a folder, unpacked and under the names that others look for."""
    folder = _folder(path)
    copies = {
        "tokenizer_config.json": _found(folder, config),
        "vocab.json": _found(folder, "vocab.json", "encoder.json"),
        "merges.txt": _found(folder, "merges.txt", "vocab.bpe"),
    }
    plain = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
             "generation_config.json")  # fmt: skip
    copies |= {name: _found(folder, name) for name in plain}
    if pathlib.Path(path).is_file():
        copies["tokenizer.json"] = pathlib.Path(path)
    found = {name: file for name, file in copies.items() if file is not None}
    for name, file in found.items():
        (out / name).write_text(_text(file), encoding="utf-8", newline="")
    if "tokenizer_class" not in _json(out, "tokenizer_config.json") and "tokenizer.json" not in found:
        settings = _json(out, "tokenizer_config.json") | {"tokenizer_class": "GPT2Tokenizer"}  # what it was read as
        (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
        found["tokenizer_config.json"] = out
    return sorted(found)


def _byte_pair_tokenizer(folder: pathlib.Path, config: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary_file = _found(folder, "vocab.json", "encoder.json")
    merges_file = _found(folder, "merges.txt", "vocab.bpe")
    if vocabulary_file is None or merges_file is None:
        raise Refused(f"{folder} holds no tokenizer.json, nor vocab.json (or encoder.json) with merges.txt "
                      "(or vocab.bpe)")  # fmt: skip
    vocabulary = _parsed(vocabulary_file)
    lines = _text(merges_file).split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    wrong = next((i for i, pair in enumerate(merges) if len(pair) != 2), None)
    if wrong is not None:
        raise Refused(f"{merges_file}: merge {wrong + 1} must be two pieces with a space between, got {merges[wrong]}")
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    except Exception as error:
        raise Refused(f"{vocabulary_file} and {merges_file} do not fit: {_first_line(error)}") from error
    kind = str(_json(folder, config).get("tokenizer_class", "GPT2Tokenizer")).removesuffix("Fast")
    if kind == "Qwen2Tokenizer":
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(_QWEN2_CUT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
    elif kind == "GPT2Tokenizer":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        raise Refused(f"{folder / config}: {kind} cannot be built from vocabulary and merges: save its tokenizer.json")
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _add_tokens(tokenizer: Any, folder: pathlib.Path, config: str) -> None:
    """Adds the tokens that the configuration adds to the vocabulary, at the ids it gives them."""
    from tokenizers import AddedToken

    entries = _json(folder, config).get("added_tokens_decoder", {})
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    try:
        added = [(int(i), AddedToken(e["content"], **{flag: e.get(flag, False) for flag in flags}))
                 for i, e in entries.items()]  # fmt: skip
        if not entries:
            added = [(int(i), AddedToken(text, special=True, normalized=False))
                     for text, i in _json(folder, "added_tokens.json").items()]  # fmt: skip
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        what = f"{config}: added_tokens_decoder" if entries else "added_tokens.json"
        raise Refused(f"{folder}/{what} is not ids and tokens: {type(error).__name__}: {_first_line(error)}") from error
    for wanted, token in sorted(added, key=lambda pair: pair[0]):
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        got = tokenizer.token_to_id(token.content)
        if got != wanted:
            raise Refused(f"{folder}: the added token {token.content!r} should have id {wanted}, but the vocabulary "
                          f"before it ends at {got}: files of different tokenizers?")  # fmt: skip


def _folder(path: str) -> pathlib.Path:
    where = pathlib.Path(path)
    return where if where.is_dir() else where.parent


def _found(folder: pathlib.Path, *names: str) -> pathlib.Path | None:
    candidates = (folder / (name + ending) for name in names for ending in ("", ".gz"))
    return next((file for file in candidates if file.is_file()), None)


def _text(file: pathlib.Path) -> str:
    opened: Callable = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8", newline="\n") as stream:
            return stream.read()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{file} cannot be read: {_first_line(error)}") from error


def _parsed(file: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise Refused(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise Refused(f"{file} must hold a JSON object, got {type(found).__name__}")
    return found


def _json(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the folder; empty if there is no such file."""
    file = _found(folder, name)
    return _parsed(file) if file is not None else {}


def _token_text(folder: pathlib.Path, name: str, token: Any) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise Refused(f"{folder}: {name} must be a text, or have one as its 'content', got {token!r}")
    return text


def _non_empty(texts: Iterable[str]) -> Iterator[str]:
    return (text for text in texts if text)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
