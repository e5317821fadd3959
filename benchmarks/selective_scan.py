"""`selective_scan`: Mamba's scan against the slow path of Transformers, forward and backward, one thread; time and peak memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Table, in_subprocess, paired, peak_bytes, require_close, seconds
from longspan import selective_scan

CHANNELS, STATE_SIZE = 512, 16
LENGTH, SHORT = 2048, 128


def tensors_of(num_tokens: int) -> dict[str, Any]:
    """As Mamba's layers begin: rates of 1 to 16, steps of 0.001 to 0.1; tokens before channels, float32, leaves."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, num_tokens, *shape, generator=generator)

    steps = torch.empty(CHANNELS).uniform_(-6.9, -2.3, generator=generator).exp()
    tensors = {
        "u": normal(CHANNELS),
        "delta": 0.1 * normal(CHANNELS),
        "A": -torch.arange(1.0, STATE_SIZE + 1).expand(CHANNELS, STATE_SIZE).clone(),
        "B": normal(STATE_SIZE),
        "C": normal(STATE_SIZE),
        "D": torch.ones(CHANNELS),
        "z": normal(CHANNELS),
        "delta_bias": steps + torch.log(-torch.expm1(-steps)),
    }
    return {name: x.requires_grad_() for name, x in tensors.items()}


def ours(x: dict[str, Any]) -> Tensor:
    return selective_scan(**x, delta_softplus=True)


def theirs(x: dict[str, Any]) -> Tensor:
    """The function that Mamba, Falcon-Mamba and Jamba call where mamba-ssm is not installed, which has channels before tokens."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    u, delta, B, C, z = (x[name].transpose(1, 2) for name in ("u", "delta", "B", "C", "z"))
    # The function itself, without the search for a kernel in its stead.
    slow: Any = getattr(mamba_selective_scan, "__wrapped__", mamba_selective_scan)
    out: Tensor = slow(u, delta, x["A"], B, C, x["D"], z, x["delta_bias"], True)
    return out.transpose(1, 2)


SIDES: dict[str, Callable[[dict[str, Any]], Tensor]] = {"ours": ours, "theirs": theirs}


def gradients(side: str, x: dict[str, Any], upstream: Tensor) -> list[Tensor]:
    out = SIDES[side](x)
    return [out, *torch.autograd.grad(out, list(x.values()), upstream)]


def upstream_of(num_tokens: int) -> Tensor:
    return torch.randn(1, num_tokens, CHANNELS, generator=torch.Generator().manual_seed(1))


def time_sides(num_tokens: int, pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of each side, in turn, after one untimed call of each in which they are compared."""
    x, upstream = tensors_of(num_tokens), upstream_of(num_tokens)
    for name, got, want in zip(("o", *x), *(gradients(side, x, upstream) for side in SIDES), strict=True):
        require_close(f"selective_scan, {name}", got, want, 1e-4)
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for index in range(pairs):
        for side in list(SIDES) if index % 2 else list(SIDES)[::-1]:
            times[side].append(seconds(partial(gradients, side, x, upstream)))
    return times["theirs"], times["ours"]


def peak_of(side: str, num_tokens: int) -> int:
    x, upstream = tensors_of(num_tokens), upstream_of(num_tokens)
    # What a first call loads and allocates once is no memory of the scan.
    gradients(side, tensors_of(8), upstream_of(8))
    return peak_bytes(partial(gradients, side, x, upstream))


def selective_scan_table(quick: bool) -> Table:
    """Seconds and peak memory of both sides at several lengths."""
    table = Table(
        "selective_scan",
        f"Mamba's selective scan, {CHANNELS} channels, states of {STATE_SIZE}, float32, forward and backward, one thread",
        "at 2,048 tokens at least 5 times as fast as the slow path of Transformers, and at most a quarter of its memory",
        ["tokens", "theirs, s", "ours, s", "theirs / ours", "theirs, MiB", "ours, MiB", "theirs / ours, memory"],
    )
    # The other side's backward takes a time that grows with the square of the length: few pairs at the last.
    for num_tokens, pairs in [(SHORT, 2)] if quick else [(SHORT, 5), (512, 3), (LENGTH, 2)]:
        timed = paired(*in_subprocess(time_sides, num_tokens, pairs))
        memory = {side: in_subprocess(peak_of, side, num_tokens) for side in SIDES}
        table.add(
            f"{num_tokens:,}",
            f"{timed.first:.2f}",
            f"{timed.second:.3f}",
            timed.ratio.rounded(1),
            f"{memory['theirs'] / 2**20:,.0f}",
            f"{memory['ours'] / 2**20:,.0f}",
            f"{memory['theirs'] / memory['ours']:.1f}",
        )
    return table


TABLES = {"selective_scan": selective_scan_table}
