"""Sides of a comparison of softmax attention: what each computes, whether it is right, its times in turn with the others, its peak.

Shapes: B1, T tokens that a rank holds (N of the whole sequence), H query heads, H_kv key and value heads, D head dimension.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import longspan
from benchmarks.harness import freed_memory_is_returned, peak_bytes, run_ranks, seconds
from longspan.layout import SequenceLayout

HEADS, HEAD_DIM = 8, 64
TOLERANCE = 1e-4
LARGEST_DISTURBANCE = 0.1
"""Processor time of other programs, over the time of a call, above which it is called again."""
TRIES = 4
PATIENCE = 60.0
"""Seconds for calls that are made again, in one comparison."""

Step = Callable[[], tuple[Tensor, ...]]
"""Runs forward and backward; returns o, dq, dk and dv, [B, T, heads, D]."""


@dataclass(frozen=True)
class Setting:
    """What is attended to."""

    seq_len: int
    num_kv_heads: int = HEADS
    causal: bool = True
    window: int | None = None
    documents: tuple[int, ...] | None = None

    def layout(self, order: Literal["contiguous", "zigzag"]) -> SequenceLayout:
        return SequenceLayout(
            self.seq_len, order=order, documents=None if self.documents is None else list(self.documents)
        )


@dataclass(frozen=True)
class Tensors:
    """q and a gradient of o [1, T, H, D]; k and v [1, T, H_kv, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Tensors:
        q, k, v = (function(x.detach()).requires_grad_() for x in (self.q, self.k, self.v))
        return Tensors(q, k, v, function(self.grad))


@dataclass(frozen=True)
class Side:
    """One contestant. `kind` says which others it is compared with, `order` which tokens a rank holds."""

    name: str
    kind: str
    order: Literal["contiguous", "zigzag", "whole"]
    build: Callable[[Tensors, SequenceLayout, Setting], Step]
    """From a rank's own tensors; with the order "whole" rank 0 has all tokens, and the others stand by."""


def make_tensors(setting: Setting, num_tokens: int, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, setting.num_kv_heads, setting.num_kv_heads, HEADS)
    q, k, v, grad = (torch.randn(1, num_tokens, n, HEAD_DIM, generator=generator, dtype=dtype) for n in heads)
    return Tensors(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad)


def our_step(method: str, tensors: Tensors, layout: SequenceLayout | None, setting: Setting) -> Step:
    leaves = [tensors.q, tensors.k, tensors.v]

    def run() -> tuple[Tensor, ...]:
        o = _attend(method, tensors, layout, setting)
        return (o, *torch.autograd.grad(o, leaves, tensors.grad))

    return run


def _attend(method: str, tensors: Tensors, layout: SequenceLayout | None, setting: Setting) -> Tensor:
    options: dict[str, Any] = {"window": setting.window, "method": method}
    return longspan.softmax_attention(tensors.q, tensors.k, tensors.v, causal=setting.causal, layout=layout, **options)


def our_step_alone(tensors: Tensors, layout: SequenceLayout, setting: Setting) -> Step:
    """One process with one thread."""
    local = SequenceLayout.local(setting.seq_len, None if setting.documents is None else list(setting.documents))
    return our_step("auto", tensors, local, setting)


def plain_step(num_threads: int, tensors: Tensors, layout: SequenceLayout | None, setting: Setting) -> Step:
    """One process: PyTorch's `scaled_dot_product_attention`, with a mask where `is_causal` does not say it all."""
    leaves = [tensors.q, tensors.k, tensors.v]
    masked = setting.window is not None or setting.documents is not None
    mask = _mask(setting) if masked else None

    def run() -> tuple[Tensor, ...]:
        with _threads(num_threads):
            q, k, v = (x.transpose(1, 2) for x in leaves)
            o = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=setting.causal and not masked, enable_gqa=setting.num_kv_heads != HEADS
            ).transpose(1, 2)
            return (o, *torch.autograd.grad(o, leaves, tensors.grad))

    return run


