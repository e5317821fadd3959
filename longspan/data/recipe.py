"""What decides the contents of prepared data, apart from the text itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

DEFAULT_SHARD_BYTES = 2**26
"""Text of a shard: what a process makes at once, and what is lost if it is killed."""


class AskedFor(Protocol):
    """What a user says of a preparation, by the names of `Recipe`: `DataConfig` and the options of ``longspan prepare``."""

    @property
    def source(self) -> tuple[str, ...]: ...

    @property
    def suffixes(self) -> tuple[str, ...]: ...

    @property
    def text_key(self) -> str: ...

    @property
    def max_bytes(self) -> int | None: ...

    @property
    def validation_fraction(self) -> float: ...

    @property
    def tokenizer(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_of_document(self) -> str | None: ...


@dataclass(frozen=True)
class Recipe:
    """What decides the contents of prepared data, apart from the text itself.

    source: one or several, as `list_source` takes them. tokenizer: ``"bpe"``, ``"bytes"``, or the path of a ``tokenizer.json``.
    vocab_size: of the BPE. end_of_document: the token of a ``tokenizer.json`` that ends a document; None looks for it.
    """

    source: tuple[str, ...]
    suffixes: tuple[str, ...]
    text_key: str
    max_bytes: int | None
    validation_fraction: float
    tokenizer: str
    vocab_size: int
    seed: int
    end_of_document: str | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES

    @classmethod
    def of(cls, asked: AskedFor, seed: int, shard_bytes: int = DEFAULT_SHARD_BYTES) -> Recipe:
        """The recipe of what a user asks for; `seed` decides which documents are held out, and which files are read."""
        return cls(**{name: getattr(asked, name) for name in ASKED_FOR}, seed=seed, shard_bytes=shard_bytes)

    def as_json(self) -> dict[str, Any]:
        """The values by name, as JSON has them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


ASKED_FOR = tuple(entry.name for entry in fields(Recipe) if entry.name not in ("seed", "shard_bytes"))
"""Names of what `AskedFor` says."""
