"""`loss`: the loss in chunks beside that of all logits, forward and backward: peak memory in fresh processes, and time in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Table, in_subprocess, peak_bytes, require_close, timed_pairs
from longspan import chunked_cross_entropy


@dataclass(frozen=True)
class Size:
    """Tokens, words and channels; float32."""

    num_tokens: int
    num_words: int
    width: int


Side = Callable[[Tensor, Tensor, Tensor], Tensor]


def of_all_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """PyTorch's."""
    return F.cross_entropy(F.linear(hidden, weight), labels)


SIDES: dict[str, Side] = {"chunks": chunked_cross_entropy, "all logits": of_all_logits}


def inputs(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden, weight and labels of a head whose logits are of size one."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(size.num_tokens, size.width, generator=generator)
    weight = torch.randn(size.num_words, size.width, generator=generator) * size.width**-0.5
    labels = torch.randint(size.num_words, (size.num_tokens,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def step(side: Side, given: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """The loss and the gradients of hidden and weight."""
    hidden, weight, labels = given
    loss = side(hidden, weight, labels)
    return [loss, *torch.autograd.grad(loss, (hidden, weight))]


def peak(name: str, size: Size) -> int:
    """Bytes above the inputs that a step takes, the first of its process."""
    # What a first call loads is not of its size.
    step(SIDES[name], inputs(Size(8, 8, 8)))
    given = inputs(size)
    return peak_bytes(partial(step, SIDES[name], given))


def check(size: Size) -> None:
    """Refuse to time sides that differ."""
    given = inputs(size)
    found, expected = (step(side, given) for side in SIDES.values())
    for name, x, y in zip(("loss", "gradient of hidden", "gradient of weight"), found, expected, strict=True):
        require_close(name, x, y, 1e-4)


def times(size: Size, pairs: int) -> tuple[float, float, str]:
    """Seconds of both sides, and chunks over all logits, two threads."""
    torch.set_num_threads(2)
    check(size)
    given = inputs(size)
    first, second = (partial(step, side, given) for side in SIDES.values())
    found = timed_pairs(first, second, pairs)
    return found.first, found.second, str(found.ratio)


def loss(quick: bool) -> Table:
    """See the module."""
    table = Table(
        "loss",
        "A loss of width 512, forward and backward, float32, two threads: in chunks, and of all logits",
        "peak memory at least 5 times below, time at most 1.1 of that of all logits",
        [
            "tokens",
            "words",
            "MiB, all logits",
            "MiB, chunks",
            "times below",
            "s, all logits",
            "s, chunks",
            "chunks / all logits",
        ],
    )
    for num_tokens in (2_048,) if quick else (8_192, 32_768):
        size = Size(num_tokens, 4_000 if quick else 32_000, 512)
        chunks, whole = (in_subprocess(peak, name, size) for name in SIDES)
        ours, plain, ratio = in_subprocess(times, size, 1 if quick else 5)
        memory = [f"{num_bytes / 2**20:,.0f}" for num_bytes in (whole, chunks)]
        table.add(
            f"{num_tokens:,}",
            f"{size.num_words:,}",
            *memory,
            f"{whole / chunks:.1f}",
            f"{plain:.2f}",
            f"{ours:.2f}",
            ratio,
        )
    return table


TABLES = {"loss": loss}
