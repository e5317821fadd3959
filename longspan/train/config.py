"""What a training run is told: dataclasses, one a section; a TOML file; ``--section.key value`` on the command line.

Later sources override earlier ones: defaults; the TOML file (or, on resume, the run's own ``config.toml``); the command
line.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from longspan.attention.softmax import SoftmaxMethod
from longspan.errors import ConfigError, InputError, LayoutError
from longspan.exchange import CODECS, TOPOLOGIES, Auto, Codec, Exchanger, TopK
from longspan.layout.shares import check_weights
from longspan.models import PRESETS, LinearLlama3Config, preset

PRESET = "preset"
"""The key of [model] that stands for all others, which then change it: it is read, and not kept."""
_LISTS = ("operator", "pattern")


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
    """Pairs of a key and a value in a sequence; each key is asked for once."""
    power: float = 0.01
    """The further behind the pairs the rarer a query, as n^(power - 1); 1 has them anywhere alike."""


@dataclass(frozen=True)
class ModelConfig:
    """The Linear-Llama3 to train; its vocabulary is the data's."""

    dim: int = 128
    """Width of the residual stream."""
    num_layers: int = 4
    """Number of blocks."""
    pattern: tuple[str, ...] = ("LLLN",)
    """Kind of each layer, repeated over the layers: L linear attention, N softmax attention; or the mixer of each layer by name."""
    operator: tuple[str, ...] = ("simple_gla",)
    """What the L layers are (simple_gla, gla, gated_deltanet, mamba2, ...): one name for all of them, or one for each."""
    num_heads: int = 2
    """Query heads of a layer."""
    num_kv_heads: int | None = 1
    """Key and value heads of a softmax layer (grouped queries); None is num_heads."""
    head_dim: int | None = None
    """Size of a head; None is dim / num_heads."""
    window: int | None = None
    """How many tokens a softmax layer sees, the token itself included; None is all before it."""
    hidden_dim: int = 352
    """Width of the feed-forward layers, or of each of their experts."""
    num_experts: int = 0
    """Experts of a feed-forward layer, of which each token takes a few; 0 is a layer that takes all tokens."""
    experts_per_token: int = 2
    """Experts that a token takes, the likeliest by the router."""
    num_shared_experts: int = 0
    """Experts that every token takes beside its own."""
    balance_loss_weight: float = 0.01
    """Of the loss of each layer that is least where all experts are chosen equally often."""
    z_loss_weight: float = 0.001
    """Of the loss of each layer that keeps the router's logits small."""
    feed_forward_chunk: int = 0
    """Tokens that feed-forward layers compute at once, and again in backward, to keep nothing of their width; 0 is all, once."""
    rope_theta: float = 500_000.0
    """Base of the rotary embedding in softmax layers."""
    rope_factor: float = 1.0
    """How many times slower the slowest channels of the rotary embedding turn (Llama 3.1's scaling); 1 leaves all as they are."""
    rope_low_freq_factor: float = 1.0
    """Channels that turn less often than this over rope_original_length are among the slowest."""
    rope_high_freq_factor: float = 4.0
    """Channels that turn more often than this over rope_original_length stay as they are."""
    rope_original_length: int = 8192
    """Tokens of the sequences that a model was trained on before rope_factor."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Use the embedding's matrix for the output, too."""

    def build(self, vocab_size: int) -> LinearLlama3Config:
        """What the model itself is told.

        Raises:
            ConfigError: for values that make no model.
        """
        lists = {"operator": self.operator, "pattern": self.pattern}
        values = vars(self) | {name: value[0] if len(value) == 1 else value for name, value in lists.items()}
        try:
            return LinearLlama3Config(vocab_size, **values)
        except ConfigError as error:
            raise ConfigError(f"[model] {error}") from error

    @classmethod
    def of_preset(cls, name: str) -> ModelConfig:
        """The model of `longspan.models.PRESETS`, all values of this section, whatever it has otherwise.

        Raises:
            ConfigError: for a preset that does not exist.
        """
        try:
            full = preset(name)
        except ConfigError as error:
            raise ConfigError(f"model.preset: {error}") from error
        values = {entry.name: getattr(full, entry.name) for entry in dataclasses.fields(cls)}
        lists = {key: (value,) if isinstance(value, str) else value for key, value in values.items() if key in _LISTS}
        return cls(**(values | lists))


