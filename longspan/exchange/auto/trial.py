"""Exchanges on trial: the time of a topology on the ranks at hand, from when all are ready until the last has what it waits for.

The cost model knows links and folds one by one. What ranks do to each other that share cores or a switch, it does not know; among
topologies that cost about the same, that decides. So ``exchange="auto"`` tries those that the model finds close.
"""

from __future__ import annotations

import logging
import statistics
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from longspan.comm.background import run_beside
from longspan.comm.groups import kept
from longspan.comm.traffic import unrecorded
from longspan.exchange.auto.timing import RankClock
from longspan.exchange.topology import Arrived, Carrier
from longspan.layout import SequenceLayout, group_of
from longspan.state import Pair

_log = logging.getLogger("longspan")

# A topology that is modelled at so many times the shortest measured time is not tried: the model is not that far out.
_HOPELESS = 2.0
# Those that need at most so many times as long as the fastest, the first time, are tried again.
_CLOSE = 1.5
_MORE_REPEATS = 4


@dataclass(frozen=True)
class Candidate:
    """Who may carry an exchange out, with its seconds forward and backward together by the cost model; name: of its topology."""

    name: str
    carrier: Carrier
    modelled_seconds: float


def try_out(candidates: Sequence[Candidate], pair: Pair, layout: SequenceLayout) -> list[float | None]:
    """Seconds of an exchange, forward and backward together, with each candidate; None where not tried; the same on all ranks.

    candidates: cheapest first. They are tried in this order, until the next is modelled at twice the shortest time measured.
    pair: as `Carrier.start` takes it; its sizes alone matter.

    Every rank of the group calls this, in the same order among its exchanges.
    """
    device = pair.state.device
    if layout.rank == 0:
        _log.info(
            "tries the topologies that are close for states %s, once for the process group", tuple(pair.state.shape)
        )
    # Exchanges that are still under way are counted.
    run_beside(group_of(layout), device, lambda _: None).wait()
    done: Future[list[float | None]] = Future()

    def work() -> None:
        try:
            if device.type != "cpu":
                torch.accelerator.set_device_index(device)
            with torch.no_grad(), unrecorded():
                done.set_result(_try_out(candidates, pair, layout))
        except BaseException as error:
            done.set_exception(error)

    # In a thread of its own, whatever watches the caller's operations sees none of these: selective checkpointing, which counts
    # them, runs the layer again without.
    thread = threading.Thread(target=work, name="longspan-exchange-trial")
    thread.start()
    thread.join()
    return done.result()


def _try_out(candidates: Sequence[Candidate], pair: Pair, layout: SequenceLayout) -> list[float | None]:
    transition = pair.transition.form(torch.zeros_like(pair.transition.parameter))
    sample = Pair(transition, torch.zeros_like(pair.state))
    narrow = Pair(transition, sample.state[..., :1].contiguous())
    ranks = RankClock(layout, pair.state.device)
    times: list[list[float]] = [[] for _ in candidates]

    def measure(number: int) -> None:
        times[number].append(sum(exchange_seconds(candidates[number].carrier, sample, sample.state, ranks)))

    def connect(carrier: Carrier) -> bool:
        exchange_seconds(carrier, narrow, narrow.state, ranks)
        return True

    def shortest() -> float:
        return min((statistics.median(taken) for taken in times if taken), default=float("inf"))

    for number, candidate in enumerate(candidates):
        if candidate.modelled_seconds > _HOPELESS * shortest():
            break
        # A topology's first exchange makes process groups and connections.
        kept(
            group_of(layout),
            ("connected", candidate.name, layout.ranks_per_node),
            partial(connect, candidate.carrier),
        )
        measure(number)
    close = [number for number, taken in enumerate(times) if taken and taken[0] <= _CLOSE * shortest()]
    for _ in range(_MORE_REPEATS if len(close) > 1 else 0):
        for number in close:
            measure(number)
    return [statistics.median(taken) if taken else None for taken in times]


def exchange_seconds(carrier: Carrier, pair: Pair, grad: Tensor, ranks: RankClock) -> tuple[float, float]:
    """Seconds of one exchange forward, and backward: of the rank that takes longest, from when all are ready; equal on all ranks.

    carrier: of the exchange. pair: as `Carrier.start` takes it. grad: G ``[num_segments, B, H, K, V]``.
    """
    layout, kind = ranks.layout, pair.transition.form
    arrived: list[Arrived] = []
    ranks.largest([])
    forward = ranks.one(lambda: arrived.append(carrier.start(pair, layout).wait()))
    ranks.largest([])
    context = arrived[0].context
    backward = ranks.one(lambda: carrier.start_reverse(kind, context, grad, layout).wait())
    forward, backward = ranks.largest([forward, backward])
    return forward, backward
