"""Codecs on the exchange: errors of outputs and gradients, bytes, time on emulated links, and the loss of a training run."""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cluster import Cluster
from benchmarks.harness import Table, run_ranks, say
from benchmarks.rounding import NUM_HEADS, OPERATORS, SEQ_LEN, SIZE, inputs, run
from longspan import SequenceLayout
from longspan.comm.background import run_beside
from longspan.exchange import AllGather, Auto, Exchanger, Float8, Int8, Ring, TopK, record_traffic
from longspan.exchange.auto.calibration import measured_cluster
from longspan.exchange.auto.timing import RankClock
from longspan.exchange.auto.trial import exchange_seconds
from longspan.launch import Place, StopRequest
from longspan.layout import group_of
from longspan.state import Pair, ScalarDecay
from longspan.train.config import Config, from_mapping
from longspan.train.ranks import Ranks
from longspan.train.run import train_on

Made = Callable[..., Exchanger]

WAYS: dict[str, Callable[[Made], Exchanger]] = {
    "float32": lambda kind: kind(),
    "bfloat16": lambda kind: kind(torch.bfloat16),
    "int8, blocks of 128": lambda kind: kind(codec=Int8()),
    "int8, blocks of 16": lambda kind: kind(codec=Int8(16)),
    "float8": lambda kind: kind(codec=Float8()),
    "top 1/4": lambda kind: kind(codec=TopK(0.25)),
    "top 1/20": lambda kind: kind(codec=TopK(0.05)),
}
TOPOLOGIES: dict[str, Made] = {"all_gather": AllGather, "ring": Ring}
_NUM_RANKS = 4
RATES = ("1gbit", "100mbit", "10mbit")
# Of the fastest network five rounds, of the others two; none begins after so long.
_MOST_SECONDS = 60.0
_BOUNDS = (0.005, 0.05, 0.1)
_STATES = (1, 1, 16, 128, 128)


def _squares(operator: str, reference: str) -> list[tuple[dict[str, tuple[float, float]], int]]:
    """For each topology and way: sums of squares of errors and of exact values over this rank's tokens, and bytes sent."""
    layout = SequenceLayout(SEQ_LEN)
    values = {name: layout.shard(x).float() for name, x in inputs(operator).items()}
    exact = {name: layout.shard(x) for name, x in torch.load(reference).items()}
    found = []
    for kind in TOPOLOGIES.values():
        for way in WAYS.values():
            with record_traffic() as traffic:
                got = run(operator, values, layout, way(kind))
                # A rank need not wait for what it sends, which is counted as it goes.
                run_beside(group_of(layout), torch.device("cpu"), lambda _: None).wait()
            sums = {name: float((got[name] - x).square().sum()) for name, x in exact.items()}
            squares = {name: (sums[name], float(x.square().sum())) for name, x in exact.items()}
            found.append((squares, traffic.bytes_sent))
    return found


def codec_errors(quick: bool) -> Table:
    table = Table(
        "codec_errors",
        f"‖error‖ / ‖exact‖ with states coded for the wire, {_NUM_RANKS} ranks, {SEQ_LEN:,} tokens, "
        f"B1 H{NUM_HEADS} K = V = {SIZE}, against one process in float64",
        "a passage's error stays within the codec's bound; bytes are of the rank that sends most, forward and backward",
        [
            "operator",
            "topology",
            "on the wire",
            "bound of a passage",
            "output",
            "worst gradient",
            "KiB sent",
            "of float32's",
        ],
    )
    for operator in OPERATORS[:1] if quick else OPERATORS:
        with tempfile.TemporaryDirectory() as folder:
            reference = str(Path(folder) / "exact.pt")
            torch.save(run(operator, inputs(operator), None, "auto"), reference)
            by_rank = run_ranks(_NUM_RANKS, _squares, operator, reference)
        cases = [(topology, name) for topology in TOPOLOGIES for name in WAYS]
        plain = dict.fromkeys(TOPOLOGIES, 0)
        for (topology, name), of_ranks in zip(cases, zip(*by_rank, strict=True), strict=True):
            totals = {key: torch.tensor([squares[key] for squares, _ in of_ranks]).sum(0) for key in of_ranks[0][0]}
            errors = {key: float((total[0] / total[1]).sqrt()) for key, total in totals.items()}
            sent = max(num_bytes for _, num_bytes in of_ranks)
            plain[topology] = plain[topology] or sent
            gradients = [error if error == error else float("inf") for key, error in errors.items() if key != "o"]
            table.add(
                operator,
                topology,
                name,
                _bound(name),
                f"{errors['o']:.1e}",
                f"{max(gradients):.1e}",
                f"{sent / 1024:,.0f}",
                f"{sent / plain[topology]:.2f}",
            )
    return table


