"""Text that comes piece by piece: whole characters alone, and nothing of a stop string, however they are cut into tokens."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from longspan.data.text_stream import TextStream
from longspan.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, train_bpe
from longspan.errors import InputError

TEXT = "Grüße, 世界! 👩‍🚀 ends\nhere — naïve €5 \U0001f680\U0001f680."


def byte_fallback() -> JsonTokenizer:
    """Words with the mark of a space in front, and a token for each byte: as Llama 2's."""
    from tokenizers import Tokenizer as Rust

    words = ["<unk>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "\u2581", "\u2581ends", "here", "a"]
    description: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {word: number for number, word in enumerate(words)},
            "merges": [],
        },
    }
    rust: Any = Rust.from_str(json.dumps(description))
    return JsonTokenizer(rust, "</s>")


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": ByteTokenizer,
    "bpe": lambda: train_bpe([TEXT[:9]] * 4, 262),
    "byte fallback": byte_fallback,
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]()


def pieces(stream: TextStream, tokens: list[int]) -> list[str]:
    return [*(stream.push(token) for token in tokens), stream.finish()]


def test_pieces_are_whole_characters_and_make_up_the_text(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode([TEXT])[0]
    assert len(tokens) > len(TEXT)
    found = pieces(TextStream(tokenizer), tokens)
    assert "".join(found) == TEXT
    assert sum(1 for piece in found if piece) > 20
    assert all("\ufffd" not in piece for piece in found)


def test_a_text_that_is_cut_ends_with_a_whole_character(tokenizer: Tokenizer) -> None:
    tokens, text = tokenizer.encode([TEXT])[0], TEXT.encode()
    sizes = tokenizer.token_bytes
    # A space that some put in front, and take away again.
    extra = int(sizes[tokens].sum()) - len(text)
    for count in range(1, len(tokens)):
        found = "".join(pieces(TextStream(tokenizer), tokens[:count]))
        assert found == text[: int(sizes[tokens[:count]].sum()) - extra].decode(errors="ignore")


def test_what_follows_a_prompt_keeps_its_space(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode([TEXT])[0]
    whole = tokenizer.decode(tokens)
    for count in range(1, len(tokens)):
        before = tokenizer.decode(tokens[:count])
        if "\ufffd" not in before:
            found = "".join(pieces(TextStream(tokenizer, tokens[:count]), tokens[count:]))
            assert before + found == whole


def test_bytes_that_are_no_character_show_where_text_follows() -> None:
    tokens = [*b"a\xff", *"é".encode(), *b"b\xc3"]
    assert "".join(pieces(TextStream(ByteTokenizer()), tokens)) == "a\ufffdéb"


@pytest.mark.parametrize("stop", ["\U0001f680", "ends\nhere", "世", "e", "\U0001f680\U0001f680.", "üß"])
def test_a_text_ends_before_a_stop_string(tokenizer: Tokenizer, stop: str) -> None:
    stream = TextStream(tokenizer, stop=("never there", stop))
    found = "".join(pieces(stream, tokenizer.encode([TEXT])[0]))
    assert found == TEXT[: TEXT.index(stop)]
    assert stream.stopped_by == stop


def test_the_first_of_several_stop_strings_ends_a_text_and_no_part_of_one_is_given_out() -> None:
    """Against all texts of a few letters, in pieces of random length."""
    numbers = random.Random(0)
    for letters in itertools.islice(itertools.product("ab", repeat=9), 0, None, 3):
        text = "".join(letters)
        stop = tuple(numbers.choice(["aba", "bb", "abab", "aab", "bab"]) for _ in range(2))
        stream = TextStream(ByteTokenizer(), stop=stop)
        given = ""
        for token in text.encode():
            given += stream.push(token)
            assert not any(s in given for s in stop)
        given += stream.finish()
        ends = [text.index(s) for s in stop if s in text]
        # The one that is complete first, as nothing more is read.
        complete = [text.index(s) + len(s) for s in stop if s in text]
        first = min(complete, default=None)
        want = text if first is None else text[: min(e for e, c in zip(ends, complete, strict=True) if c == first)]
        assert given == want, (text, stop)


def test_what_looked_like_a_stop_string_is_given_out_at_the_end() -> None:
    stream = TextStream(ByteTokenizer(), stop=("end.",))
    assert [stream.push(token) for token in b"an end"] == ["a", "n", " ", "", "", ""]
    assert stream.finish() == "end"
    assert stream.stopped_by is None


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InputError, match="a stop string must have at least one character"):
        TextStream(ByteTokenizer(), stop=("a", ""))
