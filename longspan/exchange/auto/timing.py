"""Taking times on the ranks of a group that work together, so that every rank comes to the same figures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from longspan.comm.background import Operations, run_beside
from longspan.layout import SequenceLayout, group_of


@dataclass(frozen=True)
class RankClock:
    """The ranks that measure together, seen from one of them; each calls the same methods in the same order."""

    layout: SequenceLayout
    device: torch.device

    def messages(self, work: Callable[[dist.ProcessGroup], list[float]]) -> list[float]:
        """The largest of all ranks' values, one by one; `work` sends messages."""
        return self.largest(run_beside(group_of(self.layout), self.device, work, "messages").wait())

    def collectives(self, work: Callable[[dist.ProcessGroup], list[float]]) -> list[float]:
        """The largest of all ranks' values, one by one; `work` may make collectives."""
        return self.largest(run_beside(group_of(self.layout), self.device, work).wait())

    def largest(self, values: list[float]) -> list[float]:
        """The largest of all ranks' values, one by one; no rank has them before all have come."""

        def reduce(group: dist.ProcessGroup) -> list[float]:
            # Without a number nobody would wait for anybody.
            largest = torch.tensor([0.0, *values], dtype=torch.float64).to(self.device)
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
            return [float(value) for value in largest.tolist()[1:]]

        return run_beside(group_of(self.layout), self.device, reduce).wait()

    def alone(self, function: Callable[[], object], repeats: int) -> float:
        """Shortest time of a call on this rank, after one that is not counted: other work on the machine only makes it longer."""
        function()
        return min(self.one(function) for _ in range(repeats))

    def together(self, function: Callable[[], object], repeats: int) -> float:
        """Median time of a call that all ranks begin together, after one that is not counted; the slowest rank's time counts.

        The median, not the shortest: what ranks do to each other that share cores or links is part of the time.
        """
        times = []
        for _ in range(1 + repeats):
            self.largest([])
            times.append(self.one(function))
        return statistics.median(self.largest(times[1:]))

    def beside(
        self, work: Callable[[dist.ProcessGroup], object], repeats: int, operations: Operations = "collectives"
    ) -> float:
        """`together` for work on a process group as `run_beside` takes it, from its begin to its end."""
        times: list[float] = []

        def timed(group: dist.ProcessGroup) -> None:
            times.append(self.one(partial(work, group)))

        for _ in range(1 + repeats):
            self.largest([])
            run_beside(group_of(self.layout), self.device, timed, operations).wait()
        return statistics.median(self.largest(times[1:]))

    def one(self, function: Callable[[], object]) -> float:
        """Time of one call."""
        self._synchronize()
        begun = time.perf_counter()
        function()
        self._synchronize()
        return time.perf_counter() - begun

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
