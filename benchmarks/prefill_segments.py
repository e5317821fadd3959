"""`prefill_segments`: memory while a prompt of growing length is read at once and in segments, by one process and by two ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.decode import prompt, small_model
from benchmarks.harness import Table, in_subprocess, peak_bytes, require_close, run_ranks
from longspan import parallelize
from longspan.models import ModelMemory, prefill
from longspan.train.memory import Releases, release_freed_memory

SEGMENT = 2048
PATTERNS = {"pure linear": "L", "hybrid": "LLLN"}
_MEBIBYTE = 2**20


def check(pattern: str) -> None:
    """Refuse figures of segments that leave anything else than the whole prompt does."""
    model, tokens = small_model(pattern), prompt(700)
    whole, found = (prefill(model, tokens, segment_tokens=segment) for segment in (None, 256))
    assert whole is not None and found is not None
    for number, (layer, expected) in enumerate(zip(found.layers, whole.layers, strict=True)):
        for name, x in layer.tensors.items():
            require_close(f"{name} of layer {number}", x, expected.tensors[name], 1e-4)


def read(pattern: str, num_tokens: int, segment: int | None) -> tuple[int, int]:
    """The most bytes of this rank above its model while a prompt is read, and those of what is remembered.

    In segments freed memory goes back to the system between them, as in `longspan generate`.
    """
    model = small_model(pattern)
    if dist.is_initialized():
        parallelize(model, None)
    prefill(model, prompt(512), segment_tokens=None if segment is None else 256)
    tokens, found = prompt(num_tokens), list[ModelMemory | None]()
    release_freed_memory()
    between = None if segment is None else Releases()
    peak = peak_bytes(lambda: found.append(prefill(model, tokens, segment_tokens=segment, between=between)))
    assert found[0] is not None
    return peak, found[0].num_bytes


def of_ranks(num_ranks: int, *arguments: Any) -> tuple[int, int]:
    """`read` of the rank that takes most."""
    if num_ranks == 1:
        found: tuple[int, int] = in_subprocess(read, *arguments)
        return found
    return max(run_ranks(num_ranks, read, *arguments))


def prefill_segments(quick: bool) -> Table:
    lengths = (4096,) if quick else (2**13, 2**14, 2**15, 2**16)
    torch.set_num_threads(1)
    table = Table(
        "prefill_segments",
        f"A prompt read at once and in segments of {SEGMENT:,} tokens: the models of the table `decode` (width 256, float32, in "
        "the hybrid keys and values of 2 heads of 64), MiB of a rank above its model at most",
        "in segments memory grows by what is remembered alone, and by a rank's own share of it until it is brought together",
        ["model", "ranks", "tokens", "MiB at once", "MiB in segments", "MiB remembered"],
    )
    for name, pattern in PATTERNS.items():
        check(pattern)
        for num_ranks in (1, 2):
            for length in lengths:
                (at_once, remembered), (in_segments, _) = (
                    of_ranks(num_ranks, pattern, length, segment) for segment in (None, SEGMENT)
                )
                cells = (f"{num_bytes / _MEBIBYTE:,.0f}" for num_bytes in (at_once, in_segments))
                table.add(name, num_ranks, f"{length:,}", *cells, f"{remembered / _MEBIBYTE:,.1f}")
                print(" | ".join(table.rows[-1]), flush=True)
    return table


TABLES: dict[str, Callable[[bool], Table]] = {"prefill_segments": prefill_segments}
