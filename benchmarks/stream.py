"""A step in segments of time: memory and time against length, beside the plain step; keys and values of a hybrid; digits."""

from __future__ import annotations

import itertools
import statistics
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import (
    Table,
    freed_memory_is_returned,
    in_subprocess,
    peak_bytes,
    require_close,
    run_ranks,
    say,
    seconds,
    timed_pairs,
)
from longspan import SequenceLayout, parallelize, stream, sum_gradients
from longspan.attention.softmax.earlier import KeyPart
from longspan.launch import num_cores
from longspan.models import LinearLlama3, LinearLlama3Config
from longspan.parallel import compute_in
from longspan.streaming import SegmentDone
from longspan.train.memory import Releases, release_freed_memory

SEGMENT = 4096
"""Tokens of a segment of time."""
VOCABULARY = 1024
LINEAR = {"pattern": "L", "dim": 64, "num_heads": 2, "num_kv_heads": 1, "hidden_dim": 176}
HYBRID = {"pattern": "LLLN", "dim": 128, "num_heads": 2, "num_kv_heads": 2, "hidden_dim": 352}
LENGTHS = {
    ("in segments", 1): (2**14, 2**16, 2**18, 2**20),
    ("in one piece", 1): (2**13, 2**14, 2**15, 2**16),
    ("in segments", 2): (2**14, 2**16, 2**18, 2**20),
    ("in one piece", 2): (2**14, 2**15, 2**16),
}
"""Tokens that each side is measured at, by its ranks."""
SHAPE = (
    f"4 layers of simple_gla, width 64, vocabulary {VOCABULARY:,}, float32, segments of {SEGMENT:,} tokens; one process has two "
    "threads, two ranks have one each"
)
_MEBIBYTE = 2**20
_TIMED_TOKENS = 2**16
"""Steps on shorter sequences are repeated until so many tokens are timed."""


def build(model: dict[str, Any]) -> LinearLlama3:
    """Four layers; the hybrid is the main job's model with two key heads."""
    return LinearLlama3(LinearLlama3Config(vocab_size=VOCABULARY, num_layers=4, **model))


def tokens_of(length: int) -> Tensor:
    """Random, as the text makes no difference to time and memory."""
    return torch.randint(VOCABULARY, (1, length + 1), generator=torch.Generator().manual_seed(0))


def step_of(
    model: Any, tokens: Tensor, layout: SequenceLayout, segment: int | None, *, between: Any = None, **options: Any
) -> Callable[[], Tensor]:
    """Forward and backward of the whole sequence, in one piece or in segments; it returns this rank's share of the loss.

    In segments freed memory goes back to the system as in `longspan train`: without it a process holds more and more that it does
    not use (docs/performance.md, memory over a run).
    """
    inputs, labels, num_valid = tokens[:, :-1], tokens[:, 1:], tokens.shape[1] - 1

    def plain() -> Tensor:
        loss = model(layout.shard(inputs), layout, labels=layout.shard(labels), num_valid=num_valid)
        loss.backward()
        found: Tensor = loss.detach()
        return found

    if segment is None:
        return plain
    between = between or Releases()
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


