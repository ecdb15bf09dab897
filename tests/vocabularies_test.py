"""Vocabularies: golden ids, round trips, special tokens, chat templates, and what is refused."""

import gzip
import json
import pathlib
import pickle

import pytest

from mlrl import vocabularies
from mlrl.types import Refused

TOKENIZERS = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data" / "tokenizers"


def stored(name):
    path = TOKENIZERS / name
    if not path.exists():
        pytest.skip(f"the tokenizer {name} does not lie beside the checkout")
    return str(path)


def tiny_hugging_face(folder, eos="<end>", **config):
    """A GPT-2-like tokenizer of a few pieces."""
    pieces = ["a", "b", "c", "Ġ", "ab", "<end>", "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos} | config))
    return str(folder)


def test_characters_start_after_the_special_ids():
    vocabulary = vocabularies.characters("xyz")
    assert (vocabulary.size, vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_ids) == (6, 0, 1, (2,))
    assert vocabulary.encode("zxy") == [5, 3, 4]
    assert vocabulary.decode([1, 5, 3, 4, 2, 0, 0]) == "zxy"


def test_an_id_beyond_the_alphabet_is_shown_as_unknown():
    assert vocabularies.characters("xyz").decode([3, 6, 1000]) == "x\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"


def test_an_unknown_character_is_named():
    with pytest.raises(Refused, match="lacks 'ß', found in 'xß'"):
        vocabularies.characters("xyz").encode("xß")


@pytest.mark.parametrize("alphabet, words", [("", "at least one"), ("abca", "'a' is in 'abca' twice")])
def test_a_bad_alphabet_is_refused(alphabet, words):
    with pytest.raises(Refused, match=words):
        vocabularies.characters(alphabet)


@pytest.mark.parametrize("text", ["plain", "naïve 日本 🙂\n\t", "\x00"])
def test_bytes_spell_every_text(text):
    vocabulary = vocabularies.byte_level()
    ids = vocabulary.encode(text)
    assert vocabulary.decode([*ids, vocabulary.eos_ids[0], vocabulary.pad_id]) == text
    assert len(ids) == len(text.encode()) and max(ids) < vocabulary.size == 259


def test_gpt2_gives_the_golden_ids():
    folder = pathlib.Path(stored("gpt2"))
    vocabulary = vocabularies.hugging_face(folder)
    with open(folder / "golden_text.txt", encoding="utf-8", newline="") as file:
        text = file.read()
    golden = json.loads((folder / "golden_tokens_gpt2.json").read_text())
    assert vocabulary.encode(text) == golden
    assert vocabulary.decode(golden) == text
    assert (vocabulary.size, vocabulary.eos_ids, vocabulary.pad_id) == (50257, (50256,), 50256)


@pytest.mark.parametrize(
    "config, size, end_of_thought", [("tokenizer_config.json", 151646, 3), ("qwen3_tokenizer_config.json", 151669, 1)]
)
def test_qwen_files_load(config, size, end_of_thought):
    vocabulary = vocabularies.hugging_face(stored("qwen2"), config=config)
    assert (vocabulary.size, vocabulary.eos_ids, vocabulary.pad_id) == (size, (151645,), 151643)
    text = "It's 1234 tokens,\n\n   isn't it?  日本"
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert vocabulary.encode("1234") == [vocabulary.encode(digit)[0] for digit in "1234"]  # one token per digit
    assert len(vocabulary.encode("</think>")) == end_of_thought
    chat = vocabularies.chat(vocabulary)
    prompt = chat.apply_chat_template([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt == expected
    ids = vocabulary.encode(prompt)
    assert ids.count(151644) == 3 and ids.count(151645) == 2  # the special tokens are single ids
    assert vocabularies.as_user_message(vocabulary, system="Be brief.")("Hi") == expected


def test_sentencepiece_files_load():
    vocabulary = vocabularies.sentencepiece(stored("t5_sentencepiece/sentencepiece.model"))
    assert (vocabulary.size, vocabulary.pad_id, vocabulary.eos_ids) == (32000, 0, (1,))
    assert vocabulary.decode([*vocabulary.encode("a house, a tree"), 1, 0]) == "a house, a tree"
    with pytest.raises(Refused, match="has no piece for '{'"):
        vocabulary.encode("a {")
    mistral = vocabularies.sentencepiece(stored("mistral/tokenizer.model.v1"))
    assert mistral.pad_id == mistral.eos_ids[0] == 2  # it has no padding piece


def test_sentencepiece_is_trained_and_travels(tmp_path):
    syllables = ["ba", "do", "ki", "lu", "me", "na", "po", "ru"]
    texts = [f"{a}{b} {b}{c} {a}{c}\n{a + c}" for a in syllables for b in syllables for c in syllables]
    vocabulary = vocabularies.train_sentencepiece(texts, tmp_path / "model", 290)
    assert vocabulary.size == 290
    for text in (texts[7], "  two  spaces", "naïve 日本\n"):
        assert vocabulary.decode(vocabulary.encode(text)) == text
    copy = pickle.loads(pickle.dumps(vocabulary))
    assert copy == vocabulary and hash(copy) == hash(vocabulary)
    with pytest.raises(Refused, match="could not train 5000 pieces"):
        vocabularies.train_sentencepiece(texts, tmp_path / "other", 5000)
    assert not (tmp_path / "other").exists()


def test_eos_ids_come_from_all_files(tmp_path):
    path = tiny_hugging_face(tmp_path, pad_token="<pad>")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 4]}')
    vocabulary = vocabularies.hugging_face(path)
    assert vocabulary.eos_ids == (5, 4) and vocabulary.pad_id == 6
    assert vocabularies.hugging_face(path, eos_tokens=["c"]).eos_ids == (2,)


def test_padding_may_be_the_eos(tmp_path):
    vocabulary = vocabularies.hugging_face(tiny_hugging_face(tmp_path))
    assert vocabulary.pad_id == vocabulary.eos_ids[0] == 5
    assert vocabulary.encode("abc a") == [4, 2, 3, 0]
    assert vocabulary.decode([4, 2, 5, 5, 99]) == "abc"


def test_added_tokens_and_gzipped_files(tmp_path):
    path = tiny_hugging_face(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        (tmp_path / name).unlink()
    (tmp_path / "added_tokens.json").write_text('{"<call>": 7}')
    vocabulary = vocabularies.hugging_face(path)
    assert vocabulary.encode("a<call>b") == [0, 7, 1] and vocabulary.size == 8


def test_a_stored_tokenizer_json_loads(tmp_path):
    from mlrl import tokenizer_files

    source = tmp_path / "source"
    source.mkdir()
    made = tokenizer_files.hugging_face_tokenizer(tiny_hugging_face(source), "tokenizer_config.json")
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}, "chat_template": "{{ x }}"}')
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        vocabulary = vocabularies.hugging_face(path)
        assert vocabulary.encode("ab c") == [4, 3, 2] and vocabulary.eos_ids == (5,)
        assert vocabulary.chat_template == "{{ x }}"
    assert pickle.loads(pickle.dumps(vocabulary)) == vocabulary


