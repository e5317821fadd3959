"""Softmax attention on the CPU: the methods against each other, one process and other code; balance; memory."""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from statistics import median
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

import longspan
from benchmarks.harness import Table, paired, require_close, run_ranks, timed_pairs
from benchmarks.softmax_peers import PEERS, unavailable
from benchmarks.softmax_sides import (
    ALONE,
    FLOOR,
    HEAD_DIM,
    HEADS,
    TOLERANCE,
    Call,
    Measured,
    Setting,
    Side,
    in_turn,
    kept_by_method,
    make_tensors,
    measure,
    our_step,
    ours,
    peak_of_side,
    plain_step,
)
from longspan.data.packing import PackedBatch
from longspan.models import LinearLlama3, LinearLlama3Config
from longspan.train.loss import loss_sum

METHODS = ("all_gather", "ring", "ulysses")
Order = Literal["contiguous", "zigzag"]
ORDERS: tuple[Order, ...] = ("contiguous", "zigzag")


def softmax_one_rank(quick: bool) -> Table:
    table = Table(
        "softmax_one_rank",
        f"softmax_attention on one rank over scaled_dot_product_attention, causal, forward + backward, B1 H{HEADS} D{HEAD_DIM}, "
        "one thread",
        "at most 1.03",
        ["tokens", "dtype", "method", "ms, ours", "ms, plain", "ours / plain"],
    )
    torch.set_num_threads(1)
    cases = [(256, "all_gather"), (512, "ring")] if quick else [(1024, "auto"), (4096, "auto"), (8192, "auto")]
    for dtype, tolerance in ((torch.float32, TOLERANCE), (torch.bfloat16, 2e-2)):
        name = str(dtype).removeprefix("torch.")
        for seq_len, method in cases:
            setting = Setting(seq_len)
            tensors = make_tensors(setting, seq_len, dtype)
            first = our_step(method, tensors, longspan.SequenceLayout.local(seq_len), setting)
            second = plain_step(1, tensors, None, setting)
            for what, x, y in zip(("o", "dq", "dk", "dv"), first(), second(), strict=True):
                require_close(f"{what} of {method} on one rank, {name}", x, y, tolerance)
            result = timed_pairs(first, second, 3 if quick else {1024: 61, 4096: 25}.get(seq_len, 9))
            table.add(
                f"{seq_len:,}",
                name,
                method,
                f"{result.first * 1e3:.1f}",
                f"{result.second * 1e3:.1f}",
                result.ratio.rounded(3),
            )
    return table


def softmax_zigzag(quick: bool) -> Table:
    seq_len, rounds = (2048, 3) if quick else (16384, 9)
    table = Table(
        "softmax_zigzag",
        f"Contiguous over zigzag, causal, forward + backward, {seq_len:,} tokens, B1 H{HEADS} D{HEAD_DIM} float32, two ranks of "
        "one thread",
        "at least 1.4 for all_gather and ring; the ideal is (2P − 1) / P = 1.5; ulysses computes the same in both orders",
        [
            "method",
            "ms, contiguous",
            "ms, zigzag",
            "times as fast",
            "processor time of the busiest rank: contiguous / zigzag",
        ],
    )
    sides = [ours(method, order) for method in METHODS for order in ORDERS]
    measured = _right(sides, measure(Setting(seq_len), sides, rounds))
    for method in METHODS:
        result = paired(*(measured[method, order].times for order in ORDERS))
        busiest = paired(*(measured[method, order].busiest for order in ORDERS))
        table.add(method, *result.cells(), busiest.ratio)
    return table


def softmax_methods(quick: bool) -> Table:
    seq_len, rounds = (1024, 3) if quick else (8192, 5)
    table = Table(
        "softmax_methods",
        f"The methods on two ranks of one thread, forward + backward, {seq_len:,} tokens, B1 H{HEADS} D{HEAD_DIM} float32",
        "how they compare; the ideal against one rank of one thread is 2",
        ["attention", "order", "method", "ms", "ms, one rank", "times as fast"],
    )
    for name, setting, order in _settings(seq_len):
        sides = [ALONE, *(ours(method, order) for method in METHODS)]
        measured = _right(sides, measure(setting, sides, rounds))
        for method in METHODS:
            result = paired(measured["one process, one thread", "whole"].times, measured[method, order].times)
            table.add(name, order, method, *result.cells(second_first=True))
    return table