@dataclass(frozen=True)
class ParallelConfig:
    """How many ranks, and what each of them holds."""

    sp: int = 2
    """Sequence-parallel degree: ranks that share one sequence."""
    dp_shard: int = 1
    """Ranks over which a copy of the weights is divided (FSDP2); they train on different sequences."""
    dp_replicate: int | None = None
    """Copies of the weights; None takes 1, or under torchrun the ranks that dp_shard and sp leave."""
    shard_over_sp: bool = False
    """Divide the weights over the ranks that share a sequence as well."""
    order: Literal["contiguous", "zigzag"] = "zigzag"
    """Which tokens of a sequence a rank holds: one run of them, or two that balance causal softmax layers (zigzag)."""
    balance: tuple[Literal["even", "measured", "remeasured"] | float, ...] = ("even",)
    """Share of each sequence that a rank holds: equal ones (even); by its speed, measured before the first step and kept when the
    run goes on (measured), or measured again (remeasured); or a number for each of the sp ranks, in proportion to the others."""
    exchange: str = "auto"
    """How linear layers exchange their states: a topology of docs/exchange.md, or the fastest as measured at the start (auto)."""
    exchange_dtype: Literal["float32", "bfloat16", "float8", "int8", "top_k"] = "float32"
    """What states travel in: rounded (bfloat16), one byte and scales (float8, int8), or the largest of each head alone (top_k);
    sums stay float32."""
    exchange_top_k: float = 0.1
    """Share of a head's numbers that top_k sends."""
    exchange_error_feedback: bool = False
    """Let top_k add what it has left out to what the layer sends next."""
    exchange_max_relative_error: float | None = None
    """With exchange auto: let the cost model choose what states travel in, with at most so large an error of one passage."""
    softmax_method: SoftmaxMethod = "auto"
    """How softmax layers exchange their keys and values."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes GPUs if there is one for each local rank."""
    threads: int | None = None
    """CPU threads of a rank; None divides the cores between the local ranks."""
    timeout_seconds: float = 600.0
    """Give up when a collective has waited this long for another rank."""

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The numbers of `balance`; None where it is a word.

        Raises:
            ConfigError: for words and numbers together, and for numbers that are no weights of `sp` ranks.
        """
        words = [entry for entry in self.balance if isinstance(entry, str)]
        if len(words) == len(self.balance) == 1:
            return None
        if words or not self.balance:
            raise ConfigError(
                f"parallel.balance is {list(self.balance)}; it must be 'even', 'measured', 'remeasured', or one number for each of "
                f"the {self.sp} ranks of parallel.sp"
            )
        numbers = tuple(entry for entry in self.balance if not isinstance(entry, str))
        try:
            check_weights(numbers, self.sp)
        except LayoutError as error:
            raise ConfigError(f"parallel.balance: {error}") from error
        return numbers

    def build_exchange(self, measure: bool = True) -> Exchanger:
        """How linear layers are told to exchange their states. measure: whether auto chooses by what it measures, or by figures.

        Raises:
            ConfigError: for a topology that does not exist.
        """
        if self.exchange != "auto" and self.exchange not in TOPOLOGIES:
            raise ConfigError(
                f"parallel.exchange must be 'auto' or one of {', '.join(map(repr, TOPOLOGIES))}; got {self.exchange!r}"
            )
        state_dtype, codec = self._wire()
        if self.exchange == "auto":
            try:
                return Auto(
                    state_dtype, measure=measure, max_relative_error=self.exchange_max_relative_error, codec=codec
                )
            except InputError as error:
                raise ConfigError(f"parallel.exchange_max_relative_error: {error}") from error
        if self.exchange_max_relative_error is not None:
            raise ConfigError(
                f"parallel.exchange_max_relative_error is {self.exchange_max_relative_error}, by which parallel.exchange 'auto' "
                f"chooses; parallel.exchange is {self.exchange!r}. Leave one of them out, or name a parallel.exchange_dtype"
            )
        return TOPOLOGIES[self.exchange](state_dtype, codec=codec)

    def _wire(self) -> tuple[torch.dtype | None, Codec | None]:
        """What states are rounded to, and what they are coded by."""
        if self.exchange_dtype == "top_k":
            try:
                return None, TopK(self.exchange_top_k, self.exchange_error_feedback)
            except InputError as error:
                raise ConfigError(f"parallel.exchange_top_k: {error}") from error
        for name, default in (("exchange_top_k", 0.1), ("exchange_error_feedback", False)):
            if getattr(self, name) != default:
                raise ConfigError(
                    f"parallel.{name} is {getattr(self, name)}, which is an option of parallel.exchange_dtype 'top_k'; it is "
                    f"{self.exchange_dtype!r}. Leave parallel.{name} out"
                )
        if self.exchange_dtype in CODECS:
            return None, CODECS[self.exchange_dtype]()
        return (torch.bfloat16 if self.exchange_dtype == "bfloat16" else None), None


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, warm-up and cosine."""

    lr: float = 3e-3
    """Highest learning rate."""
    warmup_steps: int = 15
    """Steps until the highest learning rate."""
    final_lr_fraction: float = 0.1
    """Learning rate of the last step, as a fraction of the highest."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of the mean of squared gradients."""
    weight_decay: float = 0.1
    """Decoupled decay, of matrices alone."""
    clip_norm: float = 1.0
    """Scale gradients down to this norm."""


