"""Tokenizers: bytes as they are, a byte-level BPE trained on the training documents, or a ``tokenizer.json`` that exists.

The first two are lossless on text. All of them end a document with one token of their own, and know how many bytes of text a token
stands for, which is what makes a loss comparable between tokenizers (bits per byte).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from longspan.errors import DataError

if TYPE_CHECKING:
    import numpy as np

BPE, BYTES = "bpe", "bytes"
"""Tokenizers by name; anything else is the path of a ``tokenizer.json``."""

END_OF_DOCUMENT = "<|endoftext|>"
_ENDS_OF_OTHERS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|endofsequence|>", "[SEP]")
"""What other tokenizers end a text with, the likeliest first."""


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

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode`, as arrays of unsigned integers."""
        ...

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

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        import numpy as np

        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def to_json(self) -> str:
        return json.dumps({"kind": "bytes"})


class JsonTokenizer:
    """A tokenizer of the `tokenizers` package.

    end_of_document: the text of the token that follows each document; it must be in the vocabulary.
    """

    def __init__(self, tokenizer: Any, end_of_document: str = END_OF_DOCUMENT) -> None:
        self._tokenizer = tokenizer
        # Text that spells the end of a document is text: only the preparation writes that token. Nothing is cut off or filled up.
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.text_of_end = end_of_document
        # Numbers may be left out in a vocabulary that was changed by hand.
        self.vocab_size: int = max(tokenizer.get_vocab().values()) + 1
        self.end_of_document: int = tokenizer.token_to_id(end_of_document)

    @property
    def token_bytes(self) -> np.ndarray:
        import numpy as np

        counts = np.zeros(self.vocab_size, dtype=np.int64)
        added = self._tokenizer.get_added_tokens_decoder()
        is_byte_level = '"ByteLevel"' in json.dumps(json.loads(self.to_json())["decoder"])
        for text, token in self._tokenizer.get_vocab().items():
            counts[token] = len(text.encode()) if token in added else _num_bytes(text, is_byte_level)
        counts[self.end_of_document] = 0
        return counts

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._encodings(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        import numpy as np

        return [np.array(encoding.ids, dtype=np.uint32) for encoding in self._encodings(texts)]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens)))

    def to_json(self) -> str:
        return str(self._tokenizer.to_str())

    def _encodings(self, texts: Sequence[str]) -> Iterable[Any]:
        encodings: Iterable[Any] = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return encodings


def _num_bytes(text: str, is_byte_level: bool) -> int:
    """Bytes that a token of this text stands for: those of a byte-level vocabulary have a printable character for each byte."""
    if is_byte_level:
        return len(text)
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return 1
    return len(text.replace("\u2581", " ").removeprefix("##").encode())


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Train a byte-level BPE of at most `vocab_size` tokens on `texts`.

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
    tokenizer.train_from_iterator(texts, trainer)
    return JsonTokenizer(tokenizer)


def open_tokenizer(path: Path, end_of_document: str | None) -> tuple[JsonTokenizer, str]:
    """A ``tokenizer.json`` of another model, and the text of the token that ends its documents.

    end_of_document: that text; None takes the first of the usual ones that the vocabulary has.

    Raises:
        DataError: if the file is no tokenizer, or has no such token.
    """
    rust = _read_rust(path, "Give the tokenizer.json of a model, or 'bpe' or 'bytes', as data.tokenizer")
    ends = _ENDS_OF_OTHERS if end_of_document is None else (end_of_document,)
    found = next((text for text in ends if rust.token_to_id(text) is not None), None)
    if found is None:
        raise DataError(
            f"{path} has no token {' or '.join(map(repr, ends))} to end a document with. Name the one that it has as "
            "data.end_of_document"
        )
    return JsonTokenizer(rust, found), found


def load_tokenizer(path: Path, end_of_document: str = END_OF_DOCUMENT) -> Tokenizer:
    """Read the tokenizer that was written with `Tokenizer.to_json`.

    Raises:
        DataError: if the file is missing or is no tokenizer.
    """
    try:
        if json.loads(path.read_text(encoding="utf-8")) == {"kind": BYTES}:
            return ByteTokenizer()
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as a tokenizer: {error}. Prepare the data again") from error
    rust = _read_rust(path, "Prepare the data again")
    if rust.token_to_id(end_of_document) is None:
        raise DataError(f"{path} has no token {end_of_document!r}. Prepare the data again")
    return JsonTokenizer(rust, end_of_document)


def _read_rust(path: Path, remedy: str) -> Any:
    from tokenizers import Tokenizer as Rust

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a tokenizer: {error}. {remedy}") from error
    try:
        rust: Any = Rust.from_str(text)
    except Exception as error:  # the package raises bare Exception
        raise DataError(f"{path} is not a tokenizer: {error}. {remedy}") from error
    if not rust.get_vocab():
        raise DataError(f"{path} is not a tokenizer: its vocabulary is empty. {remedy}")
    return rust