def break_vocabulary(folder):
    (folder / "vocab.json").write_text("{not json")


def break_merges(folder):
    (folder / "merges.txt").write_text("#version: 0.2\na b c\n")


def break_kind(folder):
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>", "tokenizer_class": "LlamaTokenizer"}')


def break_eos(folder):
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<nowhere>"}')


def lose_eos(folder):
    (folder / "tokenizer_config.json").write_text("{}")


def lose_merges(folder):
    (folder / "merges.txt").unlink()


def mismatch_added(folder):
    (folder / "added_tokens.json").write_text('{"<call>": 70}')


def settings_with(name="tokenizer_config.json", **changes):
    def spoil(folder):
        file = folder / name
        found = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(found | changes))

    spoil.__name__ = "_".join([name.split(".")[0], *changes])
    return spoil


@pytest.mark.parametrize(
    "spoil, words",
    [
        (break_vocabulary, "vocab.json is not JSON"),
        (break_merges, "merge 1 must be two pieces"),
        (break_kind, "LlamaTokenizer cannot be built"),
        (break_eos, "eos_token '<nowhere>' is not a token"),
        (lose_eos, "name no EOS token"),
        (lose_merges, "holds no tokenizer.json"),
        (mismatch_added, "'<call>' should have id 70"),
        (settings_with(eos_token={"text": "<end>"}), "eos_token must be a text, or have one as its 'content'"),
        (settings_with(chat_template=7), "tokenizer_config.json: chat_template must be a text"),
        (settings_with(chat_template=["{{ x }}"]), "tokenizer_config.json: chat_template must be a text"),
        (settings_with(added_tokens_decoder={"x": {"content": "<call>"}}), "added_tokens_decoder is not ids"),
        (settings_with(added_tokens_decoder={"1": {}}), "added_tokens_decoder is not ids and tokens: KeyError"),
        (settings_with("added_tokens.json", more=None), "added_tokens.json is not ids and tokens"),
        (settings_with("generation_config.json", eos_token_id="x"), "eos_token_id must be an id or a list of ids"),
        (settings_with("generation_config.json", eos_token_id=70), "name 70 as an EOS id, which is no token of theirs"),
        (settings_with("generation_config.json", eos_token_id=-1), "name -1 as an EOS id"),
    ],
)
def test_spoiled_hugging_face_files_are_refused(tmp_path, spoil, words):
    path = tiny_hugging_face(tmp_path)
    spoil(tmp_path)
    with pytest.raises(Refused, match=words) as refusal:
        vocabularies.hugging_face(path)
    assert "\n" not in str(refusal.value)


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(Refused, match="there is no tokenizer .*nowhere"):
        vocabularies.hugging_face(tmp_path / "nowhere")
    with pytest.raises(Refused, match="there is no SentencePiece model .*nowhere"):
        vocabularies.sentencepiece(tmp_path / "nowhere")
    (tmp_path / "text").write_text("not a model")
    with pytest.raises(Refused, match="is not a SentencePiece model"):
        vocabularies.sentencepiece(tmp_path / "text")
    with pytest.raises(Refused, match="is not a tokenizer.json"):
        vocabularies.hugging_face(tmp_path / "text")


def test_chat_templates_are_sandboxed_and_their_failures_named():
    vocabulary = vocabularies.characters("abc")
    with pytest.raises(Refused, match="without a chat template"):
        vocabularies.chat(vocabulary)
    with pytest.raises(Refused, match="not valid Jinja"):
        vocabularies.chat(vocabulary, "{% if %}")
    message = [{"role": "user", "content": "hi"}]
    with pytest.raises(Refused, match="only assistants"):
        vocabularies.chat(vocabulary, "{{ raise_exception('only assistants') }}").apply_chat_template(message)
    with pytest.raises(Refused, match="failed"):
        vocabularies.chat(vocabulary, "{{ ''.__class__.__mro__ }}").apply_chat_template(message)
    loop = vocabularies.chat(vocabulary, "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}")
    assert loop.apply_chat_template([*message, *message]) == "hi"
    tail = vocabularies.chat(vocabulary, "{{ eos_token }}{% if add_generation_prompt %}>{% endif %}")
    assert [tail.apply_chat_template(message, flag) for flag in (True, False)] == [">", ""]
