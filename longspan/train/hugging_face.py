"""Models between run folders and the form that Hugging Face Transformers reads, bit for bit, with their tokenizers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import stat
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspan.data.tokenizer import BYTES, ByteTokenizer, JsonTokenizer, Tokenizer
from longspan.errors import CheckpointError, ConfigError
from longspan.models import LinearLlama3, LinearLlama3Config
from longspan.models.weights import Weights, as_float32, check_shapes, open_weights, shapes_of
from longspan.train.config import Config, DataConfig, ModelConfig, TrainConfig, to_toml
from longspan.train.run_folder import RunFolder, create_run_folder, replacing
from longspan.train.tokenizer_files import read_tokenizer, write_tokenizer
from longspan.train.trained import Trained, open_trained
from longspan.train.weights_file import write_weights

PREFIX = "model."
"""What stands in front of a tensor's name in the form of Hugging Face."""

_TIED, _SOURCE = "head.weight", "embedding.weight"


@dataclass(frozen=True)
class Imported:
    """What became of a folder: the run folder, the number of tensors, and what was not there to take along, in words."""

    run: RunFolder
    num_tensors: int
    notes: tuple[str, ...]


def check_installed(what: str) -> None:
    """Raise ConfigError, for a command, where Transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            f"longspan {what} needs Transformers, which is not installed. Install it with pip install 'longspan[transformers]'"
        )


def export_model(trained: Trained, folder: Path, max_shard_size: str = "50GB") -> list[str]:
    """Write a model of a run as Transformers reads it: config, weights in safetensors, and where its tokens are text a tokenizer.

    Args:
        trained: what `open_trained` found.
        folder: made if it is not there; empty.
        max_shard_size: of a file of weights, such as ``"5GB"``; more than that is several files and an index.

    Returns:
        The names of the files.

    Raises:
        ConfigError: for a folder that is not empty, or cannot be written, or a size that is none.
    """
    from longspan.models.hf import LinearLlamaForCausalLM

    _check_empty(folder)
    tokenizer = trained.text_tokenizer
    end = None if tokenizer is None else tokenizer.end_of_document
    model = LinearLlamaForCausalLM.of(
        trained.model,
        max_position_embeddings=trained.config.train.seq_len,
        documents=trained.config.data.documents,
        bos_token_id=end,
        eos_token_id=end,
    )
    model.generation_config.pad_token_id = end
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        # safetensors lets the owner alone read what it writes.
        for file in folder.glob("*.safetensors"):
            file.chmod(stat.S_IMODE((folder / "config.json").stat().st_mode))
        if tokenizer is not None:
            config = trained.config
            write_tokenizer(tokenizer, folder, config.data.documents == "concatenate", config.train.seq_len)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error}. Make room or give access") from error
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise ConfigError(f"{folder} cannot be written: {reason}. Give another max_shard_size, such as 5GB") from error
    return sorted(path.name for path in folder.iterdir())


def import_model(folder: Path, run: str) -> Imported:
    """Make a run folder of a model that Transformers has written: its weights, its tokenizer, and the config of a run.

    Raises:
        ConfigError: for a run folder that is not empty, or a model that a run's config cannot describe.
        CheckpointError: for another architecture, pickled weights, and missing, extra or misshapen tensors, all of them listed.
        DataError: for a tokenizer that is none.
    """
    config = _read_config(folder)
    core = config.core()
    model = _meta_model(core)
    with open_weights(folder) as weights:
        names = _own_names(weights, core)
        check_shapes(
            f"the weights in {folder}",
            {own: weights.shapes[name] for own, name in names.items()},
            shapes_of(model),
            "Give the weights and the config.json that were saved together",
        )
        tensors = {own: as_float32(own, weights.read(name)) for own, name in names.items()}
    tokenizer, notes = _tokenizer_of(folder, config, core.vocab_size)
    section = model_section(core)
    made = create_run_folder(run)
    write_weights(made.weights, tensors, core)
    data = DataConfig(documents=config.documents)
    if tokenizer is not None:
        with replacing(made.tokenizer) as unfinished:
            unfinished.write_text(tokenizer.to_json(), encoding="utf-8")
        data = dataclasses.replace(data, **data_keys(tokenizer, made))
    length = config.max_position_embeddings or TrainConfig().seq_len
    train = TrainConfig(seq_len=length, batch_tokens=length, init=str(made.path.resolve()))
    with replacing(made.config) as unfinished:
        text = to_toml(Config(data=data, model=section, train=train))
        unfinished.write_text(text, encoding="utf-8")
    if tokenizer is not None:
        check_reads_back(made, tensors)
    return Imported(made, len(tensors), notes)


def model_section(core: LinearLlama3Config) -> ModelConfig:
    """The [model] section of a run whose model is `core`.

    Raises:
        ConfigError: for a model that no run's config describes.
    """
    kinds = typing.get_type_hints(ModelConfig)
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(ModelConfig):
        value = getattr(core, entry.name)
        # What is None is left out in TOML, and read back as the section's default.
        if value is None and entry.default is not None:
            value = {"num_kv_heads": core.kv_heads}.get(entry.name)
        is_list = typing.get_origin(kinds[entry.name]) is tuple
        values[entry.name] = (value,) if is_list and isinstance(value, str) else value
    section = ModelConfig(**values)
    if _shapes(section.build(core.vocab_size)) != _shapes(core):
        raise ConfigError(f"a run's config cannot describe this model: {core}. Load it with LinearLlamaForCausalLM")
    return section


def _shapes(core: LinearLlama3Config) -> dict[str, tuple[int, ...]]:
    return shapes_of(_meta_model(core))


def _meta_model(core: LinearLlama3Config) -> LinearLlama3:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return LinearLlama3(core)


def _check_empty(folder: Path) -> None:
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(
                f"{folder} is not empty: a model would be mixed up with what is there. Give another folder"
            )
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read: {error}. Give another folder") from error


def _read_config(folder: Path) -> Any:
    """A `LinearLlamaConfig`."""
    from longspan.models.hf import LinearLlamaConfig

    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. Give a folder that save_pretrained or longspan export has written"
        ) from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise CheckpointError(f"{path} does not say what model this is. Give a folder that save_pretrained has written")
    try:
        return LinearLlamaConfig.from_dict(values)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} describes no model that this version knows: {error}") from error


def _own_names(weights: Weights, core: LinearLlama3Config) -> dict[str, str]:
    """What each tensor of the files is called in this library, and in them."""
    names = {name.removeprefix(PREFIX): name for name in weights.shapes}
    both = core.tie_embeddings and _TIED in names and _SOURCE in names
    if both and torch.equal(weights.read(names[_TIED]), weights.read(names[_SOURCE])):
        del names[_TIED]
    return names


def _tokenizer_of(folder: Path, config: Any, vocab_size: int) -> tuple[Tokenizer | None, tuple[str, ...]]:
    """The tokenizer of a folder, and what is to be said of it."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None, (
            f"no tokenizer: {folder} has no tokenizer.json. longspan generate takes that of prepared data (--data)",
        )
    end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    tokenizer = read_tokenizer(path, end)
    if tokenizer.vocab_size != vocab_size:
        raise CheckpointError(
            f"{folder} has a vocabulary of {vocab_size} tokens, and its tokenizer.json one of {tokenizer.vocab_size}. Make them "
            f"equal, by model.resize_token_embeddings({tokenizer.vocab_size}), and save the model anew"
        )
    return tokenizer, ()


def data_keys(tokenizer: Tokenizer, run: RunFolder) -> dict[str, Any]:
    """How data for this model is prepared, as keys of the section [data]."""
    if isinstance(tokenizer, ByteTokenizer):
        return {"tokenizer": BYTES}
    assert isinstance(tokenizer, JsonTokenizer)
    return {"tokenizer": str(run.tokenizer.resolve()), "end_of_document": tokenizer.text_of_end}


def check_reads_back(run: RunFolder, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless the run folder has these weights, to the bit."""
    model = open_trained(run.path).model
    odd = [name for name, found in model.named_parameters() if not torch.equal(found, tensors[name])]
    if odd:
        raise CheckpointError(
            f"{run.weights} was not written as it should be: {', '.join(odd)} differ. Import it again"
        )