def _bound(name: str) -> str:
    exchange = WAYS[name](Ring)
    assert isinstance(exchange, Ring)
    codec = exchange.wire("forward").codec
    if codec is not None:
        return f"{codec.format.worst_error:.3f}"
    return "0" if exchange.state_dtype is None else f"{2.0**-8:.3f}"


def _states() -> tuple[SequenceLayout, Pair]:
    layout = SequenceLayout(64 * dist.get_world_size(), ranks_per_node=1)
    random = torch.Generator().manual_seed(dist.get_rank())
    states = torch.randn(_STATES, generator=random)
    return layout, Pair(ScalarDecay(-torch.rand(ScalarDecay.parameter_shape(_STATES), generator=random)), states)


def _seconds_on_rank(rate: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of an exchange, forward and backward, by topology and way; and of what `Auto` takes with each bound.

    It takes it by figures that are measured here: these ranks share cores, of which no stated figures know.
    """
    layout, pair = _states()
    ranks = RankClock(layout, torch.device("cpu"))
    sides: dict[str, Exchanger] = {
        f"{topology} {name}": way(kind) for topology, kind in TOPOLOGIES.items() for name, way in WAYS.items()
    }
    machines = measured_cluster(layout, torch.device("cpu"), ranks_per_node=1)
    if dist.get_rank() == 0:
        say(f"codec_links: {rate}: {machines}")
    for bound in _BOUNDS:
        sides[f"auto {bound}"] = Auto(cluster=machines, max_relative_error=bound)
    carriers = {name: exchange.resolve(pair, layout) for name, exchange in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    # A topology's first exchange makes groups and connections; one value column is enough for that.
    narrow = Pair(pair.transition, pair.state[..., :1].contiguous())
    for carrier in carriers.values():
        exchange_seconds(carrier, narrow, narrow.state, ranks)
    begun = time.perf_counter()
    for number in range(rounds):
        for name, carrier in carriers.items():
            times[name].append(sum(exchange_seconds(carrier, pair, pair.state, ranks)))
            if dist.get_rank() == 0:
                say(f"codec_links: {rate}, round {number + 1} of {rounds}: {name} {times[name][-1] * 1e3:,.1f} ms")
        # All ranks stop alike.
        if ranks.largest([time.perf_counter() - begun])[0] > _MOST_SECONDS:
            break
    for bound in _BOUNDS:
        taken = Auto(cluster=machines, max_relative_error=bound).choose(pair, layout)
        blocks = f", {taken.cost.num_blocks} blocks" if taken.cost.num_blocks else ""
        times[f"auto {bound}: {taken.topology.label}{blocks}"] = times.pop(f"auto {bound}")
    return times


def codec_links(quick: bool) -> Table:
    table = Table(
        "codec_links",
        f"One exchange with nothing to hide it, forward + backward, {_NUM_RANKS} emulated hosts, states of "
        "B1 H16 K = V = 128 (1 MiB)",
        "bytes that are saved are time saved where the link is slow, and no more than coding costs where it is fast",
        ["link", "topology", *(f"ms, {name}" for name in WAYS)],
    )
    bounds = Table(
        "codec_choice",
        "What auto takes with a bound on the error of a passage, on the same hosts, by figures measured on them",
        "as fast as the fastest way that keeps to the bound",
        ["link", "max_relative_error", "taken", "ms"],
    )
    for rate in RATES[1:2] if quick else RATES:
        with Cluster(_NUM_RANKS, rate) as cluster:
            times = cluster.call(_seconds_on_rank, rate, 1 if quick else {"1gbit": 5}.get(rate, 2))[0]
        medians = {name: statistics.median(values) for name, values in times.items()}
        for topology in TOPOLOGIES:
            table.add(rate, topology, *(f"{medians[f'{topology} {name}'] * 1e3:,.1f}" for name in WAYS))
        for bound in _BOUNDS:
            name = next(name for name in medians if name.startswith(f"auto {bound}: "))
            bounds.add(rate, bound, name.partition(": ")[2], f"{medians[name] * 1e3:,.1f}")
    print(bounds.markdown(), flush=True)
    return table


TRAINED: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"exchange_dtype": "bfloat16"},
    "int8": {"exchange_dtype": "int8"},
    "float8": {"exchange_dtype": "float8"},
    "top 1/4": {"exchange_dtype": "top_k", "exchange_top_k": 0.25},
    "top 1/20": {"exchange_dtype": "top_k", "exchange_top_k": 0.05},
    "top 1/20 with feedback": {
        "exchange_dtype": "top_k",
        "exchange_top_k": 0.05,
        "exchange_error_feedback": True,
    },
}


def _config(folder: Path, seed: int, name: str, steps: int) -> Config:
    """A run of the trainer's own hybrid on two ranks."""
    values: dict[str, dict[str, Any]] = {
        "data": {"folder": str(folder / f"data-{seed}"), "max_bytes": 1_000_000},
        # The check compares with one process to the last digits, which is what a codec gives up.
        "train": {"seed": seed, "steps": steps, "seq_len": 1024, "batch_tokens": 2048, "check_tokens": 0},
        "parallel": {"sp": 2, "exchange": "all_gather", **TRAINED[name]},
        "validation": {"every": 0},
        "checkpoint": {"every": 0},
        "sample": {"tokens": 0},
        "run": {"measure_alone": False, "dir": str(folder / f"run-{seed}-{list(TRAINED).index(name)}")},
    }
    return from_mapping(values)


def _losses_on_rank(folder: str, seeds: int, steps: int) -> dict[str, list[float]]:
    """The loss on held-out text after each run, by what states travel in, and seed; on rank 0."""
    losses: dict[str, list[float]] = {name: [] for name in TRAINED}
    ranks = Ranks(Place(dist.get_rank(), dist.get_world_size()), torch.device("cpu"))
    for seed in range(seeds):
        for name in TRAINED:
            config = _config(Path(folder), seed, name, steps)
            with contextlib.redirect_stdout(io.StringIO()):
                code = train_on(ranks, config, StopRequest())
            if code:
                raise SystemExit(f"a run with {name} ended with {code}")
            if ranks.is_first:
                summary = json.loads((Path(str(config.run.dir)) / "summary.json").read_text())
                losses[name].append(float(summary["validation_loss"]))
                say(f"codec_training: seed {seed}, {name}: {losses[name][-1]:.4f}")
    return losses


def codec_training(quick: bool) -> Table:
    seeds, steps = (1, 4) if quick else (3, 100)
    table = Table(
        "codec_training",
        f"Held-out loss of the trainer's hybrid (LLLN, simple_gla) after {steps} steps of 2,048 tokens on two ranks, by what "
        f"states travel in, {seeds} seeds",
        "no worse than float32 by more than seeds differ",
        ["on the wire", *(f"seed {seed}" for seed in range(seeds)), "mean", "mean less float32's, seed by seed"],
    )
    with tempfile.TemporaryDirectory() as folder:
        losses = run_ranks(2, _losses_on_rank, folder, seeds, steps)[0]
    for name, found in losses.items():
        differences = [loss - plain for loss, plain in zip(found, losses["float32"], strict=True)]
        spread = f"{min(differences):+.4f} to {max(differences):+.4f}"
        table.add(
            name,
            *(f"{loss:.4f}" for loss in found),
            f"{statistics.mean(found):.4f}",
            f"{statistics.mean(differences):+.4f} ({spread})",
        )
    return table


TABLES: dict[str, Callable[[bool], Table]] = {
    "codec_errors": codec_errors,
    "codec_links": codec_links,
    "codec_training": codec_training,
}
