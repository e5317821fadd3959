"""A step in segments of time: memory and time against length, beside the plain step; keys and values of a hybrid; digits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import Table, in_subprocess, peak_bytes, require_close, run_ranks, seconds, timed_pairs
from longspan import EarlierKeys, SequenceLayout, parallelize, stream, sum_gradients
from longspan.launch import num_cores
from longspan.models import LinearLlama3, LinearLlama3Config
from longspan.parallel import compute_in
from longspan.streaming import SegmentDone

SEGMENT = 8192
"""Tokens of a segment of time."""
VOCABULARY = 2048
LINEAR = {"pattern": "L", "num_kv_heads": 1}
HYBRID = {"pattern": "LLLN", "num_kv_heads": 2}
LENGTHS = {
    ("in segments", 1): (2**14, 2**16, 2**18, 2**20),
    ("in one piece", 1): (2**13, 2**14, 2**15, 2**16),
    ("in segments", 2): (2**14, 2**16, 2**18),
    ("in one piece", 2): (2**14, 2**15, 2**16),
}
"""Tokens that each side is measured at, by its ranks."""
SHAPE = (
    f"4 layers of simple_gla, width 128, vocabulary {VOCABULARY:,}, float32, segments of {SEGMENT:,} tokens; one process has two "
    "threads, two ranks have one each"
)
_MEBIBYTE = 2**20


def build(model: dict[str, Any]) -> LinearLlama3:
    """The main job's model with other layers."""
    config = LinearLlama3Config(vocab_size=VOCABULARY, dim=128, num_layers=4, num_heads=2, hidden_dim=352, **model)
    return LinearLlama3(config)


def tokens_of(length: int) -> Tensor:
    """Random, as the text makes no difference to time and memory."""
    return torch.randint(VOCABULARY, (1, length + 1), generator=torch.Generator().manual_seed(0))


def step_of(
    model: Any, tokens: Tensor, layout: SequenceLayout, segment: int | None, **options: Any
) -> Callable[[], Tensor]:
    """Forward and backward of the whole sequence, in one piece or in segments; it returns this rank's share of the loss."""
    inputs, labels, num_valid = tokens[:, :-1], tokens[:, 1:], tokens.shape[1] - 1

    def plain() -> Tensor:
        loss = model(layout.shard(inputs), layout, labels=layout.shard(labels), num_valid=num_valid)
        loss.backward()
        found: Tensor = loss.detach()
        return found

    if segment is None:
        return plain
    between = options.pop("between", None)
    return partial(stream(model, segment, **options).forward_backward, inputs, labels, layout, between=between)


