"""Check and measure the kernels on one NVIDIA GPU: ``python -m benchmarks.gpu [TABLE ...] [--quick] [--out FILE]``.

Every side is compared with float64 before it is timed, and a wrong one is not reported. Sides are timed in turn, by the GPU's
own clock, and quoted as medians with the spread of the pairs. Where flash-linear-attention is installed (``pip install
'longspan[fla]'``) it is the peer; without it its columns say so. ``--interpreter`` runs everything on the CPU in Triton's
interpreter with tiny sizes, to see that it runs: its figures mean nothing, and are not printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

import longspan
from benchmarks.gpu_sides import OPERATORS, Case, Inputs, exact, fla_side, flash_attention, make_inputs, ours, step
from benchmarks.harness import Ratio, Table, machine, paired, save
from longspan.layout import SequenceLayout
from longspan.ops.variants import VARIANTS
from longspan.ops.variants.variant import ChunkForm

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Gpu:
    """Where it runs, how long a measurement is, and the ceilings of the device."""

    device: torch.device
    repeats: int
    copy_rate: float = 1.0
    matmul_rate: float = 1.0

    @property
    def is_real(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until everything that was issued is done."""
        if self.is_real:
            torch.cuda.synchronize(self.device)

    def host_seconds(self, function: Callable[[], object]) -> float:
        """Time that the host takes to issue one call; the GPU's work is not waited for."""
        self.wait()
        begun = time.perf_counter()
        function()
        return time.perf_counter() - begun

    def seconds(self, function: Callable[[], object]) -> float:
        """Time of one call, on the GPU's clock: of the slower of the two, the host that issues and the GPU that computes."""
        if not self.is_real:
            return self.host_seconds(function)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.wait()
        begin.record()
        function()
        end.record()
        self.wait()
        return begin.elapsed_time(end) / 1e3

    def in_turn(self, sides: Sequence[Callable[[], object]], of_host: bool = False) -> list[list[float]]:
        """Times of every side, one call of each a round, after two rounds that are not counted."""
        times: list[list[float]] = [[] for _ in sides]
        warm_up = 2 if self.is_real else 0
        for round_ in range(self.repeats + warm_up):
            for index, side in enumerate(sides):
                elapsed = self.host_seconds(side) if of_host else self.seconds(side)
                if round_ >= warm_up:
                    times[index].append(elapsed)
        return times

    def median(self, function: Callable[[], object]) -> float:
        return statistics.median(self.in_turn([function])[0])


def measured(gpu: Gpu) -> Gpu:
    """The same with its ceilings: bytes a second of a copy (read and written), operations a second of a bfloat16 product."""
    if not gpu.is_real:
        return gpu
    x = torch.empty(2**30, dtype=torch.uint8, device=gpu.device)
    y = torch.empty_like(x)
    a = torch.randn(8192, 8192, device=gpu.device, dtype=torch.bfloat16)
    copy = 2 * x.numel() / gpu.median(lambda: y.copy_(x))
    return replace(gpu, copy_rate=copy, matmul_rate=2 * 8192**3 / gpu.median(lambda: a @ a))


