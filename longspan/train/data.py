"""The data of a run: prepared or made on the spot, checked by every rank, said in a line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from longspan.data.batches import Batches, TrainingBatches, validation_sequences
from longspan.data.packing import Sequences
from longspan.data.prepare import prepare_corpus
from longspan.data.prepared import PreparedData, num_prepared_bytes, open_prepared
from longspan.data.recall import RecallBatches, RecallTask
from longspan.data.recipe import Recipe
from longspan.data.tokenizer import Tokenizer
from longspan.errors import ConfigError
from longspan.train.config import Config
from longspan.train.loss import Evaluation, unigram_baseline
from longspan.train.ranks import Ranks
from longspan.train.run_folder import RunFolder

_VERIFIED_AT_THE_START = 2**31
"""Bytes up to which ``data.verify = "auto"`` checks all of a folder before the first step: a second or so."""


@dataclass(frozen=True)
class RunData:
    """What a run trains on and is validated by, whatever its task.

    vocab_size: of the model. tokenizer: None where tokens are no text. token_bytes: of each token, int64 ``[vocab_size]``, 0 where
    it is no text. baseline: the loss on `held_out` of what `baseline_name` names. fingerprint: checksums by which a checkpoint
    recognizes its data. describe: says in a line what it is.
    """

    batches: Batches
    held_out: Sequences
    vocab_size: int
    tokenizer: Tokenizer | None
    token_bytes: np.ndarray
    baseline: Evaluation
    baseline_name: str
    fingerprint: dict[str, str]
    describe: Callable[[], str]


def open_data(config: Config, folder: RunFolder, ranks: Ranks) -> RunData:
    """What the run trains on, the same on every rank.

    Raises:
        DataError: on every rank, if text cannot be prepared, is not what was prepared, or is too little.
        ConfigError: if the ranks see different data.
    """
    if config.data.task == "recall":
        return _recall(config)
    return _text(config, prepare_data(config, folder, ranks), ranks)


def _text(config: Config, data: PreparedData, ranks: Ranks) -> RunData:
    batches, held_out = ranks.together(lambda: _sequences(config, data, ranks))
    token_bytes = data.tokenizer.token_bytes
    # The counts of all shards, of which each has as many as the vocabulary: one rank reads them for all.
    baseline = ranks.from_first(
        lambda: asdict(unigram_baseline(data.token_counts(config.data.weights), held_out, token_bytes))
    )
    return RunData(
        batches=batches,
        held_out=held_out,
        vocab_size=data.tokenizer.vocab_size,
        tokenizer=data.tokenizer,
        token_bytes=token_bytes,
        baseline=Evaluation(**baseline),
        baseline_name="unigram",
        fingerprint=data.fingerprint,
        describe=partial(describe_data, config, data),
    )


def _sequences(config: Config, data: PreparedData, ranks: Ranks) -> tuple[TrainingBatches, Sequences]:
    """What is trained on, and what is held out."""
    batches = training_batches(config, data)
    return batches, validation_sequences(
        data.validation, config.train.seq_len, config.validation.sequences, ranks.sp, config.data.documents
    )


def _recall(config: Config) -> RunData:
    task = recall_task(config)
    held_out = task.sequences("validation", range(config.validation.sequences))
    num_queries = held_out.num_valid_tokens
    return RunData(
        batches=RecallBatches(task, config.batch_sequences),
        held_out=held_out,
        vocab_size=task.vocab_size,
        tokenizer=None,
        token_bytes=np.zeros(task.vocab_size, dtype=np.int64),
        baseline=Evaluation(num_queries * math.log(task.num_pairs), num_queries, 0, num_queries * task.chance),
        baseline_name="chance",
        fingerprint={"recall": task.fingerprint},
        describe=lambda: (
            f"recall: {task.num_pairs} pairs of {task.vocab_size:,} words in {task.seq_len:,} tokens, made on the spot; loss and "
            "accuracy are of the queries' answers"
        ),
    )


def recall_task(config: Config) -> RecallTask:
    """The sequences of ``data.task = "recall"``.

    Raises:
        ConfigError: where a sequence or the vocabulary has no room for the pairs.
    """
    try:
        return RecallTask(
            config.recall.pairs, config.data.vocab_size, config.train.seq_len, config.train.seed, config.recall.power
        )
    except ConfigError as error:
        raise ConfigError(
            f"recall.pairs {config.recall.pairs}, data.vocab_size {config.data.vocab_size} and train.seq_len "
            f"{config.train.seq_len} do not fit each other: {error}"
        ) from error


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