@dataclass(frozen=True)
class TrainConfig:
    """Length of the run and of its sequences."""

    seed: int = 0
    """Decides the initial weights, the data's split and order, and the sampled text."""
    init: str | None = None
    """A run folder whose newest weights this run begins with, such as longspan import makes; None draws them from the seed."""
    steps: int = 150
    """Optimizer steps."""
    seq_len: int = 8192
    """Tokens of a sequence, before it is split over the ranks."""
    batch_tokens: int = 8192
    """Tokens of a global batch, whatever the number of ranks."""
    micro_batch_sequences: int | None = None
    """Sequences that a rank computes at once; None takes all of its part of the batch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What layers compute in. Weights, gradients' sums and the optimizer are float32, and so are memory states."""
    segment_tokens: int | None = None
    """Compute sequences in segments of so many tokens, with the activations of one and the whole's gradients; None does not."""
    segment_memory_every: int = 1
    """Keep what enters every n-th segment, and compute it once more for the others: less memory, at most one more forward pass."""
    segment_offload: bool = False
    """Keep keys and values of earlier segments, and their gradients, in host memory, and copy them to the device for each use."""
    recompute: Literal["none", "layer", "selective"] = "none"
    """Keep no activations of a layer, and compute them again in backward: all, or but for what exchanges brought (selective)."""
    compile: bool = False
    """Compile each layer by torch.compile; the first steps take longer."""
    check_tokens: int = 65_536
    """Compare this much of the first batch with a single process, which holds all weights, before the first step; 0 does not."""
    check_replicas_every: int = 0
    """Steps between two comparisons of the weights of ranks that must hold the same, bit for bit; 0 makes none."""
    deterministic: bool = False
    """The same bits from run to run: deterministic operations, one CPU thread, an exchange chosen without measuring."""
    max_skipped_steps: int = 10
    """Stop after this many steps in a row whose loss or gradient is not finite."""


@dataclass(frozen=True)
class ValidationConfig:
    """The loss on held-out text."""

    every: int = 50
    """Steps between two validations; 0 validates at the end alone."""
    sequences: int = 8
    """Sequences of a validation."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What a run can go on from."""

    every: int = 50
    """Steps between two checkpoints; 0 writes one at the end alone."""
    keep: int = 2
    """Keep this many of the newest complete checkpoints."""
    asynchronous: bool = True
    """Train on while files are written, from a copy of what a rank writes; a checkpoint counts once it is complete."""
    allow_older: bool = False
    """Go on from an older checkpoint where newer ones are damaged; the run says so, and renames these to damaged-step-...."""


@dataclass(frozen=True)
class SampleConfig:
    """The text that is generated at the end."""

    prompt: str = "def "
    """Text to go on from."""
    tokens: int = 200
    """Tokens to generate; 0 generates none."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""


@dataclass(frozen=True)
class RunConfig:
    """Where a run's files go, and what it prints."""

    dir: str | None = None
    """The run folder; None takes runs/ and the time of the start."""
    go_on: bool = False
    """Where run.dir holds a run, go on with it from its newest checkpoint, or its beginning: for jobs that are started again."""
    measure_alone: bool = True
    """At the end, let one more process make a few steps on whole sequences, and say what the split bought."""
    release_memory_every: int = 8
    """Give freed memory back to the system after this many steps, on the CPU; 1 keeps a rank smallest and costs about a tenth of a
    step's time, 0 never does."""
    print_every: int = 10
    """Steps between two printed lines where there is no terminal for a progress bar."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard, too (needs the extra longspan[tensorboard])."""
    wandb: bool = False
    """Send the metrics to Weights & Biases, too (needs the extra longspan[wandb])."""
    wandb_project: str = "longspan"
    """Project of Weights & Biases."""
    memory_snapshot_step: int | None = None
    """Write a snapshot of a GPU's memory over this optimizer step, counted from 1, into traces/, one file per rank."""
    trace_step: int | None = None
    """Write a Chrome trace of this optimizer step, counted from 1, into traces/ in the run folder, one file per rank."""


