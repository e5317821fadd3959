"""What a training run is told, checked before any rank starts: values out of their range, and values that do not fit each other."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import fields
from typing import Any

from longspan.attention.softmax.checks import check_heads_of_ulysses
from longspan.data.recipe import ASKED_FOR
from longspan.data.tokenizer import BPE
from longspan.errors import ConfigError, InputError
from longspan.parallel import MeshDegrees
from longspan.streaming.streamed import check_exchange
from longspan.train.config import Config, DataConfig, flatten
from longspan.train.data import recall_task

YEAR = 31_536_000
"""Seconds: the longest that a rank may be told to wait."""


def check(config: Config) -> None:
    """Check what can be checked before any rank starts.

    Raises:
        ConfigError: for a value out of its range, or values that do not fit each other.
    """
    for key, value in flatten(config).items():
        _check_text_and_size(key, value)
    for key, least in _LEAST.items():
        value = flatten(config)[key]
        if value is not None and not value >= least:
            raise ConfigError(f"{key} is {value}; it must be at least {least}")
    for key, value in flatten(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key} is {value}; it must be a finite number")
    for key in ("data.validation_fraction", "optim.beta1", "optim.beta2"):
        value = flatten(config)[key]
        if not 0.0 < value < 1.0:
            raise ConfigError(f"{key} is {value}; it must lie between 0 and 1")
    for key in ("optim.lr", "optim.clip_norm", "optim.eps", "parallel.timeout_seconds"):
        value = flatten(config)[key]
        if not value > 0.0:
            raise ConfigError(f"{key} is {value}; it must be greater than 0")
    if config.parallel.timeout_seconds > YEAR:
        raise ConfigError(
            f"parallel.timeout_seconds is {config.parallel.timeout_seconds}; it must be at most {YEAR}, a year"
        )
    _check_task(config)
    _check_data(config.data)
    model = config.model.build(vocab_size=257)
    if config.parallel.softmax_method == "ulysses" and "softmax" in model.layer_operators:
        try:
            check_heads_of_ulysses(model.num_heads, config.parallel.sp)
        except InputError as error:
            raise ConfigError(f"parallel.softmax_method: {error} (parallel.sp, model.num_heads)") from error
    exchange = config.parallel.build_exchange()
    if config.parallel.exchange_error_feedback and config.train.recompute == "layer":
        raise ConfigError(
            "parallel.exchange_error_feedback is True and train.recompute 'layer': a layer that is computed again would send what "
            "it has left out a second time. Take train.recompute 'selective', which sends nothing again"
        )
    if config.train.segment_tokens is not None:
        try:
            check_exchange(exchange)
        except InputError as error:
            raise ConfigError(
                f"{error} (parallel.exchange_error_feedback, train.segment_tokens {config.train.segment_tokens})"
            ) from error
    if config.parallel.weights is None and config.parallel.balance != ("even",) and config.train.deterministic:
        raise ConfigError(
            f"train.deterministic is True and parallel.balance {config.parallel.balance[0]!r}: what is measured differs from run "
            "to run, and so would the sums. Give parallel.balance as numbers, such as those that a run reports, or leave it out"
        )
    if (
        config.parallel.given_rank_order is None
        and config.parallel.rank_order != ("given",)
        and config.train.deterministic
    ):
        raise ConfigError(
            f"train.deterministic is True and parallel.rank_order {config.parallel.rank_order[0]!r}: what is measured differs from "
            "run to run, and so would the sums. Give parallel.rank_order as numbers, as those that a run reports, or leave it out"
        )
    if config.train.deterministic and config.parallel.threads not in (None, 1):
        raise ConfigError(
            f"train.deterministic is True and parallel.threads {config.parallel.threads}: the order of sums depends on the "
            "number of threads. Leave parallel.threads out, which is 1 then, or train.deterministic"
        )
    if config.run.go_on and config.run.dir is None:
        raise ConfigError("run.go_on is True, but run.dir is not given: say which run to go on with, by run.dir")
    for name in ("tensorboard", "wandb"):
        if getattr(config.run, name) and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"run.{name} is True, but the package {name} is not installed. Install it with "
                f"pip install 'longspan[{name}]', or leave the key out: metrics.jsonl has the same numbers"
            )
    for key in ("run.trace_step", "run.memory_snapshot_step"):
        recorded = flatten(config)[key]
        if recorded is not None and recorded > config.train.steps:
            raise ConfigError(
                f"{key} {recorded} comes after the last step, train.steps {config.train.steps}. Record an earlier one"
            )
    if config.train.batch_tokens % config.train.seq_len:
        near = max(1, round(config.train.batch_tokens / config.train.seq_len)) * config.train.seq_len
        raise ConfigError(
            f"train.batch_tokens {config.train.batch_tokens} is no multiple of train.seq_len {config.train.seq_len}: a "
            f"global batch holds whole sequences. The nearest multiple is {near}"
        )
    if config.train.seq_len < config.parallel.sp:
        raise ConfigError(
            f"train.seq_len {config.train.seq_len} is shorter than parallel.sp {config.parallel.sp}: each rank needs a "
            "token. Use a longer sequence or fewer ranks"
        )
    _check_segments(config)


def _check_segments(config: Config) -> None:
    train, sp = config.train, config.parallel.sp
    if train.segment_tokens is None:
        for name, default in (("segment_memory_every", 1), ("segment_offload", False), ("segment_reduce_each", False)):
            if getattr(train, name) != default:
                raise ConfigError(
                    f"train.{name} is {getattr(train, name)}, and train.segment_tokens is not given: sequences are computed whole. "
                    "Give train.segment_tokens, or leave it out"
                )
    elif train.segment_tokens < sp:
        raise ConfigError(
            f"train.segment_tokens {train.segment_tokens} is less than parallel.sp {sp}: each rank needs a token of a segment. The "
            f"least that works is {sp}"
        )
    elif train.segment_reduce_each and config.parallel.dp_shard == 1 and not config.parallel.shard_over_sp:
        raise ConfigError(
            "train.segment_reduce_each is True, and no weights are divided (parallel.dp_shard 1, parallel.shard_over_sp False): "
            "each rank holds whole gradients in any case. Divide weights, or leave it out"
        )


_KEYS_OF_PREPARATION = (*ASKED_FOR, "folder")
_KEYS_OF_TEXT = tuple(entry.name for entry in fields(DataConfig) if entry.name not in ("task", "vocab_size"))


def _check_data(data: DataConfig) -> None:
    if not data.source:
        raise ConfigError("data.source is empty; it must name at least one source")
    if any(not (math.isfinite(weight) and weight > 0.0) for weight in data.weights):
        raise ConfigError(f"data.weights is {list(data.weights)}; each must be a finite number greater than 0")
    if data.prepared is not None:
        changed = [key for key in _KEYS_OF_PREPARATION if getattr(data, key) != getattr(DataConfig(), key)]
        if changed:
            raise ConfigError(
                f"data.prepared is given, and so is data.{changed[0]}, which says how data is prepared: what is in "
                f"{data.prepared!r} was prepared already. Leave one of them out"
            )
    elif data.weights and len(data.weights) != len(data.source):
        raise ConfigError(
            f"data.weights has {len(data.weights)} numbers for the {len(data.source)} sources of data.source. Give one for each"
        )


def _check_task(config: Config) -> None:
    """Refuse what is said of another task than the one that is trained on."""
    if config.data.task == "text":
        if config.data.tokenizer == BPE and config.data.prepared is None and config.data.vocab_size < 257:
            raise ConfigError(f"data.vocab_size is {config.data.vocab_size}; it must be at least 257")
        others, unused = {"recall"}, "what is said of recall"
    else:
        recall_task(config)
        others, unused = {"data", "sample"}, "what is said of text"
    defaults = flatten(Config())
    for key, value in flatten(config).items():
        section, name = key.split(".")
        if section in others and (section != "data" or name in _KEYS_OF_TEXT) and value != defaults[key]:
            raise ConfigError(
                f"data.task is {config.data.task!r}, which takes nothing of {unused}; got {key} {value!r}. Leave it out, or give "
                "another data.task"
            )


def _check_text_and_size(key: str, value: Any) -> None:
    """Refuse text that neither a file of the run nor a terminal can take, and numbers that are no 64-bit integers."""
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ConfigError(
                    f"{key} is {text!r}, which is not UTF-8 at character {error.start}. Give text in UTF-8; rename a file "
                    "or folder whose name is not"
                ) from error
            if "\0" in text:
                raise ConfigError(f"{key} is {text!r}; it must not hold a character of value 0")
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{key} is {value}; it must be less than 2^63")


def num_ranks_asked_for(config: Config) -> int:
    """Ranks that a command starts on one machine: what the degrees say, with one copy of the weights where they do not."""
    parallel = config.parallel
    return (parallel.dp_replicate or 1) * parallel.dp_shard * parallel.sp


def check_degrees(config: Config, world_size: int) -> MeshDegrees:
    """The mesh of a world of `world_size` ranks.

    Raises:
        ConfigError: if the degrees do not make up the world, or the batch does not divide.
    """
    parallel = config.parallel
    others = parallel.dp_shard * parallel.sp
    replicate = parallel.dp_replicate if parallel.dp_replicate is not None else max(1, world_size // others)
    degrees = MeshDegrees(replicate, parallel.dp_shard, parallel.sp, parallel.shard_over_sp)
    degrees.check_world(world_size, "parallel.")
    if config.batch_sequences % degrees.data:
        raise ConfigError(
            f"train.batch_tokens {config.train.batch_tokens} is {config.batch_sequences} sequences of train.seq_len "
            f"{config.train.seq_len}, which parallel.dp_replicate {replicate} x parallel.dp_shard {parallel.dp_shard} does not "
            f"divide. Use a multiple of {degrees.data * config.train.seq_len} tokens"
        )
    return degrees


_LEAST: dict[str, float] = {
    "data.max_bytes": 1,
    "data.vocab_size": 1,
    "recall.pairs": 1,
    "parallel.sp": 1,
    "parallel.dp_shard": 1,
    "parallel.dp_replicate": 1,
    "parallel.threads": 1,
    "optim.warmup_steps": 0,
    "optim.final_lr_fraction": 0,
    "optim.weight_decay": 0,
    "train.seed": 0,
    "train.steps": 1,
    "train.seq_len": 1,
    "train.batch_tokens": 1,
    "train.micro_batch_sequences": 1,
    "train.segment_tokens": 1,
    "train.segment_memory_every": 1,
    "train.check_tokens": 0,
    "train.check_replicas_every": 0,
    "train.max_skipped_steps": 1,
    "validation.every": 0,
    "validation.sequences": 1,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "sample.tokens": 0,
    "sample.temperature": 0,
    "run.print_every": 1,
    "run.release_memory_every": 0,
    "run.trace_step": 1,
    "run.memory_snapshot_step": 1,
}