def measured(model: dict[str, Any], length: int, segment: int | None, timed_tokens: int) -> tuple[int, float]:
    """Bytes above model, gradients and optimizer at most, and seconds, of a step on this rank.

    A step of fewer than `timed_tokens` is made several times, the first one untimed, as memory is cold in it: the median.
    """
    together = dist.is_initialized()
    if not together:
        torch.set_num_threads(num_cores())
    made: Any = build(model)
    layout_of = SequenceLayout if together else SequenceLayout.local
    if together:
        parallelize(made, None)
    optimizer = torch.optim.AdamW(made.parameters())
    step_of(made, tokens_of(512), layout_of(512), None if segment is None else 256)()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    step = step_of(made, tokens_of(length), layout_of(length), segment)
    elapsed: list[float] = []

    def whole() -> None:
        step()
        if together:
            sum_gradients(made)

    def several() -> None:
        for _ in range(1 + timed_tokens // length):
            elapsed.append(seconds(whole))

    release_freed_memory()
    peak = peak_bytes(several)
    return peak, statistics.median(elapsed[1:] or elapsed)


def side(num_ranks: int, *arguments: Any) -> tuple[int, float]:
    """`measured` in fresh processes: of the rank that takes most."""
    if num_ranks == 1:
        found: tuple[int, float] = in_subprocess(measured, *arguments)
        return found
    everyone = run_ranks(num_ranks, measured, *arguments)
    return max(peak for peak, _ in everyone), max(elapsed for _, elapsed in everyone)


def ratio_to_plain(length: int, segment: int, pairs: int) -> str:
    """Time of a step in segments over that of the plain one, in turn in one process."""
    torch.set_num_threads(num_cores())
    model, tokens, layout = build(LINEAR), tokens_of(length), SequenceLayout.local(length)
    paired = timed_pairs(step_of(model, tokens, layout, segment), step_of(model, tokens, layout, None), pairs)
    return str(paired.ratio)


def ratio_to_short(length: int, short: int, segment: int, every: int) -> str:
    """Time a token of a step on `length` tokens over that of steps on `short` ones, one after every so many passes over a segment.

    A machine whose speed changes from minute to minute is as fast for one as for the other.
    """
    torch.set_num_threads(num_cores())
    shorter = step_of(build(LINEAR), tokens_of(short), SequenceLayout.local(short), segment)
    releases, passes, elapsed = Releases(), itertools.count(1), list[float]()

    def between(done: SegmentDone) -> None:
        releases(done)
        if next(passes) % every == 0:
            elapsed.append(seconds(shorter))

    shorter()
    step = step_of(build(LINEAR), tokens_of(length), SequenceLayout.local(length), segment, between=between)
    of_long = seconds(step) - sum(elapsed)
    ratio = (of_long / length) / (statistics.mean(elapsed) / short)
    return f"{ratio:.2f} ({len(elapsed)} steps, {min(elapsed):.2f}-{max(elapsed):.2f} s)"


def measure(quick: bool) -> dict[str, Any]:
    """Memory and time of all sides at their lengths, and the ratios to the plain step, and of long sequences to short ones."""
    check(LINEAR)
    lengths = dict.fromkeys(LENGTHS, (2048,)) if quick else LENGTHS
    segment, timed_tokens = (512, 0) if quick else (SEGMENT, _TIMED_TOKENS)
    sides = []
    for (name, ranks), of_side in lengths.items():
        for length in of_side:
            peak, elapsed = side(ranks, LINEAR, length, segment if name == "in segments" else None, timed_tokens)
            say(f"{name}, {ranks} ranks, {length:,} tokens: {peak / _MEBIBYTE:,.0f} MiB, {elapsed:.1f} s")
            sides.append({"side": name, "ranks": ranks, "tokens": length, "bytes": peak, "seconds": elapsed})
    ratios = {}
    for length in (2048,) if quick else (2**14, 2**15, 2**16):
        ratios[str(length)] = in_subprocess(ratio_to_plain, length, segment, 1 if quick else 3)
        say(f"time of {length:,} tokens in segments / in one piece: {ratios[str(length)]}")
    to_short = {}
    short, longer = (1024, (4096,)) if quick else (2**14, (2**18, 2**20))
    for length in longer:
        every = 2 * length // segment // (2 if quick else 32)
        to_short[str(length)] = in_subprocess(ratio_to_short, length, short, segment, every)
        say(f"time a token of {length:,} tokens / of {short:,}: {to_short[str(length)]}")
    return {"shape": SHAPE, "sides": sides, "ratios": ratios, "to_short": to_short}


def table_of(data: dict[str, Any]) -> Table:
    """The table of what was measured."""
    table = Table(
        "stream",
        f"A step in segments of time and in one piece: {data['shape']}; MiB above model, gradients and optimizer of a rank",
        "in segments, one process, from 16K to 1M tokens: memory flat within 10 %, and time a token within 10 %; at most 1.45 "
        "times the time of the plain step",
        [
            "side",
            "ranks",
            "tokens",
            "MiB",
            "of the first row's",
            "s",
            "ms for 1,000 tokens",
            "of the first row's",
            "time / that of one piece, in pairs",
            "time a token / that of 16,384, in turn",
        ],
    )
    first: dict[tuple[str, int], dict[str, Any]] = {}
    for found in data["sides"]:
        own = first.setdefault((found["side"], found["ranks"]), found)
        is_alone = (found["side"], found["ranks"]) == ("in segments", 1)
        ratios = [data[name].get(str(found["tokens"]), "-") for name in ("ratios", "to_short")]
        each = found["seconds"] / found["tokens"]
        table.add(
            found["side"],
            found["ranks"],
            f"{found['tokens']:,}",
            f"{found['bytes'] / _MEBIBYTE:,.0f}",
            f"{found['bytes'] / own['bytes']:.2f}",
            f"{found['seconds']:.1f}",
            f"{each * 1e6:,.1f}",
            f"{each / (own['seconds'] / own['tokens']):.2f}",
            *(ratios if is_alone else ["-", "-"]),
        )
    return table


def in_segments(quick: bool) -> Table:
    return table_of(measure(quick))


def kept_bytes(length: int, segment: int, window: int | None, offload: bool) -> tuple[int, int]:
    """Bytes of keys, values and their gradients that a step holds at most, and the growth of this process."""
    torch.set_num_threads(num_cores())
    model = build(HYBRID | {"window": window})
    parts: weakref.WeakSet[KeyPart] = weakref.WeakSet()
    largest = [0]

    def note(module: Any, given: Any, found: Any) -> None:
        earlier = found[1] and found[1].earlier
        if earlier is not None and earlier.last is not None and not torch.is_grad_enabled():
            parts.add(earlier.last)

    releases = Releases(1)

    def count(done: SegmentDone) -> None:
        releases()
        # As the last segment has sent its gradients, all of them are there: to the parts that it sees.
        if (done.kind, done.segment) == ("backward", done.num_segments - 1):
            largest[0] = sum(part.num_bytes + sum(x.nbytes for x in part.grads() if x.any()) for part in parts)

    model.blocks[3].mixer.register_forward_hook(note)  # type: ignore[union-attr]
    options = {"offload": offload, "between": count}
    step_of(model, tokens_of(512), SequenceLayout.local(512), 256, **options)()
    step = step_of(model, tokens_of(length), SequenceLayout.local(length), segment, **options)
    parts.clear()
    release_freed_memory()
    peak = peak_bytes(step)
    return largest[0], peak


def keys_formula(length: int, segment: int, window: int | None) -> int:
    """Bytes of keys and values of all segments but the last, and of the gradients of those that the last one sees, float32.

    With a window of a token more than a segment, that is the segment before.
    """
    kv_heads, size, layers = 2, 64, 1
    kept, seen = length - segment, length - segment if window is None else segment
    return (kept + seen) * 2 * kv_heads * size * layers * 4


def states_formula(length: int, segment: int) -> int:
    """Bytes of the states that enter segments, float32."""
    heads, size, layers = 2, 64, 3
    return length // segment * heads * size * size * layers * 4


def keys(quick: bool) -> Table:
    segment = 512 if quick else 2048
    check(HYBRID)
    check(HYBRID, offload=True)
    # A window of a segment and a token keeps all keys of all segments, and lets attention grow with the length, not its square.
    all_seen, in_window = ((1024, 2048), (2048,)) if quick else ((2**13, 2**14, 2**15), (2**15, 2**16, 2**17))
    table = Table(
        "stream_keys",
        f"The hybrid LLLN with 2 key heads of 64 in segments of {segment:,} tokens, one process: keys, values and their gradients, "
        "and how much the process grows beside its first row, freed memory returned at once",
        "memory grows by keys and values alone, and by the states that are kept: the formula within 5 %",
        [
            "a token sees",
            "keys and values",
            "tokens",
            "MiB of keys",
            "MiB, formula",
            "keys / formula",
            "MiB of the process above model and gradients",
            "growth",
            "growth, formula",
            "growth / formula",
        ],
    )
    for window, lengths in ((None, all_seen), (segment + 1, in_window)):
        for offload in (False, True):
            before: tuple[int, int] | None = None
            for length in lengths:
                # Asked for is what lives, and not what the C library keeps of what was freed.
                with freed_memory_is_returned():
                    counted, peak = in_subprocess(kept_bytes, length, segment, window, offload)
                formula = keys_formula(length, segment, window)
                whole = formula + states_formula(length, segment)
                growth = ["-", "-", "-"]
                if before is not None:
                    grown, expected = peak - before[0], whole - before[1]
                    growth = [f"{grown / _MEBIBYTE:.1f}", f"{expected / _MEBIBYTE:.1f}", f"{grown / expected:.3f}"]
                before = before or (peak, whole)
                table.add(
                    "all before" if window is None else f"{window:,} tokens",
                    "in host memory" if offload else "on the device",
                    f"{length:,}",
                    f"{counted / _MEBIBYTE:.1f}",
                    f"{formula / _MEBIBYTE:.1f}",
                    f"{counted / formula:.3f}",
                    f"{peak / _MEBIBYTE:,.0f}",
                    *growth,
                )
    return table


def errors_of(dtype: torch.dtype, counts: tuple[int, ...], length: int) -> list[float]:
    """Relative errors of all gradients together, in so many segments, against one piece in float64."""
    torch.set_num_threads(num_cores())
    tokens, layout = tokens_of(length), SequenceLayout.local(length)
    exact = build(HYBRID).double()
    step_of(exact, tokens, layout, None)()
    found = []
    for num_segments in counts:
        model = build(HYBRID)
        if dtype != torch.float32:
            compute_in(model, dtype)
        step_of(model, tokens, layout, None if num_segments == 1 else length // num_segments)()
        squares = wanted = 0.0
        for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
            assert ours.grad is not None and theirs.grad is not None
            squares += float((ours.grad.double() - theirs.grad).square().sum())
            wanted += float(theirs.grad.square().sum())
        found.append((squares / wanted) ** 0.5)
        say(f"stream_accuracy: {dtype}, {num_segments} segments: {found[-1]:.2e}")
    return found


def accuracy(quick: bool) -> Table:
    length, counts = (512, (1, 4)) if quick else (4096, (1, 4, 16, 64, 256))
    table = Table(
        "stream_accuracy",
        f"The hybrid LLLN of the main job on {length:,} tokens: error of all gradients against one piece in float64, relative",
        "no drift with the number of segments: the errors of one piece in the same dtype",
        ["computed in", *("one piece" if count == 1 else f"{count} segments" for count in counts)],
    )
    for dtype in (torch.float32, torch.bfloat16):
        errors = in_subprocess(errors_of, dtype, counts, length)
        table.add(str(dtype).removeprefix("torch."), *(f"{error:.2e}" for error in errors))
    return table


TABLES: dict[str, Callable[[bool], Table]] = {"stream": in_segments, "stream_keys": keys, "stream_accuracy": accuracy}
