"""``longspan convert``: a run folder made of the folder of a Llama."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from longspan.data.packing import Documents
from longspan.data.prepare import prepare_corpus
from longspan.data.prepared import PreparedData, open_prepared, open_tokenizer_of
from longspan.data.recipe import Recipe
from longspan.data.tokenizer import JsonTokenizer, Tokenizer, open_tokenizer
from longspan.errors import ConfigError, DataError
from longspan.models import LinearLlama3Config
from longspan.models.conversion import Llama, convert, read_llama
from longspan.models.weights import open_weights
from longspan.train.config import Config, DataConfig, TrainConfig, to_toml
from longspan.train.conversion_report import ConversionReport
from longspan.train.hugging_face import check_reads_back, data_keys, model_section, text_of_token
from longspan.train.init import same_meaning
from longspan.train.run_folder import RunFolder, create_run_folder, replacing
from longspan.train.transfer import Transfer, Transferred, transfer_attention
from longspan.train.weights_file import write_weights


@dataclass(frozen=True)
class TransferData:
    """The text of attention transfer: a prepared folder, or sources as in `longspan train`."""

    prepared: str | None = None
    """A folder that longspan prepare has written, with the Llama's tokenizer."""
    source: tuple[str, ...] = ()
    """Folders; text, .jsonl, .parquet files; hf:NAME; python-stdlib. Prepared with the Llama's tokenizer, in the run folder."""
    max_bytes: int = 12_000_000
    """Read about this many bytes of text of each source, of files chosen at random."""
    documents: Documents = "reset"
    """Start memory, attention and positions anew with each document (reset), or do not (concatenate)."""

    @property
    def is_given(self) -> bool:
        """Whether there is any."""
        return self.prepared is not None or bool(self.source)


@dataclass(frozen=True)
class Convert:
    """Which Llama, what its layers become, and how they begin."""

    folder: Annotated[str, tyro.conf.Positional]
    """The folder of the Llama: config.json, weights in safetensors, tokenizer.json."""
    to: str
    """The run folder to make."""
    pattern: tuple[str, ...] = ("LLLN",)
    """Kind of each layer, repeated over the layers: L linear attention, N the Llama's own; or the mixer of each layer by name."""
    operator: tuple[str, ...] = ("gla",)
    """What the L layers become: one name for all of them, or one for each."""
    window: int | None = None
    """How many tokens N layers see from now on, the token itself included; None is all before it, as in the Llama."""
    seed: int = 0
    """Of the weights that are drawn, and the order of the text."""
    data: TransferData = field(default_factory=TransferData)
    transfer: Transfer = field(default_factory=Transfer)


@dataclass(frozen=True)
class ConvertedRun:
    """The run folder that was made, and the report that lies in it."""

    run: RunFolder
    report: ConversionReport


