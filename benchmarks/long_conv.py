"""Long convolutions on the CPU: transforms against taps one after another, exponentials, memory, and the gain of ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import longspan
from benchmarks.convolution import times_over_ranks
from benchmarks.harness import (
    Table,
    in_subprocess,
    paired,
    peak_bytes,
    require_close,
    run_ranks,
    timed_pairs,
)
from longspan.attention.convolution import causal_conv1d
from longspan.attention.long_convolution.operator import long_conv1d

NUM_EXPONENTIALS = 16
Tensors = dict[str, Tensor]
Side = Callable[..., Tensor]


def make_tensors(seq_len: int, channels: int, num_taps: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """x, taps, a sum of exponentials, and a gradient of y."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rates = torch.logspace(0, -3, NUM_EXPONENTIALS).expand(channels, -1)
    return {
        "x": normal(1, seq_len, channels).to(dtype).requires_grad_(),
        "taps": (normal(channels, num_taps) / num_taps**0.5).requires_grad_(),
        "log_decay": (-rates).clone().requires_grad_(),
        "coefficients": normal(channels, NUM_EXPONENTIALS).requires_grad_(),
        "grad": normal(1, seq_len, channels).to(dtype),
    }


def by_taps(tensors: Tensors, layout: Any = None, method: Any = "auto") -> Tensor:
    return long_conv1d(tensors["x"], tensors["taps"], layout=layout, method=method)


def by_state(tensors: Tensors, layout: Any = None) -> Tensor:
    kernel = longspan.ExponentialKernel(tensors["log_decay"], tensors["coefficients"])
    return long_conv1d(tensors["x"], kernel, layout=layout)


def directly(tensors: Tensors, layout: Any = None) -> Tensor:
    y = causal_conv1d(tensors["x"], tensors["taps"].flip(1), layout=layout)
    assert isinstance(y, Tensor)
    return y


def step(side: Side, tensors: Tensors, *args: Any) -> Callable[[], tuple[Tensor, ...]]:
    """A function that runs one side forward and backward and returns y and the gradients."""

    def run() -> tuple[Tensor, ...]:
        y = side(tensors, *args)
        parameters = ("log_decay", "coefficients") if side is by_state else ("taps",)
        return y, *torch.autograd.grad(y, [tensors["x"], *(tensors[name] for name in parameters)], tensors["grad"])

    return run


def _peak(side: Side, seq_len: int, channels: int, num_taps: int) -> float:
    # Short: freed memory is kept, and a first call as long as the second would leave it all that it takes.
    short = min(seq_len, 128)
    step(side, make_tensors(short, channels, min(num_taps, short)))()
    tensors = make_tensors(seq_len, channels, num_taps)
    return peak_bytes(step(side, tensors)) / tensors["x"].nbytes


def long_conv(quick: bool) -> Table:
    seq_len, channels = (1024 if quick else 16384), 256
    table = Table(
        "long_conv",
        f"long_conv1d against causal_conv1d with as many taps, forward + backward, B1 {seq_len:,} tokens, C {channels}, float32, "
        f"one thread; the last row is a sum of {NUM_EXPONENTIALS} exponentials against taps as long as the sequence",
        "transforms are faster from 64 taps on; memory linear in the tokens",
        [
            "kernel",
            "ms, long_conv1d",
            "ms, other",
            "other / long_conv1d",
            "peak over x, long_conv1d",
            "peak over x, other",
        ],
    )
    torch.set_num_threads(1)
    pairs = 3 if quick else 5
    for num_taps in (16, 32, 64, 128, 256):
        tensors = make_tensors(seq_len, channels, num_taps)
        for got, want in zip(step(by_taps, tensors)(), step(directly, tensors)(), strict=True):
            require_close(f"long_conv1d with {num_taps} taps", got, want, 1e-5)
        result = timed_pairs(step(directly, tensors), step(by_taps, tensors), pairs)
        peaks = [in_subprocess(_peak, side, seq_len, channels, num_taps) for side in (by_taps, directly)]
        table.add(f"{num_taps} taps", *result.cells(second_first=True), *(f"{peak:.2f}" for peak in peaks))
    tensors = make_tensors(seq_len, channels, seq_len)
    with torch.no_grad():
        kernel = longspan.ExponentialKernel(tensors["log_decay"].double(), tensors["coefficients"].double())
        want = long_conv1d(tensors["x"].double(), kernel.taps(seq_len))
    require_close("long_conv1d with exponentials", by_state(tensors), want, 1e-4)
    result = timed_pairs(step(by_taps, tensors), step(by_state, tensors), pairs)
    peaks = [in_subprocess(_peak, side, seq_len, channels, seq_len) for side in (by_state, by_taps)]
    cells = result.cells(second_first=True)
    table.add("exponentials; taps of the whole length", *cells, *(f"{peak:.2f}" for peak in peaks))
    return table


SIDES: dict[str, tuple[Side, Any]] = {
    "taps, by the halo": (by_taps, "halo"),
    "taps, by all-to-all": (by_taps, "all_to_all"),
    "exponentials": (by_state, None),
}


def _two_rank_times(name: str, seq_len: int, channels: int, num_taps: int, pairs: int) -> list[list[float]]:
    side, method = SIDES[name]
    whole = make_tensors(seq_len, channels, num_taps)
    options = () if method is None else (method,)
    return times_over_ranks(f"long_conv1d, {name},", partial(step, side), whole, 1e-5, pairs, *options)


def long_conv_ranks(quick: bool) -> Table:
    seq_len, channels = (2048 if quick else 32768), 256
    table = Table(
        "long_conv_ranks",
        f"long_conv1d on two ranks of one thread over one, forward + backward, {seq_len:,} tokens, B1 C {channels}, float32",
        "close to 2 times as fast",
        ["kernel", "taps", "ms, one rank", "ms, two ranks", "times as fast"],
    )
    cases = [
        ("taps, by the halo", 256),
        ("taps, by all-to-all", 256),
        ("taps, by all-to-all", seq_len),
        ("exponentials", 1),
    ]
    for name, num_taps in cases:
        alone, together = run_ranks(2, _two_rank_times, name, seq_len, channels, num_taps, 3 if quick else 7)[0]
        result = paired(alone, together)
        taps = "any" if name == "exponentials" else f"{num_taps:,}"
        table.add(name, taps, *result.cells())
    return table


TABLES = {"long_conv": long_conv, "long_conv_ranks": long_conv_ranks}
