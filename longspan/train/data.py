"""The data of a run: prepared by rank 0 or by an earlier call, opened and checked by every rank, said in a line."""

from __future__ import annotations

from pathlib import Path

from longspan.data.batches import TrainingBatches
from longspan.data.prepare import prepare_corpus
from longspan.data.prepared import PreparedData, num_prepared_bytes, open_prepared
from longspan.data.recipe import Recipe
from longspan.train.config import Config
from longspan.train.ranks import Ranks
from longspan.train.run_folder import RunFolder

_VERIFIED_AT_THE_START = 2**31
"""Bytes up to which ``data.verify = "auto"`` checks all of a folder before the first step: a second or so."""


def prepare_data(config: Config, folder: RunFolder, ranks: Ranks) -> PreparedData:
    """Rank 0 prepares what is not there yet; every rank then checks what it reads, and that all read the same.

    Raises:
        DataError: on every rank, if the data cannot be prepared or is not what was prepared.
        ConfigError: if the ranks see different data.
    """
    data, path = config.data, folder_of_data(config, folder)
    if data.prepared is None:
        recipe = Recipe.of(data, config.train.seed)
        ranks.from_first(lambda: prepare_corpus(recipe, path))
    prepared = ranks.together(lambda: open_prepared(path, _verifies_at_the_start(data.verify, path)))
    ranks.agree(prepared.fingerprint)
    return prepared


def folder_of_data(config: Config, folder: RunFolder) -> Path:
    """Where the prepared data of a run is, or will be."""
    if config.data.prepared is not None:
        return Path(config.data.prepared)
    return Path(config.data.folder) if config.data.folder else folder.data


def _verifies_at_the_start(verify: str, path: Path) -> bool:
    return verify == "start" or (verify == "auto" and num_prepared_bytes(path) <= _VERIFIED_AT_THE_START)


def training_batches(config: Config, data: PreparedData) -> TrainingBatches:
    """The batches of a run; raises DataError if the text does not make one."""
    train, weights = config.train, config.data.weights
    streams = data.train_by_source if weights else (data.train,)
    return TrainingBatches(
        streams, train.seq_len, config.batch_sequences, train.seed, config.data.documents, weights or None
    )


def describe_data(config: Config, data: PreparedData) -> str:
    """What a run trains on, in a line."""
    train, validation = data.train, data.validation
    num_bytes = train.num_text_bytes + validation.num_text_bytes
    empty = f" ({data.num_empty:,} empty ones left out)" if data.num_empty else ""
    tokenizer = config.data.tokenizer if config.data.prepared is None else config.data.prepared
    return (
        f"{_describe_sources(config, data)}: {train.num_documents + validation.num_documents:,} documents{empty}, "
        f"{num_bytes / 1e6:.1f} MB; {train.num_tokens:,} tokens to train on, {validation.num_tokens:,} held out; "
        f"{tokenizer}, vocabulary {data.tokenizer.vocab_size:,}; {_describe_documents(config, data)}"
    )


def _describe_sources(config: Config, data: PreparedData) -> str:
    weights = config.data.weights
    if not weights:
        return ", ".join(data.sources)
    return ", ".join(
        f"{name} ({weight / sum(weights):.1%})" for name, weight in zip(data.sources, weights, strict=True)
    )


def _describe_documents(config: Config, data: PreparedData) -> str:
    """What becomes of documents in sequences."""
    if config.data.documents == "concatenate":
        return "documents follow one another without a reset"
    longer = data.train.num_longer_documents(config.train.seq_len)
    cut = f", and where the {longer:,} that are longer than {config.train.seq_len:,} tokens are cut" if longer else ""
    return f"memory starts anew with each document{cut}"
