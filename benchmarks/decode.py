"""`decode`: tokens per second behind prompts of growing length, and what a model remembers of them. `decode-keys`: keys and values
of softmax layers written behind those before them, beside joining them anew for each token. `decode-prompt`: a prompt whose last
block fills its memory alone. One thread."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from benchmarks.harness import Paired, Table, in_subprocess, paired, require_close, seconds, timed_pairs
from longspan.models import LinearLlama3, LinearLlama3Config, ModelMemory, decode, prefill
from longspan.models.mixers import Context

PATTERNS = {"pure linear": "L", "hybrid, every fourth layer softmax": "LLLN", "pure softmax": "N"}


@dataclass(frozen=True)
class Behind:
    """A model behind a prompt: its bytes of memory there, and of each turn of decoding from there its seconds and those of the
    processor."""

    model: str
    num_tokens: int
    num_bytes: int
    times: list[float] = field(default_factory=list)
    processor_times: list[float] = field(default_factory=list)


def small_model(pattern: str) -> LinearLlama3:
    """Four layers of width 256, four heads of 64 channels, two of keys in softmax layers; float32, its initial weights."""
    config = LinearLlama3Config(
        vocab_size=2048, dim=256, num_layers=4, pattern=pattern, num_heads=4, num_kv_heads=2, hidden_dim=704
    )
    return LinearLlama3(config)


def prompt(num_tokens: int) -> Tensor:
    return torch.randint(2048, (num_tokens,), generator=torch.Generator().manual_seed(num_tokens))


def written(model: LinearLlama3, tokens: Tensor, memory: ModelMemory | None, num_new: int) -> list[int]:
    """The likeliest tokens behind a prompt: no turn changes the memory that it begins with."""
    return list(decode(model, tokens, memory, max_new_tokens=num_new))


def check(name: str, model: LinearLlama3, tokens: Tensor, made: list[int]) -> None:
    """Refuse to time a model whose tokens are not the likeliest of the whole sequence computed at once."""
    with torch.no_grad():
        logits = model(torch.cat([tokens, torch.tensor(made)])[None])[0, len(tokens) - 1 : -1]
    require_close(name, logits.gather(-1, torch.tensor(made)[:, None])[:, 0], logits.amax(-1), 1e-4)


def measure(lengths: tuple[int, ...], num_new: int, turns: int) -> list[Behind]:
    """Each model behind each prompt, in turn, so that what else the machine does falls on all alike; the order alternates."""
    sides = []
    found = []
    for name, pattern in PATTERNS.items():
        model = small_model(pattern)
        for length in lengths:
            tokens = prompt(length)
            memory = prefill(model, tokens)
            assert memory is not None
            made = written(model, tokens, memory, num_new)
            if length == lengths[0]:
                check(name, model, tokens, made)
            sides.append((model, tokens, memory))
            found.append(Behind(name, length, memory.num_bytes))
    for turn in range(turns):
        order = range(len(sides)) if turn % 2 == 0 else reversed(range(len(sides)))
        for index in order:
            model, tokens, memory = sides[index]
            # The first token after another model pays for what that has driven out of the caches.
            written(model, tokens, memory, 1)
            begun = time.process_time()
            found[index].times.append(seconds(partial(written, *sides[index], num_new)))
            found[index].processor_times.append(time.process_time() - begun)
    return found


def decoding(quick: bool) -> Table:
    """See the module."""
    lengths = (64, 256) if quick else (256, 2_048, 8_192, 32_768)
    num_new, turns = (8, 2) if quick else (24, 5)
    table = Table(
        "decode",
        "Decoding behind a prompt, greedy, B1, float32, one thread: 4 layers of width 256, simple_gla and softmax",
        "flat for pure linear",
        [
            "model",
            "tokens of the prompt",
            "tokens/s",
            "CPU ms a token",
            f"speed of the CPU, of that behind {lengths[0]}",
            "MiB remembered",
        ],
    )
    found = in_subprocess(measure, lengths, num_new, turns)
    for side in found:
        shortest = next(other for other in found if other.model == side.model)
        rates = [num_new / took for took in side.times]
        table.add(
            side.model,
            f"{side.num_tokens:,}",
            f"{statistics.median(rates):.0f} ({min(rates):.0f}-{max(rates):.0f})",
            f"{statistics.median(side.processor_times) / num_new * 1e3:.1f}",
            paired(shortest.processor_times, side.processor_times).ratio,
            f"{side.num_bytes / 2**20:.2f}",
        )
    return table


def given(model: LinearLlama3, tokens: Tensor, memory: ModelMemory, anew: bool) -> tuple[Tensor, ModelMemory]:
    """The last logits behind tokens ``[N]``, given one by one, and what is remembered; anew: keys are joined for each of them."""
    with torch.no_grad():
        for token in tokens:
            logits, memory = model(token.view(1, 1), memory=memory.detach() if anew else memory, output_memory=True)
    return logits, memory


def measure_keys(lengths: tuple[int, ...], num_new: int, turns: int) -> list[tuple[list[float], list[float]]]:
    """Of each prompt, seconds of the processor a turn of appending and of joining, in turn."""
    model = small_model("N")
    found = []
    for length in lengths:
        memory = prefill(model, prompt(length + 1))
        assert memory is not None
        tokens = prompt(num_new)
        if not torch.equal(given(model, tokens, memory, False)[0], given(model, tokens, memory, True)[0]):
            raise SystemExit(f"keys appended and joined behind {length} tokens give other logits")
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(turns):
            for anew in (False, True) if turn % 2 == 0 else (True, False):
                # Room is made at the second token, which a text pays for once.
                _, begins = given(model, prompt(2), memory, anew)
                begun = time.process_time()
                given(model, tokens, begins, anew)
                times[anew].append(time.process_time() - begun)
        found.append(times)
    return found


def keys(quick: bool) -> Table:
    """See the module."""
    lengths = (64, 256) if quick else (256, 2_048, 8_192, 32_768)
    num_new, turns = (8, 2) if quick else (24, 5)
    table = Table(
        "decode-keys",
        "Keys and values of softmax layers in decoding, appended and joined anew: 4 softmax layers of width 256, B1, float32",
        "the same logits, bit by bit; appended no slower",
        [
            "tokens of the prompt",
            "appended, CPU ms a token",
            "joined, CPU ms a token",
            "speed of appending over joining",
        ],
    )
    for length, (appended, joined) in zip(lengths, in_subprocess(measure_keys, lengths, num_new, turns), strict=True):
        table.add(
            f"{length:,}",
            f"{statistics.median(appended) / num_new * 1e3:.1f}",
            f"{statistics.median(joined) / num_new * 1e3:.1f}",
            paired(joined, appended).ratio,
        )
    return table


def read_whole(model: LinearLlama3, tokens: Tensor) -> ModelMemory | None:
    """A prompt whose last block computes all that a call with logits does."""
    with mock.patch.object(Context, "for_memory_alone", lambda context: context):
        return prefill(model, tokens)


def measure_prompts(lengths: tuple[int, ...], pairs: int) -> list[tuple[str, int, Paired]]:
    """Each model and length: seconds of a prompt whose last block fills its memory alone, and of one whose last block is whole."""
    torch.set_num_threads(1)
    found = []
    for name, pattern in PATTERNS.items():
        model = small_model(pattern)
        for length in lengths:
            tokens = prompt(length)
            filled, whole = prefill(model, tokens), read_whole(model, tokens)
            assert filled is not None and whole is not None
            for layer, expected in zip(filled.layers, whole.layers, strict=True):
                for key, x in layer.tensors.items():
                    require_close(f"{key} of {name}", x, expected.tensors[key], 1e-6)
            found.append(
                (name, length, timed_pairs(partial(read_whole, model, tokens), partial(prefill, model, tokens), pairs))
            )
    return found


def prompts(quick: bool) -> Table:
    """See the module."""
    lengths, pairs = ((64, 256), 1) if quick else ((2_048, 8_192, 16_384), 3)
    table = Table(
        "decode-prompt",
        "A prompt whose last block fills its memory alone, and one whose last block is whole: 4 layers of width 256, B1, float32, "
        "one thread",
        "the same memory; no slower",
        ["model", "tokens of the prompt", "ms, memory alone", "ms, whole", "whole / memory alone"],
    )
    for name, length, times in in_subprocess(measure_prompts, lengths, pairs):
        table.add(name, f"{length:,}", *times.cells(second_first=True))
    return table


TABLES = {"decode": decoding, "decode-keys": keys, "decode-prompt": prompts}
