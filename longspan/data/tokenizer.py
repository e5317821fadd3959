"""Tokenizers: bytes as they are, or a byte-level BPE trained on the training documents.

Both are lossless on text, end a document with one token of their own, and know how many bytes of text a token stands
for, which is what makes a loss comparable between tokenizers (bits per byte).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from longspan.errors import DataError

if TYPE_CHECKING:
    import numpy as np

Kind = Literal["bpe", "bytes"]
END_OF_DOCUMENT = "<|endoftext|>"


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_of_document(self) -> int:
        """The token that follows each document."""
        ...

    @property
    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each token stands for, int64 ``[vocab_size]``; 0 for the end of a document."""
        ...

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def to_json(self) -> str:
        """The whole tokenizer as text: what its checksum is taken of."""
        ...


class ByteTokenizer:
    """Tokens 0 to 255 are bytes of UTF-8, and 256 ends a document."""

    vocab_size = 257
    end_of_document = 256

    @property
    def token_bytes(self) -> np.ndarray:
        import numpy as np

        return np.concatenate([np.ones(256, dtype=np.int64), np.zeros(1, dtype=np.int64)])

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def to_json(self) -> str:
        return json.dumps({"kind": "bytes"})


class BpeTokenizer:
    """A byte-level BPE of the `tokenizers` package."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()
        self.end_of_document: int = tokenizer.token_to_id(END_OF_DOCUMENT)

    @property
    def token_bytes(self) -> np.ndarray:
        import numpy as np

        # A byte-level BPE writes every byte as one printable character.
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for text, token in self._tokenizer.get_vocab().items():
            counts[token] = 0 if token == self.end_of_document else len(text)
        return counts

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens)))

    def to_json(self) -> str:
        return str(self._tokenizer.to_str())


def train_bpe(texts: Sequence[str], vocab_size: int, max_bytes: int) -> BpeTokenizer:
    """Train a byte-level BPE of at most `vocab_size` tokens on the first `max_bytes` bytes or so of `texts`.

    Raises:
        DataError: if `vocab_size` has no room for the 256 bytes and the end of a document.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise DataError(
            f"data.vocab_size {vocab_size} has no room for 256 bytes and the end of a document. Take 257 or more"
        )
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    chosen = []
    num_characters = 0
    for text in texts:
        if num_characters >= max_bytes:
            break
        chosen.append(text)
        num_characters += len(text)
    tokenizer.train_from_iterator(chosen, trainer)
    # Text that spells the end of a document is text: only the preparation writes that token.
    tokenizer.encode_special_tokens = True
    return BpeTokenizer(tokenizer)


def load_tokenizer(path: Path) -> Tokenizer:
    """Read the tokenizer that was written with `Tokenizer.to_json`.

    Raises:
        DataError: if the file is missing or is no tokenizer.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if json.loads(text) == {"kind": "bytes"}:
            return ByteTokenizer()
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as a tokenizer: {error}. Prepare the data again") from error
    from tokenizers import Tokenizer as Rust

    try:
        rust: Any = Rust.from_str(text)
    except Exception as error:  # the package raises bare Exception
        raise DataError(f"{path} is not a tokenizer: {error}. Prepare the data again") from error
    rust.encode_special_tokens = True
    if rust.token_to_id(END_OF_DOCUMENT) is None:
        raise DataError(f"{path} has no token {END_OF_DOCUMENT!r}. Prepare the data again")
    return BpeTokenizer(rust)
