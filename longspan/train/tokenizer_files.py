"""Tokenizers as Hugging Face Transformers reads them.

What it makes of a text is what training has of a document: no token stands in front of it, but for the end of the document before
where documents are concatenated. One thing differs: text that spells the end of a document is that token there, as is usual in
Transformers, and mere text to `longspan`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longspan.data.tokenizer import END_OF_DOCUMENT, ByteTokenizer, JsonTokenizer, Tokenizer, open_tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, begins_with_end: bool, length: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into a folder.

    Args:
        tokenizer: of a run.
        begins_with_end: whether the end of a document stands in front of each text.
        length: tokens of a sequence that the model was trained on.
    """
    from tokenizers import Tokenizer as Rust
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, JsonTokenizer):
        rust: Any = Rust.from_str(tokenizer.to_json())
        end = tokenizer.text_of_end
    else:
        rust, end = byte_tokenizer(), END_OF_DOCUMENT
    # What a tokenizer of another model adds of itself, training has not seen.
    front = f"{end} $A" if begins_with_end else "$A"
    rust.post_processor = TemplateProcessing(single=front, special_tokens=[(end, tokenizer.end_of_document)])
    PreTrainedTokenizerFast(
        tokenizer_object=rust,
        bos_token=end,
        eos_token=end,
        model_max_length=length,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)


def byte_tokenizer() -> Any:
    """`ByteTokenizer` as one of the `tokenizers` package: each byte is a token of its own, with the same numbers."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Rust

    rust: Any = Rust(models.BPE(vocab={character: byte for byte, character in enumerate(_characters())}, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True, normalized=False)])
    assert rust.token_to_id(END_OF_DOCUMENT) == ByteTokenizer.end_of_document
    return rust


def read_tokenizer(path: Path, end: int | None) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json`` of another model, or of one that `write_tokenizer` has written, bytes included.

    end: the token that ends a document; None looks for a usual one.

    Raises:
        DataError: for a file that is no tokenizer, or has no such token.
    """
    if is_byte_tokenizer(path):
        return ByteTokenizer()
    return open_tokenizer(path, _text_of_token(path, end))[0]


def _text_of_token(path: Path, token: int | None) -> str | None:
    """The text of a token in a ``tokenizer.json``, or None."""
    if token is None:
        return None
    from tokenizers import Tokenizer as Rust

    try:
        text: str | None = Rust.from_file(str(path)).id_to_token(token)
    except Exception:  # the package raises bare Exception; who reads the file next says what is wrong with it
        return None
    return text


def is_byte_tokenizer(path: Path) -> bool:
    """Whether a ``tokenizer.json`` is what `byte_tokenizer` makes, but for what stands around a text."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    ours = json.loads(byte_tokenizer().to_str())
    return isinstance(found, dict) and all(
        found.get(key) == ours[key] for key in ("model", "added_tokens", "pre_tokenizer", "decoder", "normalizer")
    )


def _characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: printable ones for themselves, the others in order from
    U+0100 (as in GPT-2)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
