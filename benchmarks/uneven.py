"""`uneven`: a step on two ranks of which one has half a core, with equal shares, and with shares by speed."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import Table, paired, require_close, run_ranks, say, seconds_of_slowest
from longspan import SequenceLayout, sum_gradients
from longspan.launch import Place
from longspan.parallel import MeshDegrees
from longspan.train.balance import measured_balance
from longspan.train.config import Config, from_mapping
from longspan.train.model import build_parallel
from longspan.train.ranks import Ranks

_VOCABULARY = 2048
_SLOW_RANK = 1
# A rank at full speed and one at half of it.
_SPEED = 1.5
_MODELS = ("L", "LLLN")
_ORDERS = ("zigzag", "contiguous")


@contextlib.contextmanager
def _busy_core(core: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that computes all the time on `core`, of which whoever else is there then has half; it begins stopped."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        os.sched_setaffinity(busy.pid, {core})
        busy.send_signal(signal.SIGSTOP)
        yield busy
    finally:
        busy.kill()
        busy.wait()


@contextlib.contextmanager
def _slow(busy: subprocess.Popen[bytes] | None) -> Iterator[None]:
    dist.barrier()
    if busy is not None:
        busy.send_signal(signal.SIGCONT)
    try:
        yield
    finally:
        dist.barrier()
        if busy is not None:
            busy.send_signal(signal.SIGSTOP)


def _config(pattern: str, order: str, seq_len: int) -> Config:
    return from_mapping(
        {
            "data": {"documents": "concatenate"},
            "model": {"pattern": pattern},
            "parallel": {"order": order, "exchange": "all_gather"},
            "train": {"seq_len": seq_len, "batch_tokens": seq_len},
        }
    )


def _on_rank(pattern: str, order: str, seq_len: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step: at full speed with equal shares; with a slow rank with equal shares, measured ones, and two to one."""
    rank = dist.get_rank()
    core = sorted(os.sched_getaffinity(0))[rank]
    os.sched_setaffinity(0, {core})
    ranks = Ranks(Place(rank, dist.get_world_size()), torch.device("cpu"))
    ranks.arrange(MeshDegrees(sp=ranks.world_size))
    config = _config(pattern, order, seq_len)
    model = build_parallel(config, _VOCABULARY, ranks)
    tokens = torch.randint(_VOCABULARY, (1, seq_len + 1), generator=torch.Generator().manual_seed(0))

    def step(weights: tuple[float, ...] | None) -> Tensor:
        layout = SequenceLayout(seq_len, None, config.parallel.order, weights=weights)
        share = model(layout.shard(tokens[:, :-1]), layout, labels=layout.shard(tokens[:, 1:]), num_valid=seq_len)
        share.backward()
        sum_gradients(model)
        loss = share.detach()
        dist.all_reduce(loss)
        model.zero_grad(set_to_none=True)
        return loss

    with contextlib.ExitStack() as stack:
        busy = stack.enter_context(_busy_core(core)) if rank == _SLOW_RANK else None
        with _slow(busy):
            (measured,) = measured_balance(config, _VOCABULARY, ranks).groups
        ways: dict[str, tuple[float, ...] | None] = {"even": None, "measured": measured, "by hand": (2.0, 1.0)}
        expected = step(None)
        for name, weights in ways.items():
            require_close(f"the loss of {name} shares", step(weights), expected, 1e-5)
        times: dict[str, list[float]] = {name: [] for name in ("full", *ways)}
        for number in range(rounds):
            if rank == 0:
                say(f"uneven: {pattern}, {order}, round {number + 1} of {rounds}")
            times["full"].append(seconds_of_slowest(lambda: step(None)))
            # One after another in turn, as the first of them finds the core as it was left.
            turn = number % len(ways)
            with _slow(busy):
                for name, weights in [*ways.items()][turn:] + [*ways.items()][:turn]:
                    times[name].append(seconds_of_slowest(lambda weights=weights: step(weights)))  # type: ignore[misc]
    assert measured is not None
    return {"share": measured[_SLOW_RANK] / sum(measured), "seconds": times}


def uneven(quick: bool) -> Table:
    table = Table(
        "uneven",
        "A step of the trainer's model (forward, backward, sum of gradients) on two ranks of one core each, one of which shares "
        "its core with a process that is always busy, and so has half the speed",
        "with shares by speed the slow rank costs what its speed is missing: the ideal is 4/3 of a step at full speed",
        [
            "layers",
            "order",
            "tokens",
            "s, full speed",
            "s, ideal",
            "s, even",
            "s, measured",
            "s, 2 to 1",
            "even / ideal",
            "measured / ideal",
            "2 to 1 / ideal",
            "even / measured",
            "measured share of the slow rank",
        ],
    )
    seq_len, rounds = (1024, 3) if quick else (8192, 9)
    for pattern in _MODELS:
        for order in _ORDERS:
            found = run_ranks(2, _on_rank, pattern, order, seq_len, rounds)[0]
            times: dict[str, list[float]] = found["seconds"]
            times["ideal"] = [2 / _SPEED * full for full in times["full"]]
            table.add(
                pattern,
                order,
                f"{seq_len:,}",
                *(f"{statistics.median(times[name]):.3f}" for name in ("full", "ideal", "even", "measured", "by hand")),
                *(paired(times[name], times["ideal"]).ratio for name in ("even", "measured", "by hand")),
                paired(times["even"], times["measured"]).ratio,
                f"{found['share']:.1%}",
            )
    return table


TABLES: dict[str, Callable[[bool], Table]] = {"uneven": uneven}
