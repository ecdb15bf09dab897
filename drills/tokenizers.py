"""Tokenizer files for the drill of mutated files, and whether what was read encodes as its library does."""

from __future__ import annotations

import json
import pathlib

import sentencepiece
import tokenizers

from mlrl import vocabularies

TEXTS = ("12+34=46\n", "Is 7 odd? yes", "perhaps, or not: <|end|>", "")
_CORPUS = ["12+34=46", "Is 7 odd? yes no perhaps", "what is the sum of the numbers", "a step and another step"] * 4
_SPECIALS = ["<|pad|>", "<|end|>"]
_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def write(folder: pathlib.Path) -> list[pathlib.Path]:
    """Three tokenizers: tokenizer.json, vocabulary with merges, and SentencePiece."""
    whole, split, pieces = (folder / name for name in ("whole", "split", "pieces"))
    for one in (whole, split, pieces):
        one.mkdir()
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(_CORPUS, vocab_size=300, min_frequency=1, special_tokens=_SPECIALS, show_progress=False)
    trained.save(str(whole / "tokenizer.json"))
    trained.save_model(str(split))
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>", "pad_token": "<|pad|>",
                "chat_template": _TEMPLATE, "added_tokens_decoder": {
                    str(i): {"content": text, "special": True} for i, text in enumerate(_SPECIALS)}}  # fmt: skip
    for one in (whole, split):
        (one / "tokenizer_config.json").write_text(json.dumps(settings))
        (one / "generation_config.json").write_text(json.dumps({"eos_token_id": [1]}))
        (one / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    vocabularies.train_sentencepiece(_CORPUS, str(pieces / "tokenizer.model"), 290)
    return [whole, split, pieces]


def use(folder: pathlib.Path) -> str:
    """Opens the folder's tokenizer, encodes and decodes; says what is not as it must be."""
    if not any(folder.glob("*.json")):
        return _pieces(folder)
    vocabulary = vocabularies.hugging_face(str(folder))
    ids = {*vocabulary.eos_ids, vocabulary.pad_id}
    if not all(isinstance(i, int) and 0 <= i < vocabulary.size for i in ids):
        return f"pad_id and eos_ids {sorted(ids)} are not ids below {vocabulary.size}"
    stored = folder / "tokenizer.json"
    for text in TEXTS:
        found = vocabulary.encode(text)
        if not all(0 <= i < vocabulary.size for i in found):
            return f"{text!r} has ids that are not below {vocabulary.size}"
        vocabulary.decode(found)
        if stored.is_file():
            other = tokenizers.Tokenizer.from_file(str(stored)).encode(text, add_special_tokens=False).ids
            if found != other and "<|" not in text:
                return f"{text!r} is {found}, and {other} by the library"
    if vocabulary.chat_template:
        vocabularies.chat(vocabulary).apply_chat_template([{"role": "user", "content": "7?"}])
    return ""


def _pieces(folder: pathlib.Path) -> str:
    path = folder / "tokenizer.model"
    vocabulary = vocabularies.sentencepiece(str(path))
    other = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in TEXTS:
        if vocabulary.encode(text) != other.encode(text):
            return f"{text!r} is {vocabulary.encode(text)}, and {other.encode(text)} by the library"
        vocabulary.decode(vocabulary.encode(text))
    ids = {*vocabulary.eos_ids, vocabulary.pad_id}
    return "" if all(0 <= i < vocabulary.size for i in ids) else f"{sorted(ids)} are not ids below {vocabulary.size}"
