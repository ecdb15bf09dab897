"""Vocabularies: text to token ids and back, from characters, bytes, SentencePiece and Hugging Face files."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mlrl import tokenizer_files
from mlrl.types import Refused, Vocabulary

PAD, BOS, EOS = 0, 1, 2  # of the vocabularies that are made here
_SPECIALS = 3
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


@dataclasses.dataclass(frozen=True)
class Characters:
    """One id per character of `alphabet`, after padding 0, BOS 1 and EOS 2."""

    alphabet: str
    pad_id: int = PAD
    bos_id: int = BOS
    eos_ids: tuple[int, ...] = (EOS,)

    @property
    def size(self) -> int:
        return _SPECIALS + len(self.alphabet)

    def encode(self, text: str) -> list[int]:
        ids = [self.alphabet.find(character) for character in text]
        if -1 in ids:
            raise Refused(f"the alphabet {self.alphabet!r} lacks {text[ids.index(-1)]!r}, found in {_shown(text)}: "
                          "add it to characters(alphabet)")  # fmt: skip
        return [_SPECIALS + i for i in ids]

    def decode(self, ids: Any) -> str:
        return "".join(self.alphabet[i - _SPECIALS] if i < self.size else _UNKNOWN
                       for i in map(int, ids) if i >= _SPECIALS)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Bytes:
    """One id per byte of UTF-8, after padding 0, BOS 1 and EOS 2."""

    size: int = _SPECIALS + 256
    pad_id: int = PAD
    bos_id: int = BOS
    eos_ids: tuple[int, ...] = (EOS,)

    def encode(self, text: str) -> list[int]:
        return [_SPECIALS + byte for byte in text.encode()]

    def decode(self, ids: Any) -> str:
        data = bytes(i - _SPECIALS for i in map(int, ids) if _SPECIALS <= i < self.size)
        return data.decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class SentencePiece:
    """A SentencePiece model file. Equal and hashed by its path; a copy in another process reads the file again."""

    path: str
    size: int
    pad_id: int
    bos_id: int
    eos_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        model = tokenizer_files.sentencepiece_model(self.path)
        ids = model.encode(text)
        if model.unk_id() in ids:
            unknown = next((character for character in text if model.unk_id() in model.encode(character)), text)
            raise Refused(f"{self.path} has no piece for {unknown!r}, found in {_shown(text)}: use another model, "
                          "or train one with byte_fallback")  # fmt: skip
        return ids

    def decode(self, ids: Any) -> str:
        special = {self.pad_id, self.bos_id, *self.eos_ids}
        return tokenizer_files.sentencepiece_model(self.path).decode(
            [i for i in map(int, ids) if i not in special and 0 <= i < self.size]
        )


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """A Hugging Face tokenizer from files. Equal and hashed by its fields; a copy elsewhere reads the files again.

    Special tokens that are spelled out in a text become their ids, as chat templates need.
    """

    path: str
    config: str
    size: int
    pad_id: int
    eos_ids: tuple[int, ...]
    special_tokens: tuple[tuple[str, str], ...] = ()  # ("eos_token", "<|im_end|>"), ...: what templates refer to
    chat_template: str = dataclasses.field(default="", repr=False)

    def encode(self, text: str) -> list[int]:
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        if unknown is not None and unknown in encoded.tokens:
            start, end = encoded.offsets[encoded.tokens.index(unknown)]
            raise Refused(f"{self.path} has no token for {text[start:end]!r}, found in {_shown(text)}")
        return encoded.ids

    def decode(self, ids: Any) -> str:
        special = {self.pad_id, *self.eos_ids}
        known = [i for i in map(int, ids) if i not in special and 0 <= i < self.size]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    @property
    def _tokenizer(self) -> Any:
        return tokenizer_files.hugging_face_tokenizer(self.path, self.config)


@dataclasses.dataclass(frozen=True)
class Chat:
    """A chat template: messages to the text that a chat model was trained on."""

    template: str
    special_tokens: tuple[tuple[str, str], ...] = ()

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a conversation.

        Args:
          messages: [{"role": "user", "content": "..."}, ...]
          add_generation_prompt: ends in the header of the assistant's next message.
          **variables: whatever else the template reads, such as enable_thinking=False.
        Raises: Refused, if the template fails or refuses the messages.
        """
        names = {"bos_token": "", "eos_token": ""} | dict(self.special_tokens) | variables
        try:
            return _compiled_template(self.template).render(
                messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt, **names
            )
        except Exception as error:  # of Jinja, or of whatever the template does with what it was given
            raise Refused(f"the chat template failed: {' '.join(str(error).split())}") from error


def characters(alphabet: str) -> Vocabulary:
    """One id per character: padding 0, BOS 1, EOS 2, then the characters of `alphabet` in order."""
    if not alphabet:
        raise Refused("characters(alphabet) needs at least one character")
    twice = sorted({c for c in alphabet if alphabet.count(c) > 1})
    if twice:
        raise Refused(f"characters(alphabet) must not repeat a character: {twice[0]!r} is in {alphabet!r} twice")
    return Characters(alphabet)


def byte_level() -> Vocabulary:
    """One id per byte of UTF-8, after padding 0, BOS 1 and EOS 2: spells every text."""
    return Bytes()


