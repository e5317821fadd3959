"""``longspan convert``: a run folder made of the folder of a Llama."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from longspan.data.prepare import prepare_corpus
from longspan.data.prepared import PreparedData, open_prepared, open_tokenizer_of
from longspan.data.recipe import Recipe
from longspan.data.tokenizer import Tokenizer
from longspan.errors import DataError
from longspan.launch import Place
from longspan.layout import Order
from longspan.models import LinearLlama3Config
from longspan.models.conversion import Converted, Llama, convert, read_llama
from longspan.models.weights import open_weights
from longspan.train.config import Config, DataConfig, ModelConfig, TrainConfig, to_toml
from longspan.train.conversion_options import Convert, TransferData, check_options, with_layers
from longspan.train.conversion_report import ConversionReport
from longspan.train.hugging_face import check_reads_back, data_keys, model_section
from longspan.train.init import same_meaning
from longspan.train.ranks import Ranks
from longspan.train.run_folder import RunFolder, create_run_folder, replacing
from longspan.train.tokenizer_files import read_tokenizer
from longspan.train.transfer import Transferred, transfer_attention
from longspan.train.weights_file import write_weights


@dataclass(frozen=True)
class ConvertedRun:
    """The run folder that was made, and the report that lies in it."""

    run: RunFolder
    report: ConversionReport


@dataclass(frozen=True)
class _Begun:
    """What every rank makes of the Llama by itself: the model, the section of a run's config, the tokenizer, what is to be said."""

    llama: Llama
    config: LinearLlama3Config
    section: ModelConfig
    converted: Converted
    tokenizer: Tokenizer | None
    notes: tuple[str, ...]


def convert_llama(
    options: Convert, say: Callable[[int, float], None], ranks: Ranks | None = None, order: Order = "zigzag"
) -> ConvertedRun:
    """Make a run folder of a Llama; the first of several ranks writes it.

    say: called after each step of attention transfer with its number and the mean of the layers' errors. ranks: that share each
    sequence of it, all of which make this call; None is this process alone, on the CPU. order: which tokens of it a rank takes.

    Raises:
        ConfigError: for layers that make no model, a folder that is not empty, or options that do not fit each other.
        CheckpointError: for another architecture, pickled weights, and missing, extra or misshapen tensors, all of them listed.
        DataError: for text of another tokenizer.
    """
    ranks = ranks or Ranks(Place(), torch.device("cpu"))
    check_options(options, ranks.sp)
    begun = ranks.together(lambda: _begin(options))
    converted, tokenizer = begun.converted, begun.tokenizer
    made = RunFolder(Path(ranks.from_first(lambda: _make_folder(options, tokenizer))))
    data_section, data = _data(options, made, tokenizer, ranks)
    transferred: Transferred | None = None
    if options.transfer.steps and converted.teachers:
        assert data is not None
        for module in (converted.model, *converted.teachers.values()):
            module.to(ranks.device)
        transferred = transfer_attention(
            *(converted.model, converted.teachers, data, options.transfer, options.data.documents, options.seed, say),
            *(ranks, order),
        )
    report = ConversionReport(
        str(begun.llama.path),
        begun.config.layer_operators,
        converted.tensors,
        options.transfer,
        transferred,
        begun.notes,
    )
    ranks.from_first(lambda: _write(options, made, begun, data_section, report))
    return ConvertedRun(made, report)


def _begin(options: Convert) -> _Begun:
    llama = read_llama(Path(options.folder))
    config = with_layers(llama.config, options)
    section = model_section(config)
    with open_weights(llama.path) as weights:
        converted = convert(llama, weights, config, options.seed)
    tokenizer, notes = _tokenizer(llama, options.data)
    return _Begun(llama, config, section, converted, tokenizer, notes)


def _make_folder(options: Convert, tokenizer: Tokenizer | None) -> str:
    """The run folder, with the tokenizer in it."""
    # What a conversion left that was refused on its way, such as prepared text, is gone on with; its config is written last.
    made = create_run_folder(options.to, or_begun=not RunFolder(Path(options.to)).config.exists())
    if tokenizer is not None:
        with replacing(made.tokenizer) as unfinished:
            unfinished.write_text(tokenizer.to_json(), encoding="utf-8")
    return str(made.path)


def _write(
    options: Convert, made: RunFolder, begun: _Begun, data_section: DataConfig, report: ConversionReport
) -> None:
    """Weights, report, and then the config of the run."""
    tensors = {name: parameter.detach().cpu() for name, parameter in begun.converted.model.named_parameters()}
    write_weights(made.weights, tensors, begun.config)
    length = begun.llama.length or TrainConfig().seq_len
    train = TrainConfig(seed=options.seed, seq_len=length, batch_tokens=length, init=str(made.path.resolve()))
    texts = {
        made.conversion_json: report.as_json(),
        made.conversion_text: report.as_markdown(),
        made.config: to_toml(Config(data=data_section, model=begun.section, train=train)),
    }
    for path, text in texts.items():
        with replacing(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    if begun.tokenizer is not None:
        check_reads_back(made, tensors)


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
        tokenizer = read_tokenizer(path, llama.end)
    except DataError as error:
        return None, str(error)
    if tokenizer.vocab_size != llama.config.vocab_size:
        return None, (
            f"{path} has {tokenizer.vocab_size} tokens, and the model {llama.config.vocab_size}: make them equal by "
            f"model.resize_token_embeddings({tokenizer.vocab_size}) and convert again"
        )
    return tokenizer, ""


def _data(
    options: Convert, run: RunFolder, tokenizer: Tokenizer | None, ranks: Ranks
) -> tuple[DataConfig, PreparedData | None]:
    """The section [data] of the run's config, and the text of attention transfer."""
    given = options.data
    section = DataConfig(documents=given.documents)
    if given.prepared is not None:
        folder = Path(given.prepared)
        section = dataclasses.replace(section, prepared=str(folder.resolve()))
        return section, _opened(folder, ranks) if options.transfer.steps else None
    if tokenizer is not None:
        section = dataclasses.replace(section, **data_keys(tokenizer, run))
    if not given.source:
        return section, None
    section = dataclasses.replace(
        section, source=given.source, max_bytes=given.max_bytes, folder=str(run.data.resolve())
    )
    recipe = Recipe.of(section, options.seed)
    ranks.from_first(lambda: prepare_corpus(recipe, run.data))
    return section, _opened(run.data, ranks)


def _opened(folder: Path, ranks: Ranks) -> PreparedData:
    """Prepared text, checked on every rank, and the same on all of them."""
    data = ranks.together(lambda: open_prepared(folder))
    ranks.agree(data.fingerprint)
    return data
