"""A long prompt of a model of Transformers on the CPU: read by itself, by longspan on one rank, and over two."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import longspan
from benchmarks.harness import Table, paired, peak_bytes, require_close, run_ranks, seconds
from benchmarks.small_hybrid import small_hybrid

VOCABULARY = 512
SIDES = ("Transformers", "longspan, 1 rank", "longspan, 2 ranks")


def alone(model: Any, ids: Tensor) -> Any:
    """The cache that Transformers makes by itself."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, use_cache=True, past_key_values=cache, logits_to_keep=1)
    return cache


def side(name: str, ids: Tensor) -> Callable[[], Any]:
    """A function that reads the prompt in one of three ways and returns the cache, None on ranks that have none."""
    model = small_hybrid(256, feed_forward=512, key_heads=4, vocabulary=VOCABULARY).eval()
    if name == "Transformers":
        return lambda: alone(model, ids)
    # Made by all ranks, as new groups must be.
    of_rank_0 = dist.new_group([0])
    if name == "longspan, 2 ranks":
        parallel = longspan.parallelize(model, None)
    elif dist.get_rank() == 0:
        parallel = longspan.parallelize(copy.deepcopy(model), of_rank_0)
    else:
        return lambda: None
    return lambda: longspan.prefill(parallel, ids).cache


def prompt(seq_len: int) -> Tensor:
    return torch.randint(VOCABULARY, (1, seq_len), generator=torch.Generator().manual_seed(1))


def _times(seq_len: int, turns: int) -> list[list[list[float]]]:
    """Seconds, and seconds of a rank's processor, of each side in turn, on the slower rank; rank 1 waits where rank 0 is alone."""
    ids = prompt(seq_len)
    sides = {name: side(name, ids) for name in SIDES}
    caches = {}
    for name, run in sides.items():
        if dist.get_rank() == 0 or name == "longspan, 2 ranks":
            caches[name] = run()
        dist.barrier()
    if dist.get_rank() == 0:
        require_same(caches)
    caches.clear()
    times: list[list[list[float]]] = [[[], []] for _ in SIDES]
    for turn in range(turns):
        for name in SIDES if turn % 2 == 0 else reversed(SIDES):
            dist.barrier()
            took = torch.zeros(2, dtype=torch.float64)
            if dist.get_rank() == 0 or name == "longspan, 2 ranks":
                begun = time.process_time()
                wall = seconds(sides[name])
                took = torch.tensor([wall, time.process_time() - begun], dtype=torch.float64)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            for kind, value in zip(times[SIDES.index(name)], took.tolist(), strict=True):
                kind.append(value)
    return times


def require_same(caches: dict[str, Any]) -> None:
    """All sides leave the same keys and states."""
    want = caches["Transformers"]
    for name, cache in caches.items():
        require_close(f"keys of {name}", cache.layers[3].keys, want.layers[3].keys, 1e-3)
        for layer in range(3):
            got, expected = (c.layers[layer].recurrent_states[0] for c in (cache, want))
            require_close(f"states of {name}", got, expected, 1e-3)


def _peak_of(name: str, seq_len: int) -> int:
    warm, run = side(name, prompt(64)), side(name, prompt(seq_len))
    warm()
    return peak_bytes(run)


def prefill(quick: bool) -> Table:
    seq_len = 2048 if quick else 16384
    table = Table(
        "prefill",
        f"A prompt of {seq_len:,} tokens, 3 layers of gated delta rule and 1 of softmax (Qwen3-Next), float32, one thread a rank",
        "two ranks faster than one, with less memory on each",
        ["side", "s", "Transformers / side", "CPU s of a rank", "CPU: Transformers / side", "peak MiB of each rank"],
    )
    times = run_ranks(2, _times, seq_len, 2 if quick else 5)[0]
    for name, of_side in zip(SIDES, times, strict=True):
        num_ranks = 2 if name == "longspan, 2 ranks" else 1
        peaks = ", ".join(f"{peak / 2**20:.0f}" for peak in run_ranks(num_ranks, _peak_of, name, seq_len))
        wall, processor = (paired(first, second) for first, second in zip(times[0], of_side, strict=True))
        table.add(name, f"{wall.second:.2f}", wall.ratio, f"{processor.second:.2f}", processor.ratio, peaks)
    return table


TABLES = {"prefill": prefill}
