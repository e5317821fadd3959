"""Tokenizers lose nothing, and know how many bytes a token stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from tokenizers.processors import TemplateProcessing

from longspan.data import tokenizer as tokenizers
from longspan.data.tokenizer import ByteTokenizer, load_tokenizer, open_tokenizer, train_bpe
from longspan.errors import DataError

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "    naïve — 日本語 🎉\t\r\n",
    "<|endoftext|>",
    "\x00\x7f",
    "",
]


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    return ByteTokenizer() if request.param == "bytes" else train_bpe([TEXTS[0]] * 50, 300)


def test_decoding_gives_the_text_back(tokenizer: tokenizers.Tokenizer) -> None:
    assert [tokenizer.decode(tokens) for tokens in tokenizer.encode(TEXTS)] == TEXTS


def test_token_bytes_add_up_to_the_text(tokenizer: tokenizers.Tokenizer) -> None:
    for text, tokens in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert tokenizer.token_bytes[tokens].sum() == len(text.encode())
    assert tokenizer.token_bytes[tokenizer.end_of_document] == 0
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size


def test_arrays_are_the_same_tokens(tokenizer: tokenizers.Tokenizer) -> None:
    arrays = tokenizer.encode_arrays(TEXTS)
    assert [array.tolist() for array in arrays] == tokenizer.encode(TEXTS)


def test_text_never_contains_the_end_of_a_document(tokenizer: tokenizers.Tokenizer) -> None:
    assert all(tokenizer.end_of_document not in tokens for tokens in tokenizer.encode(TEXTS))


def test_a_tokenizer_comes_back_from_its_file(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json())
    loaded = load_tokenizer(path)
    assert loaded.to_json() == tokenizer.to_json()
    assert loaded.encode(TEXTS) == tokenizer.encode(TEXTS)


def test_training_the_bpe_twice_gives_the_same() -> None:
    assert train_bpe(TEXTS * 20, 300).to_json() == train_bpe(TEXTS * 20, 300).to_json()


def test_a_vocabulary_without_room_for_bytes_is_refused() -> None:
    with pytest.raises(DataError, match=r"data.vocab_size 256 has no room"):
        train_bpe(TEXTS, 256)


@pytest.mark.parametrize("content", ["", "{", '{"kind": "other"}', '{"version": "1.0"}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"tokenizer.json (cannot be read as|is not) a tokenizer"):
        load_tokenizer(path)


def other_tokenizer(path: Path, **changes: Any) -> Path:
    """A tokenizer.json as other models have them: special tokens around texts, cut at five tokens, filled up to eight."""
    rust = Tokenizer.from_str(train_bpe(TEXTS * 20, 300).to_json().replace("<|endoftext|>", changes.get("end", "</s>")))
    rust.add_special_tokens(["<s>", "<ü>"])
    rust.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", rust.token_to_id("<s>"))])
    rust.enable_truncation(5)
    rust.enable_padding(length=8)
    rust.save(str(path))
    return path


def test_a_tokenizer_of_another_model_is_used_without_what_it_adds(tmp_path: Path) -> None:
    tokenizer, end = open_tokenizer(other_tokenizer(tmp_path / "tokenizer.json"), None)
    assert end == "</s>"
    texts = [*TEXTS, "</s> and <s> are text here", "x " * 200]
    tokens = tokenizer.encode(texts)
    assert [tokenizer.decode(each) for each in tokens] == texts
    assert not {tokenizer.end_of_document, 301} & {token for each in tokens for token in each}
    for text, each in zip(texts, tokens, strict=True):
        assert tokenizer.token_bytes[each].sum() == len(text.encode())
    (tmp_path / "copy.json").write_text(tokenizer.to_json())
    loaded = load_tokenizer(tmp_path / "copy.json", end)
    assert loaded.encode(texts) == tokens and loaded.end_of_document == tokenizer.end_of_document


def test_a_tokenizer_without_an_end_of_documents_is_refused(tmp_path: Path) -> None:
    path = other_tokenizer(tmp_path / "tokenizer.json", end="[END]")
    with pytest.raises(DataError, match=r"tokenizer.json has no token '<\|endoftext\|>' or .* to end a document with"):
        open_tokenizer(path, None)
    with pytest.raises(DataError, match=r"has no token '<end>'"):
        open_tokenizer(path, "<end>")
    assert open_tokenizer(path, "[END]")[1] == "[END]"
    with pytest.raises(DataError, match=r"nowhere.json cannot be read as a tokenizer"):
        open_tokenizer(tmp_path / "nowhere.json", None)


def test_tokens_of_vocabularies_that_are_not_of_bytes_are_counted_by_their_text(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "</s>": 1, "\u2581the": 2, "<0xC3>": 3, "\u00fc": 4, "a": 9}
    rust = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    rust.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Replace("\u2581", " ")])
    rust.save(str(tmp_path / "tokenizer.json"))
    tokenizer, _ = open_tokenizer(tmp_path / "tokenizer.json", None)
    assert tokenizer.vocab_size == 10
    assert tokenizer.token_bytes[[1, 2, 3, 4, 9]].tolist() == [0, 4, 1, 2, 1]
