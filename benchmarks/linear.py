"""Linear attention on the CPU: rate, cost of length, cost of a layout, gain of ranks, memory, and against softmax attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import longspan
from benchmarks.cluster import Cluster
from benchmarks.harness import (
    BESIDE_ONE_RANK,
    Table,
    beside_one_rank,
    in_subprocess,
    paired,
    peak_bytes,
    product_dtypes,
    require_close,
    run_ranks,
    seconds,
    seconds_of_slowest,
    timed_alone_and_together,
    timed_pairs,
)
from longspan.ops.decay.form import default_chunk_size
from longspan.ops.variants import VARIANTS

HEADS = 8
DTYPES = product_dtypes()


def make_tensors(seq_len: int, size: int, dtype: torch.dtype, operator: str = "simple_gla") -> dict[str, Tensor]:
    """q, k, v, the operator's gates and a gradient of o: B1, `HEADS` heads, K = V = `size`, keys of length 1.

    Where tokens have several steps, two, and where states have slots, 64. Vectors of a low-rank transition have the length 1, and ½
    for what writes.
    """
    generator = torch.Generator().manual_seed(0)
    steps = (2,) if VARIANTS[operator].has_steps else ()

    def normal(*steps: int) -> Tensor:
        return torch.randn(1, seq_len, *steps, HEADS, size, generator=generator)

    tensors = {
        "q": normal().to(dtype).requires_grad_(),
        "k": F.normalize(normal(*steps), dim=-1).to(dtype).requires_grad_(),
        "v": normal(*steps).to(dtype).requires_grad_(),
        "grad": normal().to(dtype),
    }
    sizes = {"B": 1, "T": seq_len, "N": 2, "H": HEADS, "K": size, "M": 64}
    for gate in VARIANTS[operator].gates:
        if gate.name in ("a", "b", "p"):
            values = F.normalize(normal(), dim=-1) * (1.0 if gate.name == "a" else 0.5)
            tensors[gate.name] = values.requires_grad_()
            continue
        uniform = torch.rand([sizes[dim] for dim in gate.dims], generator=generator)
        values = -0.1 * uniform if gate.is_log_decay else uniform
        tensors[gate.name] = values.requires_grad_(gate.differentiable)
    return tensors


def step(operator: str, tensors: dict[str, Tensor], **options: Any) -> Callable[[], Tensor]:
    """A function that runs the operator forward and backward and returns o."""
    gates = {gate.name: tensors[gate.name] for gate in VARIANTS[operator].gates}
    q, k, v = (tensors[name] for name in "qkv")
    leaves = [q, k, v, *(x for x in gates.values() if x.requires_grad)]
    call = getattr(longspan, {"gla_with_bonus": "gla"}.get(operator, operator))

    def run() -> Tensor:
        o: Tensor = call(q, k, v, **gates, **options)
        torch.autograd.grad(o, leaves, tensors["grad"])
        return o

    return run


def operations(seq_len: int, size: int, chunk: int) -> int:
    """Multiplications and additions of the chunk form's matrix products; squares of scores count whole.

    Forward: two products of scores (2 · 2 · C · D a token and head), two of states (2 · 2 · D²). Backward: five and four.
    """
    return seq_len * HEADS * ((4 + 10) * chunk * size + (4 + 8) * size * size)


def check_against_float64(operator: str) -> None:
    """The operator must be right before its speed means anything."""
    tensors = make_tensors(256, 64, torch.float32, operator)
    double = {key: x.detach().double().requires_grad_(x.requires_grad) for key, x in tensors.items()}
    require_close(operator, step(operator, tensors)(), step(operator, double, chunk_size=16)(), 1e-4)


def _products(a: Tensor) -> None:
    for _ in range(10):
        torch.bmm(a, a)


def _repeated(function: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        function()


def rate(quick: bool) -> Table:
    table = Table(
        "rate",
        "Rate of one thread, forward + backward, B1 H8",
        "at least 0.5 of the rate of a batched 256×256 matrix product of the same dtype",
        ["operator", "dtype", "K = V", "chunk", "tokens/s", "Gop/s", "of the matrix product's rate"],
    )
    seq_len = 2048 if quick else 8192
    torch.set_num_threads(1)
    for operator in ("simple_gla", "retention"):
        check_against_float64(operator)
        for name, dtype in DTYPES.items():
            a = torch.randn(16, 256, 256).to(dtype)
            for size in (64, 128):
                chunk = default_chunk_size(dtype)
                result = timed_pairs(
                    step(operator, make_tensors(seq_len, size, dtype, operator)),
                    partial(_products, a),
                    3 if quick else 9,
                )
                ours = operations(seq_len, size, chunk)
                theirs = 10 * 16 * 2 * 256**3
                shares = [ours / theirs / r for r in (result.ratio.median, result.ratio.high, result.ratio.low)]
                table.add(
                    operator,
                    name,
                    size,
                    chunk,
                    f"{seq_len / result.first:,.0f}",
                    f"{ours / result.first / 1e9:.0f}",
                    f"{shares[0]:.2f} ({shares[1]:.2f}-{shares[2]:.2f})",
                )
    return table


def length(quick: bool) -> Table:
    long, short = (32768, 4096) if quick else (262144, 16384)
    table = Table(
        "length",
        f"Time per token at {long:,} tokens over that at {short:,}, forward + backward, B1 H8 K = V = 64, one thread",
        "at most 1.10",
        ["operator", "dtype", f"µs/token at {short:,}", f"µs/token at {long:,}", "ratio"],
    )
    torch.set_num_threads(1)
    for operator in ("simple_gla", "retention"):
        for name, dtype in DTYPES.items():
            few = step(operator, make_tensors(short, 64, dtype, operator))
            many = step(operator, make_tensors(long, 64, dtype, operator))
            repeats = long // short
            result = timed_pairs(many, partial(_repeated, few, repeats), 3)
            table.add(
                operator, name, f"{result.second / long * 1e6:.2f}", f"{result.first / long * 1e6:.2f}", result.ratio
            )
    return table


def layout(quick: bool) -> Table:
    seq_len = 2048 if quick else 8192
    table = Table(
        "layout",
        f"A layout of one rank over no layout, forward + backward, {seq_len:,} tokens, B1 H8 K = V = 64, one thread",
        "at most 1.03",
        ["operator", "dtype", "ms without", "ms with", "with / without"],
    )
    torch.set_num_threads(1)
    for operator in ("linear_attention", "retention", "simple_gla"):
        for name, dtype in DTYPES.items():
            tensors = make_tensors(seq_len, 64, dtype, operator)
            one_rank = longspan.SequenceLayout(seq_len)
            result = timed_pairs(step(operator, tensors, layout=one_rank), step(operator, tensors), 5 if quick else 21)
            table.add(
                operator,
                name,
                f"{result.second * 1e3:.0f}",
                f"{result.first * 1e3:.0f}",
                result.ratio.rounded(3),
            )
    return table


def _two_rank_times(operator: str, dtype: torch.dtype, seq_len: int, pairs: int) -> list[list[float]]:
    """Times of rank 0 alone on the whole sequence, of all ranks on their shares, and of all on a whole one each, in turn."""
    whole = make_tensors(seq_len, 64, dtype, operator)
    split = longspan.SequenceLayout(seq_len)
    local = {
        key: split.shard(x.detach()).requires_grad_(x.requires_grad) if x.dim() > 2 else x for key, x in whole.items()
    }
    alone, together = step(operator, whole), step(operator, local, layout=split)
    # Rank 0's shard shows only what needs no other rank; gather, so that the rest is looked at as well.
    o = split.gather(together())
    if dist.get_rank() == 0:
        require_close(f"{operator} over ranks", o, alone(), 2e-2 if dtype == torch.bfloat16 else 1e-4)
    return timed_alone_and_together(alone, together, alone, rounds=pairs)


def ranks(quick: bool) -> Table:
    seq_len = 8192 if quick else 32768
    table = Table(
        "ranks",
        "Two ranks of one thread over one rank, whose other core is idle, and over one whose other core runs a sequence of its "
        f"own, forward + backward, {seq_len:,} tokens, B1 H8 K = V = 64",
        "at least 1.9 times as fast for the first three, 1.8 for the others",
        ["operator", "dtype", *BESIDE_ONE_RANK],
    )
    for operator in VARIANTS:
        for name, dtype in DTYPES.items():
            alone, together, busy = run_ranks(2, _two_rank_times, operator, dtype, seq_len, 3 if quick else 5)[0]
            table.add(operator, name, *beside_one_rank(together, alone, busy))
    return table


def _schedule_times(operator: str, dtype: torch.dtype, seq_len: int, pairs: int) -> tuple[list[float], list[float]]:
    """Times on all ranks of the schedule with a pass of its own for what needs no state, and of the fused pass, in turn."""
    split = longspan.SequenceLayout(seq_len)
    local = {
        key: split.shard(x.detach()).requires_grad_(x.requires_grad) if x.dim() > 2 else x
        for key, x in make_tensors(seq_len, 64, dtype, operator).items()
    }
    gates: dict[str, Any] = {gate.name: local[gate.name] for gate in VARIANTS[operator].gates}
    leaves = [local["q"], local["k"], local["v"], *(x for x in gates.values() if x.requires_grad)]

    def run(overlapped: bool) -> None:
        memory = longspan.write(operator, local["k"], local["v"], layout=split, **gates)
        o = memory.read_overlapped(local["q"]) if overlapped else memory.read(local["q"])
        torch.autograd.grad(o, leaves, local["grad"])

    times: tuple[list[float], list[float]] = ([], [])
    for index in range(pairs + 1):
        for side in (0, 1) if index % 2 else (1, 0):
            elapsed = seconds_of_slowest(partial(run, side == 0))
            if index:
                times[side].append(elapsed)
    return times


def schedule(quick: bool) -> Table:
    seq_len = 8192 if quick else 32768
    table = Table(
        "schedule",
        f"One call on two ranks: a pass of its own for what needs no state, over one fused pass; {seq_len:,} tokens, B1 H8 D64",
        "which one the one-call operators use: the fused pass where this exceeds 1",
        ["operator", "dtype", "ms, own pass", "ms, fused", "ratio"],
    )
    for operator in ("retention", "simple_gla"):
        for name, dtype in DTYPES.items():
            own, fused = run_ranks(2, _schedule_times, operator, dtype, seq_len, 3 if quick else 7)[0]
            result = paired(own, fused)
            table.add(operator, name, *result.cells())
    return table


def schedule_links(quick: bool) -> Table:
    table = Table(
        "schedule_links",
        "The two orders of one call on two hosts with slow links, B1 H8 D64, float32",
        "less than 1 where the order that hides the exchange is faster",
        ["link", "operator", "tokens", "ms, own pass", "ms, fused", "ratio"],
    )
    for rate in ("1gbit", "100mbit"):
        with Cluster(2, rate) as hosts:
            for operator in ("retention",) if quick else ("retention", "simple_gla", "gla"):
                for seq_len in (512, 4096) if quick else (512, 4096, 16384):
                    own, fused = hosts.call(_schedule_times, operator, torch.float32, seq_len, 3 if quick else 9)[0]
                    result = paired(own, fused)
                    milliseconds = (f"{seconds * 1e3:.1f}" for seconds in (result.first, result.second))
                    table.add(rate, operator, f"{seq_len:,}", *milliseconds, result.ratio)
    return table


def _peak_of_step(operator: str, dtype: torch.dtype, seq_len: int, size: int) -> float:
    """Peak memory of forward + backward, inputs and gradients included, over the bytes of q, k, v, o and their gradients."""
    step(operator, make_tensors(512, size, dtype, operator))()
    tokens_bytes = seq_len * HEADS * size * torch.empty((), dtype=dtype).element_size()
    # Random numbers are drawn in float32: for bfloat16 that would be the peak, so the inputs are made before.
    tensors = make_tensors(seq_len, size, dtype, operator)
    inputs = 4 * tokens_bytes
    return (peak_bytes(step(operator, tensors)) + inputs) / (8 * tokens_bytes)


def memory(quick: bool) -> Table:
    seq_len = 16384 if quick else 65536
    table = Table(
        "memory",
        f"Peak memory of forward + backward at {seq_len:,} tokens, B1 H8, over the bytes of q, k, v, o and their gradients",
        "at most 2.5",
        ["operator", "dtype", "K = V", "ratio"],
    )
    for operator in ("simple_gla", "retention"):
        for name, dtype in DTYPES.items():
            for size in (64, 128):
                table.add(operator, name, size, f"{in_subprocess(_peak_of_step, operator, dtype, seq_len, size):.2f}")
    return table


def _sdpa_step(tensors: dict[str, Tensor]) -> Callable[[], Tensor]:
    leaves = [tensors["q"], tensors["k"], tensors["v"]]

    def run() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in leaves)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        torch.autograd.grad(o, leaves, tensors["grad"])
        return o

    return run


def variants(quick: bool) -> Table:
    seq_len = 2048 if quick else 8192
    table = Table(
        "variants",
        f"Every variant over simple_gla, forward + backward, {seq_len:,} tokens, B1 H8, one thread, float32",
        "gla at most 2, the delta rules of one write per token at most 3",
        ["operator", "K = V", "ms", "ms, simple_gla", "ratio"],
    )
    torch.set_num_threads(1)
    for size in (64, 128):
        reference = step("simple_gla", make_tensors(seq_len, size, torch.float32, "simple_gla"))
        for operator in VARIANTS:
            if operator == "simple_gla":
                continue
            check_against_float64(operator)
            ours = step(operator, make_tensors(seq_len, size, torch.float32, operator))
            result = timed_pairs(ours, reference, 3 if quick else 7)
            table.add(operator, size, *result.cells())
    return table


def softmax(quick: bool) -> Table:
    lengths = (256, 512, 1024, 2048) if quick else (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    table = Table(
        "softmax",
        "simple_gla against causal scaled_dot_product_attention, forward + backward, B1 H8 K = V = 64, one thread",
        "the crossover length, and the ratio at 8,192 and 32,768 tokens",
        ["tokens", "dtype", "ms, simple_gla", "ms, softmax", "softmax / simple_gla"],
    )
    torch.set_num_threads(1)
    for name, dtype in DTYPES.items():
        for seq_len in lengths:
            tensors = make_tensors(seq_len, 64, dtype)
            theirs, ours = _sdpa_step(tensors), step("simple_gla", tensors)
            if seq_len > 8192:
                result = paired([seconds(theirs)], [seconds(ours)])
            else:
                result = timed_pairs(theirs, ours, 9 if seq_len <= 4096 else 3)
            table.add(f"{seq_len:,}", name, *result.cells(1, second_first=True))
    return table


TABLES = {
    "rate": rate,
    "length": length,
    "layout": layout,
    "ranks": ranks,
    "schedule": schedule,
    "schedule_links": schedule_links,
    "memory": memory,
    "softmax": softmax,
    "variants": variants,
}