def _mask(setting: Setting) -> Tensor:
    """Which keys [N] each query [N] sees."""
    positions = torch.arange(setting.seq_len)
    distance = positions.unsqueeze(1) - positions
    visible = distance >= 0 if setting.causal else torch.ones_like(distance, dtype=torch.bool)
    if setting.window is not None:
        visible &= distance.abs() < setting.window
    if setting.documents is not None:
        document = torch.searchsorted(torch.tensor(setting.documents), positions, right=True)
        visible &= document.unsqueeze(1) == document
    return visible


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


FLOOR = Side("one process, two threads", "floor", "whole", partial(plain_step, 2))
ALONE = Side("one process, one thread", "alone", "whole", our_step_alone)


def ours(method: str, order: Literal["contiguous", "zigzag"]) -> Side:
    return Side(method, method, order, partial(our_step, method))


def largest_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Of the outputs and gradients: the largest difference over the largest expected value; infinite for a NaN."""
    errors = []
    for x, y in zip(got, expected, strict=True):
        error = float((x.detach().double() - y.detach().double()).abs().max() / y.detach().double().abs().max())
        errors.append(error if error == error else float("inf"))
    return max(errors)


@dataclass(frozen=True)
class Measured:
    """A side's error, its times (the slowest rank's) and processor times (the busiest one's); none for a side that is wrong."""

    error: float
    times: tuple[float, ...]
    busiest: tuple[float, ...]

    @property
    def is_right(self) -> bool:
        return self.error <= TOLERANCE


def measure(setting: Setting, sides: Sequence[Side], rounds: int, num_ranks: int = 2) -> list[Measured]:
    """Check every side on gloo ranks of one thread each against plain attention, then time those that are right, in turn."""
    measured: list[Measured] = run_ranks(num_ranks, _measure_on_rank, setting, tuple(sides), rounds)[0]
    return measured


def _measure_on_rank(setting: Setting, sides: tuple[Side, ...], rounds: int) -> list[Measured]:
    whole = make_tensors(setting, setting.seq_len)
    is_first = dist.get_rank() == 0
    expected = plain_step(dist.get_world_size(), whole, None, setting)() if is_first else None
    steps, errors = [], []
    for side in sides:
        layout = setting.layout("contiguous" if side.order == "whole" else side.order)
        if side.order == "whole":
            step = side.build(whole, layout, setting) if is_first else _stand_by
            results = step()
        else:
            step = side.build(whole.map(layout.shard), layout, setting)
            results = tuple(layout.gather(x.detach()) for x in step())
        error = torch.tensor([largest_error(results, expected) if expected is not None else 0.0])
        dist.all_reduce(error, dist.ReduceOp.MAX)
        steps.append(step)
        errors.append(float(error))
    # All ranks know the errors, so all leave out the same sides.
    right = [index for index, error in enumerate(errors) if error <= TOLERANCE]
    calls = dict(zip(right, in_turn([steps[index] for index in right], rounds), strict=True))
    return [
        Measured(
            error,
            tuple(call.seconds for call in calls.get(index, ())),
            tuple(call.busiest for call in calls.get(index, ())),
        )
        for index, error in enumerate(errors)
    ]


def _stand_by() -> tuple[Tensor, ...]:
    return ()


@dataclass(frozen=True)
class Call:
    """One call of a step on all ranks."""

    seconds: float
    """Wall time of the slowest rank."""
    busiest: float
    """Processor time of the rank that worked most: the wall time if nobody had to wait, for a rank or for a core."""
    is_disturbed: bool
    """Whether other programs took much of the machine meanwhile; the same on every rank."""


def in_turn(steps: Sequence[Callable[[], object]], rounds: int) -> list[list[Call]]:
    """Calls of every step. A round has one of each; every round starts with another step.

    A call that other programs disturb is made again, as long as `TRIES` and `PATIENCE` last.
    """
    calls: list[list[Call]] = [[] for _ in steps]
    patience = PATIENCE
    for round_ in range(rounds):
        for turn in range(len(steps)):
            index = (round_ + turn) % len(steps)
            for _ in range(TRIES):
                call = _call(steps[index])
                if not call.is_disturbed or call.seconds > patience:
                    break
                patience -= call.seconds
            calls[index].append(call)
    return calls


def _call(step: Callable[[], object]) -> Call:
    dist.barrier()
    before, machine = os.times(), _user_seconds_of_machine()
    elapsed = seconds(step)
    after = os.times()
    user, system = after.user - before.user, after.system - before.system
    largest = torch.tensor([elapsed, user + system], dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    of_machine = _user_seconds_of_machine() - machine if dist.get_rank() == 0 else 0.0
    others = torch.tensor([of_machine - user], dtype=torch.float64)
    dist.all_reduce(others)
    slowest, busiest = largest.tolist()
    return Call(slowest, busiest, float(others) > LARGEST_DISTURBANCE * slowest)


def _user_seconds_of_machine() -> float:
    """Processor time of all programs since the machine was started (Linux; elsewhere nothing is known of others)."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    user, nice = path.read_text().split(maxsplit=3)[1:3]
    return (int(user) + int(nice)) / os.sysconf("SC_CLK_TCK")


def peak_of_side(setting: Setting, side: Side, num_ranks: int = 2) -> int:
    """Growth of the peak resident memory of a fresh process in forward and backward, the largest of the ranks.

    The shares of q, k, v and the gradient of o are there before, and not counted; o and the gradients of q, k and v are.
    """
    with freed_memory_is_returned():
        return max(run_ranks(num_ranks, _peak_on_rank, setting, side))


def _peak_on_rank(setting: Setting, side: Side) -> int:
    _step_of_share(_short(setting), side)()
    return peak_bytes(_step_of_share(setting, side))


def kept_by_method(setting: Setting, method: str, order: Literal["contiguous", "zigzag"], num_ranks: int = 2) -> int:
    """Resident memory that attention keeps in a fresh process between forward and backward, the largest of the ranks.

    The output is counted; q, k and v are as far as attention itself holds on to them: nobody else does.
    """
    with freed_memory_is_returned():
        return max(run_ranks(num_ranks, _kept_on_rank, setting, method, order))


def _kept_on_rank(setting: Setting, method: str, order: Literal["contiguous", "zigzag"]) -> int:
    for this in (_short(setting), setting):
        layout = this.layout(order)
        leaves = make_tensors(this, layout.num_local_tokens)
        before = _resident_bytes()
        o = _attend_to_copies(method, leaves, layout, this)
        # gloo's threads let go of a finished collective's tensors a moment after it was waited for.
        dist.barrier()
        time.sleep(0.1)
        kept = _resident_bytes() - before
        torch.autograd.grad(o, [leaves.q, leaves.k, leaves.v], leaves.grad)
        # Gone before the next one is measured.
        del o
    return kept


def _attend_to_copies(method: str, leaves: Tensors, layout: SequenceLayout, setting: Setting) -> Tensor:
    """Attention to q, k and v that only attention knows, as after a projection or a rotary embedding."""
    q, k, v = (x + 0.0 for x in (leaves.q, leaves.k, leaves.v))
    return _attend(method, Tensors(q, k, v, leaves.grad), layout, setting)


def _short(setting: Setting) -> Setting:
    """For the first call, which starts threads and connections."""
    return Setting(512, setting.num_kv_heads, setting.causal, setting.window)


def _step_of_share(setting: Setting, side: Side) -> Step:
    """A step on numbers of its own: whole tensors, cut into shares and freed, might leave memory behind that a peak hides in."""
    layout = setting.layout("contiguous" if side.order == "whole" else side.order)
    if side.order != "whole":
        return side.build(make_tensors(setting, layout.num_local_tokens), layout, setting)
    return side.build(make_tensors(setting, setting.seq_len), layout, setting) if dist.get_rank() == 0 else _stand_by


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