def largest_error(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Of the outputs and gradients, relative to each one's largest value; infinite for a NaN."""
    errors = [
        float((x.detach().double() - y.detach()).abs().max() / y.detach().abs().max())
        for x, y in zip(got, expected, strict=True)
    ]
    return max(error if error == error else float("inf") for error in errors)


def correctness(gpu: Gpu, quick: bool) -> Table:
    """Every operator, dtype, size and packing against float64; a wrong kernel ends the run."""
    table = Table(
        "correctness",
        "Largest error of outputs and gradients against float64",
        "below the tolerance everywhere",
        ["operator", "dtype", "error", "tolerance"],
    )
    lengths, sizes, heads = ((33,), (16,), 1) if quick else ((1, 63, 1000, 5000), (64, 128, 256, 80), 2)
    for operator in OPERATORS:
        for dtype, tolerance in TOLERANCE.items():
            worst = 0.0
            for seq_len in lengths:
                for size in sizes:
                    documents = (0, seq_len // 3, seq_len // 2, seq_len) if seq_len > 30 else None
                    for packed in (None, documents):
                        case = Case(operator, seq_len, size, heads=heads, dtype=dtype, documents=packed)
                        inputs = make_inputs(case, gpu.device)
                        worst = max(worst, largest_error(step(ours, inputs), exact(inputs)))
            if not worst <= tolerance:
                raise SystemExit(f"{operator} in {dtype}: relative error {worst:.1e}; nothing is timed")
            table.add(operator, str(dtype).removeprefix("torch."), f"{worst:.0e}", f"{tolerance:.0e}")
    return table


def grid(quick: bool) -> list[Case]:
    """B1 T 8K to 512K with H16 D128; D 64 and 256; many rows; packed documents."""
    if quick:
        return [Case(operator, 32, 16, heads=1) for operator in OPERATORS]
    cases = []
    for operator in OPERATORS:
        cases += [Case(operator, seq_len) for seq_len in (8192, 32768, 131072, 524288)]
        cases += [Case(operator, 2048, size, batch=8, heads=heads) for size, heads in ((64, 64), (128, 32), (256, 32))]
        cases += [Case(operator, 32768, size) for size in (64, 256)]
        cases.append(Case(operator, 65536, documents=tuple(range(0, 65537, 4096))))
        cases.append(Case(operator, 65536, documents=(0, *range(257, 65536, 509), 65536)))
    return cases


def _forward(attend: Callable[[Inputs], Tensor], inputs: Inputs) -> None:
    with torch.no_grad():
        attend(inputs)


def speed(gpu: Gpu, quick: bool) -> Table:
    table = Table(
        "speed",
        f"Our kernels against flash-linear-attention {installed('flash-linear-attention')}, same inputs",
        "forward + backward at T ≥ 8K: 1.3 times for simple_gla and retention, 1.2 for gla, 3 at D 256; never behind. Share of the "
        "ceiling: ideal bytes over a copy's rate, or operations over a product's, whichever takes longer, over the time",
        ["case", "pass", "ms", "ms, fla", "times as fast", "GB/s", "share of the ceiling"],
    )
    for case in grid(quick):
        inputs = make_inputs(case, gpu.device)
        peer, note = fla_side(case), "not installed"
        if peer is not None:
            try:
                error = largest_error(step(peer, inputs), step(ours, inputs))
                note = "" if error <= 5 * TOLERANCE[case.dtype] else f"differs by {error:.0e}"
            except Exception as problem:  # a peer that cannot run a case is a fact about the peer
                note = type(problem).__name__
        for backward in (False, True):
            run = step if backward else _forward
            sides = [partial(run, side, inputs) for side in ((ours,) if note or peer is None else (ours, peer))]
            times = gpu.in_turn(sides)
            mine = statistics.median(times[0])
            ratio = paired(times[1], times[0]).ratio if len(times) > 1 else note
            theirs = f"{statistics.median(times[1]) * 1e3:.3f}" if len(times) > 1 else note
            num_bytes = case.ideal_bytes(backward)
            ideal = max(num_bytes / gpu.copy_rate, case.operations(backward) / gpu.matmul_rate)
            name = "forward + backward" if backward else "forward"
            table.add(
                case, name, f"{mine * 1e3:.3f}", theirs, ratio, f"{num_bytes / mine / 1e9:.0f}", f"{ideal / mine:.2f}"
            )
        del inputs
    return table


def host(gpu: Gpu, quick: bool) -> Table:
    """The host's share does not depend on the sizes; where a call of the GPU is shorter, it is what counts."""
    table = Table(
        "host",
        "Time of the host to issue forward + backward, whatever the sizes; short sequences take no less",
        "no more than flash-linear-attention",
        ["operator", "ms", "ms, fla", "times as fast"],
    )
    for operator in OPERATORS:
        case = Case(operator, 32, 16, heads=1) if quick else Case(operator, 256, 64, heads=2)
        inputs, peer = make_inputs(case, gpu.device), fla_side(case)
        sides = [partial(step, side, inputs) for side in (ours, peer) if side is not None]
        times = gpu.in_turn(sides, of_host=True)
        mine = f"{statistics.median(times[0]) * 1e3:.3f}"
        if peer is None:
            table.add(operator, mine, "not installed", "")
        else:
            table.add(operator, mine, f"{statistics.median(times[1]) * 1e3:.3f}", paired(times[1], times[0]).ratio)
    return table


def norm(gpu: Gpu, quick: bool) -> Table:
    table = Table(
        "norm",
        "rms_norm_gated over heads: one kernel each way against PyTorch's operations, as they are and compiled, bfloat16",
        "ahead of PyTorch's, or the kernel does not pay. Share of the ceiling: ideal bytes over a copy's rate, over the time",
        [
            "rows",
            "D",
            "pass",
            "ms",
            "ms, PyTorch",
            "times as fast",
            "ms, compiled",
            "times as fast",
            "share of the ceiling",
        ],
    )
    # Compiling for a CPU would only take time here.
    sides_of_norm: list[Callable[..., Tensor]] = [partial(longspan.rms_norm_gated, backend="triton"), _norm_by_torch]
    sides_of_norm += [torch.compile(_norm_by_torch)] if gpu.is_real else []
    for rows, size in ((32, 16),) if quick else ((8192 * 16, 128), (131072 * 16, 128), (32768 * 8, 256), (32768, 2048)):
        x, gate, grad = (torch.randn(rows, size, device=gpu.device).bfloat16() for _ in range(3))
        weight = torch.ones(size, device=gpu.device)
        leaves = [leaf.requires_grad_() for leaf in (x, gate, weight)]
        calls = [partial(side, x, gate, weight) for side in sides_of_norm]
        results = [_norm_step(call, leaves, grad) for call in calls]
        for result in results[1:]:
            error = largest_error(results[0], tuple(x.double() for x in result))
            if not error <= TOLERANCE[torch.bfloat16]:
                raise SystemExit(f"rms_norm_gated: relative error {error:.1e}; nothing is timed")
        for backward in (False, True):
            sides: list[Callable[[], object]] = [
                partial(_norm_step, call, leaves, grad) if backward else partial(_without_graph, call) for call in calls
            ]
            times = gpu.in_turn(sides)
            cells: list[object] = [f"{statistics.median(times[0]) * 1e3:.3f}"]
            for other in times[1:]:
                cells += [f"{statistics.median(other) * 1e3:.3f}", paired(other, times[0]).ratio]
            cells += [""] * (5 - len(cells))
            # x, gate and y; backward x, gate and ∂y again, and their gradients.
            num_bytes = rows * size * 2 * (8 if backward else 3)
            ideal = num_bytes / gpu.copy_rate / statistics.median(times[0])
            name = "forward + backward" if backward else "forward"
            table.add(f"{rows:,}", size, name, *cells, f"{ideal:.2f}")
    return table


def _norm_by_torch(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return longspan.rms_norm_gated(x, gate, weight, backend="torch")


def _norm_step(call: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    y = call()
    return (y, *torch.autograd.grad(y, leaves, grad))


def _without_graph(call: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        call()


def softmax(gpu: Gpu, quick: bool) -> Table:
    table = Table(
        "softmax",
        "simple_gla against PyTorch's causal flash attention, forward + backward, B1 H16 D128 bfloat16",
        "the length from which linear attention is faster, and the ratio at 65,536",
        ["tokens", "ms, simple_gla", "ms, flash attention", "times as fast"],
    )
    for seq_len in () if quick or not gpu.is_real else (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536):
        inputs = make_inputs(Case("simple_gla", seq_len), gpu.device)
        plain = replace(inputs, gates={})
        times = gpu.in_turn([partial(step, ours, inputs), partial(step, flash_attention, plain)])
        result = paired(times[1], times[0])
        table.add(f"{seq_len:,}", *result.cells(3, second_first=True))
    return table


def _on_one_rank(inputs: Inputs, layout: SequenceLayout, incoming: Tensor) -> tuple[Tensor, ...]:
    """What one of several ranks computes, forward and backward, when `incoming` [1, B, H, K, V] arrives and costs nothing."""
    case = inputs.case
    form: ChunkForm = VARIANTS[case.operator].prepare(inputs.k, inputs.v, inputs.gates, layout, None, "triton")
    ends = form.write(inputs.k, inputs.v, None, (0,), (0,))
    o = form.read(inputs.q, lambda: incoming, case.size**-0.5, overlapped=False)
    leaves = [*inputs.leaves, incoming]
    return torch.autograd.grad([o, ends], leaves, [inputs.grad, torch.ones_like(ends)])


def split(gpu: Gpu, quick: bool) -> Table:
    table = Table(
        "split",
        "What the split costs: one process over P times the work of one rank, the exchange left out, forward + backward",
        "above 0.85 at 4 ranks; with a layout of one rank at most 1.03 of no layout",
        ["operator", "tokens", "ms, one process", "with a layout / without", "ranks", "ms, a rank", "share of linear"],
    )
    seq_len, size, heads = (64, 16, 1) if quick else (131072, 128, 16)
    for operator in OPERATORS:
        whole = make_inputs(Case(operator, seq_len, size, heads=heads), gpu.device)
        local = SequenceLayout.local(seq_len)
        for num_ranks in (4,) if quick else (2, 4, 8):
            inputs = make_inputs(Case(operator, seq_len // num_ranks, size, heads=heads), gpu.device)
            layout = SequenceLayout.for_rank(seq_len, num_ranks, 1)
            incoming = torch.randn(1, 1, inputs.case.heads, size, size, device=gpu.device).requires_grad_()
            times = gpu.in_turn(
                [
                    partial(step, ours, whole),
                    partial(step, partial(ours, layout=local), whole),
                    partial(_on_one_rank, inputs, layout, incoming),
                ]
            )
            one = paired(times[1], times[0])
            shares = sorted(a / (num_ranks * b) for a, b in zip(times[0], times[2], strict=True))
            share = Ratio(statistics.median(shares), shares[0], shares[-1])
            rank = statistics.median(times[2])
            table.add(
                operator,
                f"{seq_len:,}",
                f"{one.second * 1e3:.3f}",
                one.ratio.rounded(3),
                num_ranks,
                f"{rank * 1e3:.3f}",
                share,
            )
    return table


def first_call(gpu: Gpu, quick: bool) -> Table:
    table = Table(
        "first_call",
        "Seconds of the first forward + backward of a size: compiling, and trying the launch settings",
        "known; later processes read the choice from Triton's cache",
        ["operator", "head size", "s, first", "ms, later"],
    )
    for operator in OPERATORS:
        # A size that no other table has.
        case = Case(operator, 32, 16, heads=1) if quick else Case(operator, 4096, 112)
        inputs = make_inputs(case, gpu.device)
        begun = time.perf_counter()
        step(ours, inputs)
        gpu.wait()
        taken = time.perf_counter() - begun
        table.add(operator, inputs.case.size, f"{taken:.2f}", f"{gpu.median(partial(step, ours, inputs)) * 1e3:.3f}")
    return table


TABLES = {
    "correctness": correctness,
    "first_call": first_call,
    "host": host,
    "speed": speed,
    "softmax": softmax,
    "split": split,
    "norm": norm,
}


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def describe(gpu: Gpu) -> dict[str, str]:
    """The machine, with the GPU and its ceilings."""
    about = {**machine(), "triton": installed("triton"), "fla": installed("flash-linear-attention")}
    if gpu.is_real:
        about["gpu"] = torch.cuda.get_device_name(gpu.device)
        about["copy"] = f"{gpu.copy_rate / 1e9:.0f} GB/s"
        about["bfloat16 product"] = f"{gpu.matmul_rate / 1e12:.0f} Top/s"
    return about


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; all without one")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument(
        "--interpreter", action="store_true", help="on the CPU in Triton's interpreter: --quick, without figures"
    )
    parser.add_argument("--repeats", type=int, default=20, help="calls of each side that are counted")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"), help="where the JSON goes")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.tables) - set(TABLES))
    if unknown:
        parser.error(f"unknown table {', '.join(unknown)}; choose from {', '.join(TABLES)}")
    if arguments.interpreter:
        # Before the kernels are imported.
        os.environ["TRITON_INTERPRET"] = "1"
        gpu = Gpu(torch.device("cpu"), 1)
    elif torch.cuda.is_available():
        gpu = measured(Gpu(torch.device("cuda"), arguments.repeats))
    else:
        sys.exit(
            "benchmarks.gpu needs an NVIDIA GPU, and PyTorch finds none here. --interpreter runs it on the CPU, without figures"
        )
    about = describe(gpu)
    print(", ".join(f"{key} {value}" for key, value in about.items()) + "\n", flush=True)
    tables = []
    for name in dict.fromkeys(["correctness", *(arguments.tables or TABLES)]):
        tables.append(TABLES[name](gpu, arguments.quick or arguments.interpreter))
        if gpu.is_real:
            print(tables[-1].markdown(), flush=True)
            save(tables, arguments.out, about)
        else:
            print(f"{name}: {len(tables[-1].rows)} rows, no figures without a GPU", flush=True)


if __name__ == "__main__":
    main()
