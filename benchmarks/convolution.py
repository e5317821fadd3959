"""Short convolutions on the CPU: against torch's depthwise convolution, the cost of documents, and the gain of ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import longspan
from benchmarks.harness import (
    Table,
    in_subprocess,
    paired,
    peak_bytes,
    require_close,
    run_ranks,
    timed_alone_and_together,
    timed_pairs,
)
from longspan.attention.convolution import causal_conv1d

TAPS = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}


def make_tensors(seq_len: int, channels: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """x, weight, bias and a gradient of y."""
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(1, seq_len, channels, generator=generator).to(dtype).requires_grad_(),
        "weight": (torch.randn(channels, TAPS, generator=generator) / 2).to(dtype).requires_grad_(),
        "bias": torch.randn(channels, generator=generator).to(dtype).requires_grad_(),
        "grad": torch.randn(1, seq_len, channels, generator=generator).to(dtype),
    }


def ours(tensors: dict[str, Tensor], layout: longspan.SequenceLayout | None = None) -> Tensor:
    y = causal_conv1d(tensors["x"], tensors["weight"], tensors["bias"], "silu", layout)
    assert isinstance(y, Tensor)
    return y


def of_torch(tensors: dict[str, Tensor]) -> Tensor:
    """As layers of state-space models write it where they have no kernel: pad, convolve, cut, activate."""
    x, seq_len = tensors["x"].transpose(1, 2), tensors["x"].shape[1]
    y = F.conv1d(x, tensors["weight"].unsqueeze(1), tensors["bias"], padding=TAPS - 1, groups=x.shape[1])
    return F.silu(y[..., :seq_len]).transpose(1, 2)


def step(side: Callable[..., Tensor], tensors: dict[str, Tensor], *args: Any) -> Callable[[], tuple[Tensor, ...]]:
    """A function that runs one side forward and backward and returns y and the gradients."""

    def run() -> tuple[Tensor, ...]:
        y = side(tensors, *args)
        grads = torch.autograd.grad(y, [tensors["x"], tensors["weight"], tensors["bias"]], tensors["grad"])
        return (y, *grads)

    return run


def require_right(name: str, tensors: dict[str, Tensor]) -> None:
    exact = {key: x.detach().double().requires_grad_(x.requires_grad) for key, x in tensors.items()}
    for got, want in zip(step(ours, tensors)(), step(of_torch, exact)(), strict=True):
        require_close(f"causal_conv1d in {name}", got, want, TOLERANCES[name])


def _peak(side: Callable[..., Tensor], seq_len: int, channels: int, dtype: torch.dtype) -> float:
    step(side, make_tensors(64, channels, dtype))()
    tensors = make_tensors(seq_len, channels, dtype)
    return peak_bytes(step(side, tensors)) / tensors["x"].nbytes


def convolution(quick: bool) -> Table:
    seq_len = 1024 if quick else 8192
    table = Table(
        "convolution",
        f"causal_conv1d of {TAPS} taps with SiLU against torch's conv1d, forward + backward, B1 {seq_len:,} tokens, one thread",
        "faster, with less memory",
        ["dtype", "C", "ms, ours", "ms, torch", "torch / ours", "peak over x, ours", "peak over x, torch"],
    )
    torch.set_num_threads(1)
    for name, dtype in DTYPES.items():
        for channels in (256, 1024):
            tensors = make_tensors(seq_len, channels, dtype)
            require_right(name, make_tensors(256, channels, dtype))
            result = timed_pairs(step(of_torch, tensors), step(ours, tensors), 3 if quick else 9)
            peaks = [in_subprocess(_peak, side, seq_len, channels, dtype) for side in (ours, of_torch)]
            table.add(
                name,
                channels,
                *result.cells(1, second_first=True),
                *(f"{peak:.2f}" for peak in peaks),
            )
    return table


def convolution_documents(quick: bool) -> Table:
    seq_len, channels = (1024 if quick else 8192), 512
    table = Table(
        "convolution_documents",
        f"causal_conv1d with packed documents over without, forward + backward, B1 {seq_len:,} tokens, C {channels}, one thread",
        "short documents cost little",
        ["dtype", "mean tokens of a document", "ms without", "ms with", "with / without"],
    )
    torch.set_num_threads(1)
    for name, dtype in DTYPES.items():
        for mean in (4, 32, 512):
            generator = torch.Generator().manual_seed(mean)
            lengths = torch.randint(1, 2 * mean, (seq_len,), generator=generator).tolist()
            documents = [0, *(stop for stop in accumulate(lengths) if stop < seq_len), seq_len]
            layout = longspan.SequenceLayout.local(seq_len, documents)
            tensors = make_tensors(seq_len, channels, dtype)
            result = timed_pairs(step(ours, tensors, layout), step(ours, tensors), 3 if quick else 9)
            table.add(name, mean, *result.cells(1, second_first=True))
    return table


def times_over_ranks(
    name: str,
    step_of: Callable[..., Callable[[], tuple[Tensor, ...]]],
    whole: dict[str, Tensor],
    tolerance: float,
    rounds: int,
    *options: Any,
) -> list[list[float]]:
    """Times of rank 0 alone on all tokens, and of all ranks on their shares, in turn.

    step_of: makes a step of tensors like `whole`, whose ``[1, T, C]`` are split, and over ranks of a layout and `options`.
    """
    layout = longspan.SequenceLayout(whole["x"].shape[1])
    local = {
        key: layout.shard(x.detach()).requires_grad_(x.requires_grad) if x.dim() == 3 else x for key, x in whole.items()
    }
    alone, together = step_of(whole), step_of(local, layout, *options)
    y = layout.gather(together()[0])
    if dist.get_rank() == 0:
        require_close(f"{name} over ranks", y, alone()[0], tolerance)
    return timed_alone_and_together(alone, together, rounds=rounds)


def _two_rank_times(seq_len: int, channels: int, dtype: torch.dtype, pairs: int) -> list[list[float]]:
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    return times_over_ranks(
        "causal_conv1d", partial(step, ours), make_tensors(seq_len, channels, dtype), tolerance, pairs
    )


def convolution_ranks(quick: bool) -> Table:
    seq_len, channels = (8192 if quick else 32768), 512
    table = Table(
        "convolution_ranks",
        f"causal_conv1d on two ranks of one thread over one, forward + backward, {seq_len:,} tokens, B1 C {channels}",
        "close to 2 times as fast",
        ["dtype", "ms, one rank", "ms, two ranks", "times as fast"],
    )
    for name, dtype in DTYPES.items():
        alone, together = run_ranks(2, _two_rank_times, seq_len, channels, dtype, 3 if quick else 9)[0]
        result = paired(alone, together)
        table.add(name, *result.cells())
    return table


TABLES = {
    "convolution": convolution,
    "convolution_documents": convolution_documents,
    "convolution_ranks": convolution_ranks,
}