@dataclass(frozen=True)
class Config:
    """Everything that a training run is told."""

    data: DataConfig = field(default_factory=DataConfig)
    recall: RecallConfig = field(default_factory=RecallConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def batch_sequences(self) -> int:
        """Sequences of a global batch."""
        return self.train.batch_tokens // self.train.seq_len


def known_keys() -> list[str]:
    """Every key as ``section.key``."""
    return list(flatten(Config()))


def flatten(config: Config) -> dict[str, Any]:
    """The values by ``section.key``."""
    values = {
        f"{section.name}.{entry.name}": getattr(getattr(config, section.name), entry.name)
        for section in dataclasses.fields(config)
        for entry in dataclasses.fields(getattr(config, section.name))
    }
    if values["model.num_kv_heads"] is None:
        # A file has no None, and leaving the key out is another number.
        values["model.num_kv_heads"] = values["model.num_heads"]
    return values


def read_toml(path: Path) -> Config:
    """The defaults, overridden by a TOML file.

    Raises:
        ConfigError: if the file cannot be read, or has an unknown key or a value of a wrong type.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as a config: {error}. Give a TOML file") from error
    try:
        return from_mapping(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def from_mapping(values: dict[str, Any]) -> Config:
    """The defaults, overridden by ``{section: {key: value}}``, as TOML and JSON give it.

    Raises:
        ConfigError: for an unknown key or a value of a wrong type.
    """
    config = Config()
    for section, entries in values.items():
        if section not in _section_names():
            raise unknown_key(section)
        if not isinstance(entries, dict):
            raise ConfigError(f"{section} is {entries!r}; it is a section of keys: [{section}]")
        current = getattr(config, section)
        if section == "model" and PRESET in entries:
            current = ModelConfig.of_preset(_check_type(f"model.{PRESET}", entries[PRESET], str))
            entries = {key: value for key, value in entries.items() if key != PRESET}
        kinds = typing.get_type_hints(type(current))
        for key in entries:
            if key not in kinds:
                raise unknown_key(f"{section}.{key}")
        checked = {key: _check_type(f"{section}.{key}", value, kinds[key]) for key, value in entries.items()}
        config = dataclasses.replace(config, **{section: dataclasses.replace(current, **checked)})
    return config


def to_mapping(config: Config) -> dict[str, Any]:
    """``{section: {key: value}}`` with lists for tuples: what `from_mapping` takes; a value of None is left out."""
    mapping: dict[str, Any] = {name: {} for name in _section_names()}
    for key, value in flatten(config).items():
        section, name = key.split(".")
        if value is not None:
            mapping[section][name] = list(value) if isinstance(value, tuple) else value
    return mapping


def to_toml(config: Config) -> str:
    """The config as TOML that `read_toml` gives back."""
    lines = []
    for section, entries in to_mapping(config).items():
        lines += [f"[{section}]", *(f"{key} = {_toml_value(value)}" for key, value in entries.items()), ""]
    return "\n".join(lines)


def check_arguments(arguments: Sequence[str], others: Sequence[str] = ()) -> None:
    """Raise ConfigError for an option that is neither a key nor one of `others`."""
    for argument in arguments:
        if not argument.startswith("--") or argument == "--":
            continue
        name = argument[2:].split("=", 1)[0].replace("-", "_")
        if name not in {*known_keys(), *others}:
            raise unknown_key(name, others, option=True)


def take_preset(arguments: Sequence[str], config: Config) -> tuple[list[str], Config]:
    """Split off ``--model.preset NAME``: (the other arguments, the config with the model of that name, for these to change).

    Raises:
        ConfigError: for a preset that does not exist, or none.
    """
    option, remaining = f"--model.{PRESET}", list(arguments)
    for place, argument in enumerate(remaining):
        name, equals, value = argument.partition("=")
        if name == option:
            if not equals and place + 1 == len(remaining):
                raise ConfigError(f"{option} needs a name: {option} {next(iter(PRESETS))}")
            model = ModelConfig.of_preset(value if equals else remaining[place + 1])
            del remaining[place : place + (1 if equals else 2)]
            return take_preset(remaining, dataclasses.replace(config, model=model))
    return remaining, config


def unknown_key(key: str, others: Sequence[str] = (), option: bool = False) -> ConfigError:
    """The error for a key that does not exist; it names the nearest one that does."""
    keys = [*known_keys(), f"model.{PRESET}"]
    sections = _section_names()
    dash = "--" if option else ""
    if key in _FORMER_KEYS:
        return ConfigError(f"{dash}{key} is no {'option' if option else 'key'} any more: {_FORMER_KEYS[key]}")
    near = difflib.get_close_matches(key, [*keys, *others], n=1, cutoff=0.6)
    if not near:
        # A right name in a wrong section, or without one.
        last = key.rsplit(".", 1)[-1]
        last_names = {name.split(".")[1]: name for name in reversed(keys)}
        near = [last_names[name] for name in difflib.get_close_matches(last, list(last_names), n=1, cutoff=0.7)]
    hint = f"did you mean {dash}{near[0]}?" if near else f"the sections are {', '.join(sections)}"
    return ConfigError(f"unknown {'option' if option else 'key'} {dash}{key}: {hint} (longspan train --help lists all)")


def differences(old: Config, new: Config) -> list[str]:
    """One line for each key whose values differ."""
    before, after = flatten(old), flatten(new)
    return [f"{key}: {before[key]!r} -> {after[key]!r}" for key in before if before[key] != after[key]]


_FORMER_KEYS = {
    "parallel.dp": "data-parallel ranks either hold copies of the weights, parallel.dp_replicate, or share one, parallel.dp_shard"
}

_FIXED_SECTIONS = ("data", "recall", "model")
_FIXED_KEYS = ("train.seed", "train.seq_len", "train.batch_tokens")


def changes_what_is_trained(old: Config, new: Config) -> list[str]:
    """One line for each difference that a resumed run cannot have: of the model, the data, or their order."""
    return [
        line
        for line in differences(old, new)
        if line.split(":")[0] not in ("data.folder", "data.prepared", "data.verify")
        and (line.split(".")[0] in _FIXED_SECTIONS or line.split(":")[0] in _FIXED_KEYS)
    ]


def _section_names() -> list[str]:
    return [section.name for section in dataclasses.fields(Config)]


def _check_type(key: str, value: Any, kind: Any) -> Any:
    """`value` as TOML gives it, as the type that the dataclass declares."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is Literal:
        if value in typing.get_args(kind):
            return value
        raise ConfigError(f"{key} is {value!r}; it must be one of {', '.join(map(repr, typing.get_args(kind)))}")
    if typing.get_origin(kind) is tuple:
        value = [value] if isinstance(value, str) else value
        (entry_kind, _) = typing.get_args(kind)
        if entry_kind is float:
            if isinstance(value, list) and all(type(entry) in (int, float) for entry in value):
                return tuple(_as_float(key, entry) if type(entry) is int else entry for entry in value)
            raise ConfigError(f"{key} is {value!r}; it must be a list of numbers")
        if typing.get_origin(entry_kind) in (types.UnionType, typing.Union):
            return tuple(_word_or_number(key, entry, entry_kind) for entry in _as_list(value))
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            return tuple(value)
        raise ConfigError(f"{key} is {value!r}; it must be a string or a list of strings")
    if kind is float and type(value) is int:
        value = _as_float(key, value)
    if type(value) is not kind:
        raise ConfigError(f"{key} is {value!r}, {_article(type(value).__name__)}; it must be {_article(kind.__name__)}")
    return value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _word_or_number(key: str, entry: Any, kind: Any) -> str | float:
    """An entry of a list of words, which the type names, or numbers."""
    words = next(typing.get_args(part) for part in typing.get_args(kind) if typing.get_origin(part) is Literal)
    if type(entry) is int:
        return _as_float(key, entry)
    if type(entry) is not float and entry not in words:
        raise ConfigError(f"{key} has {entry!r}; it must be one of {', '.join(map(repr, words))}, or a list of numbers")
    return typing.cast(str | float, entry)


def _as_float(key: str, value: int) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise ConfigError(f"{key} has {len(str(value))} digits; it must be a finite number") from error


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(entry) for entry in value) + "]"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