def sentencepiece(path: str) -> Vocabulary:
    """A SentencePiece model. Without a padding piece, padding is the EOS id.

    Raises: Refused, if the file is missing, is no SentencePiece model, or has no EOS piece.
    """
    path = str(path)
    model = tokenizer_files.sentencepiece_model(path)
    eos = model.eos_id()
    if eos < 0:
        raise Refused(f"{path} has no EOS piece: train it with an eos_id, a completion could not end otherwise")
    pad = model.pad_id() if model.pad_id() >= 0 else eos
    return SentencePiece(path, model.get_piece_size(), pad, model.bos_id(), (eos,))


def train_sentencepiece(texts: Iterable[str], out_path: str, size: int, *, byte_fallback: bool = True) -> Vocabulary:
    """Trains a unigram SentencePiece model of `size` pieces on `texts`, writes it, and opens it.

    Newlines and runs of spaces are kept, digits are split, and with `byte_fallback` (256 pieces) every text can
    be spelled.

    Raises: Refused, if the texts are too few for `size`, or `out_path` cannot be written.
    """
    tokenizer_files.train_sentencepiece_model(texts, str(out_path), size, byte_fallback=byte_fallback)
    return sentencepiece(out_path)


def hugging_face(path: str, *, config: str = "tokenizer_config.json", eos_tokens: Sequence[str] = ()) -> Vocabulary:
    """A Hugging Face tokenizer from a folder (or from a tokenizer.json).

    The folder holds tokenizer.json, or vocab.json / encoder.json with merges.txt / vocab.bpe (GPT-2's or Qwen2's
    kind), each possibly gzipped. Read where present: `config`, special_tokens_map.json, added_tokens.json,
    generation_config.json and config.json. The first EOS is the tokenizer's eos_token, others come from
    generation_config.json. Without a padding token, padding is the EOS id.

    Args:
      path: the folder or the tokenizer.json.
      config: name of the tokenizer's configuration in the folder.
      eos_tokens: texts of the EOS tokens, where the files name none or others are wanted.
    Raises: Refused, naming the file that is missing or wrong.
    """
    path = str(path)
    tokenizer = tokenizer_files.hugging_face_tokenizer(path, config)
    specials, template = tokenizer_files.special_tokens(path, config)
    eos_ids = _eos_ids(path, tokenizer, eos_tokens, specials)
    pad_id = eos_ids[0]
    if specials.get("pad_token"):
        pad_id = _token_id(path, tokenizer, "pad_token", specials["pad_token"])
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    return HuggingFace(path, config, size, pad_id, eos_ids, tuple(sorted(specials.items())), template)


def chat(vocabulary: Vocabulary, template: str = "") -> Chat:
    """The chat template that came with `vocabulary`, or another one, as Jinja text."""
    text = template or getattr(vocabulary, "chat_template", "")
    if not text:
        raise Refused("this vocabulary came without a chat template: pass chat(vocabulary, template=...)")
    _compiled_template(text)
    return Chat(text, getattr(vocabulary, "special_tokens", ()))


def as_user_message(vocabulary: Vocabulary, template: str = "", *, system: str = "",
                    variables: Mapping[str, Any] = {}) -> Callable[[str], str]:  # noqa: B006  # fmt: skip
    """A prompt template for tasks: text -> a conversation of that one user message, ready for the answer.

    Args:
      vocabulary: whose chat template it is.
      template: another one, as Jinja text.
      system: a message of the system before it; "" is none.
      variables: what the template reads besides.
    """
    conversation = chat(vocabulary, template)
    before = [{"role": "system", "content": system}] if system else []

    def render(text: str) -> str:
        return conversation.apply_chat_template([*before, {"role": "user", "content": text}], **variables)

    return render


def _eos_ids(path: str, tokenizer: Any, eos_tokens: Sequence[str], specials: Mapping[str, str]) -> tuple[int, ...]:
    if isinstance(eos_tokens, str):
        raise Refused(f"hugging_face: eos_tokens must be a list of texts, got {eos_tokens!r}")
    names = list(eos_tokens) or [specials[name] for name in ("eos_token",) if specials.get(name)]
    found = [_token_id(path, tokenizer, "eos_token", name) for name in names]
    if not eos_tokens:
        found += tokenizer_files.generation_eos_ids(path)
        strange = [i for i in found if not 0 <= i < 2**31 or tokenizer.id_to_token(i) is None]
        if strange:
            raise Refused(f"the files of {path} name {strange[0]} as an EOS id, which is no token of theirs")
    if not found and tokenizer.token_to_id("<|endoftext|>") is not None:  # GPT-2's files do not name it
        found = [tokenizer.token_to_id("<|endoftext|>")]
    if not found:
        raise Refused(f"the files of {path} name no EOS token: pass hugging_face(eos_tokens=[...])")
    return tuple(dict.fromkeys(found))


def _token_id(path: str, tokenizer: Any, kind: str, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise Refused(f"the {kind} {token!r} is not a token of {path}")
    return found


@functools.lru_cache(maxsize=8)
def _compiled_template(text: str) -> Any:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(text)
    except jinja2.TemplateError as error:
        raise Refused(f"the chat template is not valid Jinja: {error}") from error


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


