"""Tokenizers lose nothing, and know how many bytes a token stands for."""

from __future__ import annotations

from pathlib import Path

import pytest

from longspan.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe
from longspan.errors import DataError

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "    naïve — 日本語 🎉\t\r\n",
    "<|endoftext|>",
    "\x00\x7f",
    "",
]


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return ByteTokenizer() if request.param == "bytes" else train_bpe([TEXTS[0]] * 50, 300, 10_000)


def test_decoding_gives_the_text_back(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode(tokens) for tokens in tokenizer.encode(TEXTS)] == TEXTS


def test_token_bytes_add_up_to_the_text(tokenizer: Tokenizer) -> None:
    for text, tokens in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert tokenizer.token_bytes[tokens].sum() == len(text.encode())
    assert tokenizer.token_bytes[tokenizer.end_of_document] == 0
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size


def test_text_never_contains_the_end_of_a_document(tokenizer: Tokenizer) -> None:
    assert all(tokenizer.end_of_document not in tokens for tokens in tokenizer.encode(TEXTS))


def test_a_tokenizer_comes_back_from_its_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json())
    loaded = load_tokenizer(path)
    assert loaded.to_json() == tokenizer.to_json()
    assert loaded.encode(TEXTS) == tokenizer.encode(TEXTS)


def test_training_the_bpe_twice_gives_the_same() -> None:
    assert train_bpe(TEXTS * 20, 300, 10_000).to_json() == train_bpe(TEXTS * 20, 300, 10_000).to_json()


def test_a_vocabulary_without_room_for_bytes_is_refused() -> None:
    with pytest.raises(DataError, match=r"data.vocab_size 256 has no room"):
        train_bpe(TEXTS, 256, 10_000)


@pytest.mark.parametrize("content", ["", "{", '{"kind": "other"}', '{"version": "1.0"}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"tokenizer.json (cannot be read as|is not) a tokenizer"):
        load_tokenizer(path)
