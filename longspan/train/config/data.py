"""The sections [data] and [recall]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    task: Literal["text", "recall"] = "text"
    """Predict text, or recall values by their keys in sequences that are made on the spot (recall), of which [recall] says more."""
    source: tuple[str, ...] = ("python-stdlib",)
    """The sources of this Python's standard library (python-stdlib); folders; text, .jsonl, .parquet files; hf:NAME (Hugging
    Face)."""
    weights: tuple[float, ...] = ()
    """Share of the sequences that each source has, in proportion to the others; none is as much as it has text."""
    suffixes: tuple[str, ...] = (".txt", ".jsonl", ".md", ".py", ".parquet")
    """Endings of the files to read in a folder."""
    text_key: str = "text"
    """Key of the text in a line of a .jsonl file, or its column."""
    max_bytes: int = 12_000_000
    """Read about this many bytes of text of each source, of files chosen at random."""
    validation_fraction: float = 0.05
    """Share of the documents that is held out."""
    tokenizer: str = "bpe"
    """A byte-level BPE trained on the training text (bpe), bytes as they are (bytes), or the path of a tokenizer.json."""
    vocab_size: int = 2048
    """Size of the BPE's vocabulary; with task recall, number of words."""
    end_of_document: str | None = None
    """The token of a tokenizer.json that ends a document; None looks for a usual one, such as <|endoftext|>."""
    documents: Literal["reset", "concatenate"] = "reset"
    """Start memory, attention and positions anew with each document, and predict no token across its end (reset), or do not."""
    folder: str | None = None
    """Keep prepared data here, for several runs; None keeps it in the run folder."""
    prepared: str | None = None
    """A folder that longspan prepare has written; what is said of sources, tokenizer and folder is then left out."""
    verify: Literal["auto", "start", "use"] = "auto"
    """Check every byte of the token files at the start, or each block before its first use; auto takes the start up to 2 GiB."""


@dataclass(frozen=True)
class RecallConfig:
    """Multi-query associative recall, where data.task is recall."""

    pairs: int = 8
    """Pairs of a key and a value in a sequence, and number of times that a key is asked for."""
    power: float = 0.01
    """The further behind the pairs the rarer a query, as n^(power - 1); 1 has them anywhere alike."""