def _settings(seq_len: int) -> list[tuple[str, Setting, Order]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, seq_len // 4, (64,), generator=generator).tolist()
    documents = (0, *(stop for stop in accumulate(lengths) if stop < seq_len), seq_len)
    return [
        ("causal", Setting(seq_len), "zigzag"),
        ("causal, 2 key heads", Setting(seq_len, num_kv_heads=2), "zigzag"),
        ("both ways", Setting(seq_len, causal=False), "contiguous"),
        (f"causal, window {seq_len // 8:,}", Setting(seq_len, window=seq_len // 8), "contiguous"),
        (f"causal, {len(documents) - 1} documents", Setting(seq_len, documents=documents), "zigzag"),
    ]


def _right(sides: list[Side], measured: list[Measured]) -> dict[tuple[str, str], Measured]:
    """The measured sides by name and order; refuses a wrong one."""
    for side, side_measured in zip(sides, measured, strict=True):
        if not side_measured.is_right:
            raise SystemExit(
                f"{side.name}, {side.order}: relative error {side_measured.error:.2e} exceeds {TOLERANCE:.0e}; "
                "no figure is reported"
            )
    return {(side.name, side.order): values for side, values in zip(sides, measured, strict=True)}


def softmax_peers(quick: bool) -> Table:
    lengths = {512: 3, 1024: 3} if quick else {4096: 15, 8192: 9, 16384: 5}
    table = Table(
        "softmax_peers",
        f"Against other code, causal, forward + backward, B1 H{HEADS} D{HEAD_DIM} float32, two gloo ranks of one thread",
        "each method at least as fast as the best peer of its kind (1 or more), the best of ours at most 1.05 of one process with "
        "two threads; memory of a rank beside it (of a step: o, dq, dk, dv and what is in between)",
        [
            "tokens",
            "side",
            "kind",
            "order",
            "ms",
            "best peer of kind and order / ours",
            "over two threads",
            "MiB per rank",
        ],
    )
    for seq_len, rounds in lengths.items():
        setting = Setting(seq_len)
        mine = [ours(method, order) for method in METHODS for order in ORDERS]
        theirs = [peer for peer in PEERS if unavailable(peer) is None]
        sides = [FLOOR, *mine, *theirs]
        measured = dict(zip(sides, measure(setting, sides, rounds), strict=True))
        for side in sides:
            _add_side(table, setting, side, measured, mine, theirs)
        for peer in PEERS:
            reason = unavailable(peer)
            if reason is not None:
                table.add(f"{seq_len:,}", peer.name, peer.kind, peer.order, reason, "", "", "")
    return table


def _add_side(
    table: Table, setting: Setting, side: Side, measured: dict[Side, Measured], mine: list[Side], theirs: list[Side]
) -> None:
    head = (f"{setting.seq_len:,}", side.name, side.kind, side.order)
    times = measured[side].times
    if not measured[side].is_right:
        table.add(*head, f"wrong: relative error {measured[side].error:.0e}", "", "", "")
        return
    right = [peer for peer in theirs if peer.kind == side.kind and measured[peer].is_right]
    # With the same tokens on a rank, if there is such a peer.
    right = [peer for peer in right if peer.order == side.order] or right
    rivals = [measured[peer].times for peer in right]
    against_peer = paired(min(rivals, key=median), times).ratio if side in mine and rivals else ""
    over_floor = "" if side == FLOOR else paired(times, measured[FLOOR].times).ratio
    peak = peak_of_side(setting, side) / 2**20
    table.add(*head, f"{median(times) * 1e3:.0f}", against_peer, over_floor, f"{peak:.0f}")


def softmax_memory(quick: bool) -> Table:
    cases = [(2, 2048)] if quick else [(2, 4096), (2, 8192), (2, 16384), (4, 16384)]
    table = Table(
        "softmax_memory",
        f"Memory of the rank that needs most, causal, zigzag, B1 H{HEADS} D{HEAD_DIM} float32",
        "kept between forward and backward, q, k, v and o counted: the formula; the peak of forward + backward "
        "with q, k, v and the gradients of all counted: linear in the length",
        ["ranks", "tokens", "method", "MiB kept", "MiB, formula", "kept / formula", "MiB peak", "peak over q"],
    )
    for num_ranks, seq_len in cases:
        setting = Setting(seq_len)
        share = seq_len // num_ranks * HEADS * HEAD_DIM * 4
        for method in METHODS:
            kept, formula = kept_by_method(setting, method, "zigzag", num_ranks), kept_bytes(method, seq_len, num_ranks)
            # q, k, v and the gradient of o were there before.
            peak = peak_of_side(setting, ours(method, "zigzag"), num_ranks) + 4 * share
            table.add(
                num_ranks,
                f"{seq_len:,}",
                method,
                f"{kept / 2**20:.1f}",
                f"{formula / 2**20:.1f}",
                f"{kept / formula:.2f}",
                f"{peak / 2**20:.0f}",
                f"{peak / share:.1f}",
            )
    return table


def kept_bytes(method: str, seq_len: int, num_ranks: int) -> int:
    """What a rank keeps, o counted: float32, one row, as many key heads as query heads, causal, zigzag (docs/softmax.md)."""
    num_tokens, channels = seq_len // num_ranks, HEADS * HEAD_DIM
    # q, k, v, o and the log-sum-exp: of the rank's tokens, or of all tokens and the rank's heads, which is as much.
    numbers = num_tokens * (4 * channels + HEADS)
    if method == "all_gather":
        numbers += 2 * (num_ranks - 1) * num_tokens * channels
    if method == "ulysses":
        # The output of the rank's tokens, beside that of its heads.
        numbers += num_tokens * channels
    return 4 * numbers


def hybrid_zigzag(quick: bool) -> Table:
    seq_len, rounds = (1024, 3) if quick else (16384, 3)
    table = Table(
        "hybrid_zigzag",
        f"A step of an LLLN model (simple_gla, C {HEADS * HEAD_DIM}, H{HEADS} D{HEAD_DIM}, float32), contiguous over zigzag, "
        f"{seq_len:,} tokens, two ranks of one thread",
        "the gain that the N layer's own gain predicts: contiguous / (contiguous − what its attention saves)",
        [
            "clock",
            "ms, contiguous",
            "ms, zigzag",
            "times as fast",
            "predicted",
            "ms, N attention contiguous",
            "ms, N attention zigzag",
        ],
    )
    calls = run_ranks(2, _hybrid_calls, seq_len, rounds)[0]
    for clock, times in (
        ("wall", [[call.seconds for call in x] for x in calls]),
        ("processor, of the busiest rank", [[call.busiest for call in x] for x in calls]),
    ):
        step = paired(times[0], times[1])
        attention = [median(x) for x in times[2:]]
        predicted = step.first / (step.first - (attention[0] - attention[1]))
        table.add(
            clock,
            *step.cells(),
            f"{predicted:.2f}",
            *(f"{x * 1e3:.0f}" for x in attention),
        )
    return table


def _hybrid_calls(seq_len: int, rounds: int) -> list[list[Call]]:
    """Calls of the model's step, then of its N layer's attention alone; contiguous and zigzag of each, in turn."""
    setting = Setting(seq_len)
    config = LinearLlama3Config(
        vocab_size=1024, dim=HEADS * HEAD_DIM, num_layers=4, pattern="LLLN", num_heads=HEADS, hidden_dim=1408
    )
    model = longspan.parallelize(LinearLlama3(config), None, softmax_method="all_gather")
    tokens = torch.randint(0, config.vocab_size, (1, seq_len + 1), generator=torch.Generator().manual_seed(0))
    layouts = [setting.layout(order) for order in ORDERS]
    gradients = [_model_step(model, tokens, layout) for layout in layouts]
    if dist.get_rank() == 0:
        require_close("gradients of the hybrid, zigzag and contiguous", gradients[1], gradients[0], 1e-3)
    steps = [partial(_model_step, model, tokens, layout) for layout in layouts]
    whole = make_tensors(setting, seq_len)
    attention = [our_step("all_gather", whole.map(layout.shard), layout, setting) for layout in layouts]
    for run in attention:
        run()
    return in_turn([*steps, *attention], rounds)


def _model_step(model: LinearLlama3, tokens: Tensor, layout: longspan.SequenceLayout) -> Tensor:
    """Forward, backward and the sum over ranks; returns all gradients as one vector."""
    model.zero_grad()
    (loss_sum(model, PackedBatch.of(tokens), layout) / layout.seq_len).backward()
    longspan.sum_gradients(model)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


TABLES = {
    "softmax_one_rank": softmax_one_rank,
    "softmax_zigzag": softmax_zigzag,
    "softmax_methods": softmax_methods,
    "softmax_peers": softmax_peers,
    "softmax_memory": softmax_memory,
    "hybrid_zigzag": hybrid_zigzag,
}