def check(model: dict[str, Any], **options: Any) -> None:
    """Refuse figures of segments that do not compute what one piece does."""
    plain, segments = build(model), build(model)
    tokens, layout = tokens_of(1536), SequenceLayout.local(1536)
    want = step_of(plain, tokens, layout, None)()
    require_close("loss in segments", step_of(segments, tokens, layout, 512, **options)(), want, 1e-5)
    for ours, theirs in zip(segments.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        require_close("a gradient in segments", ours.grad, theirs.grad, 1e-3)


def measured(model: dict[str, Any], length: int, segment: int | None, options: dict[str, Any]) -> tuple[int, float]:
    """Bytes above model, gradients and optimizer at most, and seconds, of a step on this rank."""
    together = dist.is_initialized()
    if not together:
        torch.set_num_threads(num_cores())
    made: Any = build(model)
    layout_of = SequenceLayout if together else SequenceLayout.local
    if together:
        parallelize(made, None)
    optimizer = torch.optim.AdamW(made.parameters())
    # Memory and threads are cold at first.
    step_of(made, tokens_of(512), layout_of(512), None if segment is None else 256, **options)()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    step = step_of(made, tokens_of(length), layout_of(length), segment, **options)
    elapsed: list[float] = []

    def whole() -> None:
        step()
        if together:
            sum_gradients(made)

    peak = peak_bytes(lambda: elapsed.append(seconds(whole)))
    return peak, elapsed[0]


def side(model: dict[str, Any], num_ranks: int, length: int, segment: int | None, **options: Any) -> tuple[int, float]:
    """`measured` in fresh processes: of the rank that takes most."""
    if num_ranks == 1:
        found: tuple[int, float] = in_subprocess(measured, model, length, segment, options)
        return found
    everyone = run_ranks(num_ranks, measured, model, length, segment, options)
    return max(peak for peak, _ in everyone), max(elapsed for _, elapsed in everyone)


def ratio_to_plain(length: int, pairs: int) -> str:
    """Time of a step in segments over that of the plain one, in turn in one process."""
    torch.set_num_threads(num_cores())
    model, tokens, layout = build(LINEAR), tokens_of(length), SequenceLayout.local(length)
    paired = timed_pairs(step_of(model, tokens, layout, SEGMENT), step_of(model, tokens, layout, None), pairs)
    return str(paired.ratio)


def measure(quick: bool) -> dict[str, Any]:
    """Memory and time of all sides at their lengths, and the ratios to the plain step."""
    check(LINEAR)
    lengths = dict.fromkeys(LENGTHS, (2**14,)) if quick else LENGTHS
    sides = [
        {"side": name, "ranks": ranks, "tokens": length, "bytes": peak, "seconds": elapsed}
        for (name, ranks), of_side in lengths.items()
        for length in of_side
        for peak, elapsed in [side(LINEAR, ranks, length, SEGMENT if name == "in segments" else None)]
    ]
    ratios = {
        str(length): in_subprocess(ratio_to_plain, length, 1 if quick else 3)
        for length in ((2**14,) if quick else (2**14, 2**15, 2**16))
    }
    return {"shape": SHAPE, "sides": sides, "ratios": ratios}


def table_of(data: dict[str, Any]) -> Table:
    """The table of what was measured."""
    table = Table(
        "stream",
        f"A step in segments of time and in one piece: {data['shape']}; MiB above model, gradients and optimizer of a rank",
        "in segments memory flat within 10 %, and time a token within 10 %, from 16K to 1M tokens in one process; at most 1.45 "
        "times the time of the plain step",
        ["side", "ranks", "tokens", "MiB", "s", "ms for 1,000 tokens", "time / that of one piece, in pairs"],
    )
    for found in data["sides"]:
        ratio = data["ratios"].get(str(found["tokens"]), "-")
        shown = ratio if (found["side"], found["ranks"]) == ("in segments", 1) else "-"
        each = found["seconds"] / found["tokens"] * 1e6
        cells = (
            f"{found['tokens']:,}",
            f"{found['bytes'] / _MEBIBYTE:,.0f}",
            f"{found['seconds']:.1f}",
            f"{each:,.0f}",
        )
        table.add(found["side"], found["ranks"], *cells, shown)
    return table


def in_segments(quick: bool) -> Table:
    return table_of(measure(quick))


def kept_bytes(length: int, segment: int, offload: bool) -> tuple[int, int, float]:
    """Bytes of keys, values and their gradients that a step holds at most, of the formula's, and the growth of this process."""
    torch.set_num_threads(num_cores())
    model = build(HYBRID)
    held: list[EarlierKeys] = []
    largest = [0]

    def note(module: Any, given: Any, found: Any) -> None:
        earlier = found[1] and found[1].earlier
        if earlier is not None and not torch.is_grad_enabled():
            held.append(earlier)

    def count(done: SegmentDone) -> None:
        # As the last segment has sent its gradients, all of them are there.
        if (done.kind, done.segment) == ("backward", done.num_segments - 1):
            parts = held[-1].parts
            largest[0] = sum(part.num_bytes + sum(x.nbytes for x in part.grads()) for part in parts)

    model.blocks[3].mixer.register_forward_hook(note)  # type: ignore[union-attr]
    step = step_of(model, tokens_of(length), SequenceLayout.local(length), segment, offload=offload, between=count)
    step_of(model, tokens_of(512), SequenceLayout.local(512), 256, offload=offload)()
    peak = peak_bytes(step)
    return largest[0], _formula(length, segment), float(peak)


def _formula(length: int, segment: int) -> int:
    """Bytes of keys and values of all segments but the last, and of their gradients, float32."""
    kv_heads, size, layers = 2, 64, 1
    return (length - segment) * 2 * kv_heads * size * layers * (4 + 4)


def keys(quick: bool) -> Table:
    lengths, segment = ((1024, 2048), 512) if quick else ((2**13, 2**14, 2**15), 2048)
    table = Table(
        "stream_keys",
        f"The hybrid LLLN with 2 key heads of 64 in segments of {segment:,} tokens, one process: what is held between segments",
        "memory grows by keys, values and their gradients alone: the formula within 5 %",
        [
            "keys and values",
            "tokens",
            "MiB of keys",
            "MiB, formula",
            "keys / formula",
            "MiB of the process above model and gradients",
        ],
    )
    for offload in (False, True):
        for length in lengths:
            counted, formula, peak = in_subprocess(kept_bytes, length, segment, offload)
            cells = (f"{counted / _MEBIBYTE:.1f}", f"{formula / _MEBIBYTE:.1f}", f"{counted / formula:.3f}")
            where = "in host memory" if offload else "on the device"
            table.add(where, f"{length:,}", *cells, f"{peak / _MEBIBYTE:,.0f}")
    return table


def error_of(dtype: torch.dtype, num_segments: int, length: int) -> float:
    """Relative error of all gradients together, against one piece in float64."""
    tokens, layout = tokens_of(length), SequenceLayout.local(length)
    exact, model = build(HYBRID).double(), build(HYBRID)
    step_of(exact, tokens, layout, None)()
    if dtype != torch.float32:
        compute_in(model, dtype)
    step_of(model, tokens, layout, None if num_segments == 1 else length // num_segments)()
    squares = wanted = 0.0
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        squares += float((ours.grad.double() - theirs.grad).square().sum())
        wanted += float(theirs.grad.square().sum())
    return float((squares / wanted) ** 0.5)


def accuracy(quick: bool) -> Table:
    length, counts = (512, (1, 4)) if quick else (4096, (1, 4, 16, 64, 256))
    table = Table(
        "stream_accuracy",
        f"The hybrid LLLN of the main job on {length:,} tokens: error of all gradients against one piece in float64, relative",
        "no drift with the number of segments: the errors of one piece in the same dtype",
        ["computed in", *("one piece" if count == 1 else f"{count} segments" for count in counts)],
    )
    for dtype in (torch.float32, torch.bfloat16):
        errors = [in_subprocess(error_of, dtype, count, length) for count in counts]
        table.add(str(dtype).removeprefix("torch."), *(f"{error:.2e}" for error in errors))
    return table


TABLES: dict[str, Callable[[bool], Table]] = {"stream": in_segments, "stream_keys": keys, "stream_accuracy": accuracy}