def convert_llama(options: Convert, say: Callable[[int, float], None]) -> ConvertedRun:
    """Make a run folder of a Llama, on one process.

    say: called after each step of attention transfer with its number and the mean of the layers' errors.

    Raises:
        ConfigError: for layers that make no model, a folder that is not empty, or options that do not fit each other.
        CheckpointError: for another architecture, pickled weights, and missing, extra or misshapen tensors, all of them listed.
        DataError: for text of another tokenizer.
    """
    options.transfer.check()
    _check_data(options)
    llama = read_llama(Path(options.folder))
    config = _with_layers(llama.config, options)
    section = model_section(config)
    with open_weights(llama.path) as weights:
        converted = convert(llama, weights, config, options.seed)
    tokenizer, notes = _tokenizer(llama, options.data)
    # What a conversion left that was refused on its way, such as prepared text, is gone on with; its config is written last.
    made = create_run_folder(options.to, or_begun=not RunFolder(Path(options.to)).config.exists())
    if tokenizer is not None:
        with replacing(made.tokenizer) as unfinished:
            unfinished.write_text(tokenizer.to_json(), encoding="utf-8")
    data_section, data = _data(options, made, tokenizer)
    transferred: Transferred | None = None
    if options.transfer.steps and converted.teachers:
        assert data is not None
        transferred = transfer_attention(
            *(converted.model, converted.teachers, data, options.transfer, options.data.documents, options.seed), say
        )
    tensors = {name: parameter.detach() for name, parameter in converted.model.named_parameters()}
    write_weights(made.weights, tensors, config)
    length = llama.length or TrainConfig().seq_len
    train = TrainConfig(seed=options.seed, seq_len=length, batch_tokens=length, init=str(made.path.resolve()))
    report = ConversionReport(
        str(llama.path), config.layer_operators, converted.tensors, options.transfer, transferred, notes
    )
    texts = {
        made.conversion_json: report.as_json(),
        made.conversion_text: report.as_markdown(),
        made.config: to_toml(Config(data=data_section, model=section, train=train)),
    }
    for path, text in texts.items():
        with replacing(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    if tokenizer is not None:
        check_reads_back(made, tensors)
    return ConvertedRun(made, report)


def _check_data(options: Convert) -> None:
    """Raise ConfigError where attention transfer and its text do not fit each other."""
    data = options.data
    if data.prepared is not None and data.source:
        raise ConfigError("data.prepared and data.source exclude each other: both say what the text is. Leave one out")
    if options.transfer.steps and not data.is_given:
        raise ConfigError(
            f"transfer.steps is {options.transfer.steps}, and there is no text to learn on. Give --data.prepared FOLDER or "
            "--data.source TEXT"
        )
    if data.source and not options.transfer.steps:
        raise ConfigError("data.source is text for attention transfer, and transfer.steps is 0. Give --transfer.steps")
    if data.max_bytes < 1:
        raise ConfigError(f"data.max_bytes is {data.max_bytes}; it must be at least 1")


def _with_layers(config: LinearLlama3Config, options: Convert) -> LinearLlama3Config:
    """A Llama's config with the layers that are asked for."""
    pattern: Any = options.pattern[0] if len(options.pattern) == 1 else options.pattern
    operator: Any = options.operator[0] if len(options.operator) == 1 else options.operator
    names_layers = len(options.pattern) > 1 or not set(options.pattern[0]) <= set("LN")
    if names_layers or "L" not in pattern:
        # Operators are for the letter L.
        if options.operator != Convert.operator:
            raise ConfigError(
                f"operator is {', '.join(options.operator)}, and pattern {', '.join(options.pattern)} has no letter L that it "
                "could be for. Leave it out"
            )
        operator = LinearLlama3Config.operator
    return dataclasses.replace(config, pattern=pattern, operator=operator, window=options.window)


def _tokenizer(llama: Llama, data: TransferData) -> tuple[Tokenizer | None, tuple[str, ...]]:
    """The tokenizer of a run of this Llama: its own, or else that of prepared data; and what is to be said of it.

    Raises:
        DataError: where prepared data is of another tokenizer, or of another vocabulary.
    """
    own, why = _own_tokenizer(llama)
    if data.prepared is None:
        if own is None and data.source:
            raise DataError(f"{why}. Text cannot be prepared without a tokenizer; give data.prepared")
        return own, () if own is not None else (f"no tokenizer: {why}. longspan generate takes one by --data",)
    of_data = open_tokenizer_of(Path(data.prepared))
    if of_data.vocab_size != llama.config.vocab_size:
        raise DataError(
            f"{data.prepared} was prepared for {of_data.vocab_size} tokens, and {llama.path} has a vocabulary of "
            f"{llama.config.vocab_size}. Prepare it with the Llama's tokenizer: data.tokenizer {llama.path / 'tokenizer.json'}"
        )
    if own is None:
        return of_data, (f"{why}: the tokenizer is that of {data.prepared}",)
    if not same_meaning(own, of_data):
        raise DataError(
            f"{data.prepared} was prepared with another tokenizer than that of {llama.path}: its tokens would mean other text to "
            f"these weights. Prepare it with data.tokenizer {llama.path / 'tokenizer.json'}"
        )
    return own, ()


def _own_tokenizer(llama: Llama) -> tuple[Tokenizer | None, str]:
    """The tokenizer of a Llama's folder, or None and why there is none that a run can use."""
    path = llama.path / "tokenizer.json"
    if not path.is_file():
        return (
            None,
            f"{llama.path} has no tokenizer.json (AutoTokenizer.from_pretrained(...).save_pretrained writes it)",
        )
    try:
        tokenizer, _ = open_tokenizer(path, text_of_token(path, llama.end))
    except DataError as error:
        return None, str(error)
    if tokenizer.vocab_size != llama.config.vocab_size:
        return None, (
            f"{path} has {tokenizer.vocab_size} tokens, and the model {llama.config.vocab_size}: make them equal by "
            f"model.resize_token_embeddings({tokenizer.vocab_size}) and convert again"
        )
    return tokenizer, ""


def _data(options: Convert, run: RunFolder, tokenizer: Tokenizer | None) -> tuple[DataConfig, PreparedData | None]:
    """The section [data] of the run's config, and the text of attention transfer."""
    given = options.data
    if given.prepared is not None:
        section = DataConfig(prepared=str(Path(given.prepared).resolve()), documents=given.documents)
        return section, open_prepared(Path(given.prepared)) if options.transfer.steps else None
    section = DataConfig(documents=given.documents)
    if tokenizer is not None:
        section = dataclasses.replace(section, **data_keys(tokenizer, run))
    if not given.source:
        return section, None
    assert isinstance(tokenizer, JsonTokenizer)
    section = dataclasses.replace(
        section, source=given.source, max_bytes=given.max_bytes, folder=str(run.data.resolve())
    )
    prepare_corpus(Recipe.of(section, options.seed), run.data)
    return section, open_prepared(run.data)
