"""What ``longspan convert`` is told."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from longspan.data.packing import Documents
from longspan.errors import ConfigError
from longspan.models import LinearLlama3Config
from longspan.train.transfer import Transfer


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


def with_layers(config: LinearLlama3Config, options: Convert) -> LinearLlama3Config:
    """A Llama's config with the layers that are asked for; raises ConfigError for such that make no model."""
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


def check_options(options: Convert, num_ranks: int) -> None:
    """Raise ConfigError where options do not fit each other, or ranks that share a sequence."""
    if not 0 <= options.seed < 2**63:
        raise ConfigError(f"seed is {options.seed}; it must be a whole number from 0 to 2^63 - 1")
    options.transfer.check()
    _check_data(options)
    if num_ranks > 1 and not options.transfer.steps:
        raise ConfigError(
            f"{num_ranks} ranks are asked for, and transfer.steps is 0: attention transfer alone runs over ranks. Give "
            "--transfer.steps, or take one process"
        )
    if options.transfer.seq_len < num_ranks:
        raise ConfigError(
            f"transfer.seq_len is {options.transfer.seq_len}, fewer tokens than the {num_ranks} ranks: each needs one. Take longer "
            "sequences, or fewer ranks"
        )


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
