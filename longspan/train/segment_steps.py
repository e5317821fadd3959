"""A step that is computed in segments of time: how far it is, memory between two of them, and that a signal stops it there."""

from __future__ import annotations

from longspan.launch import StopRequest
from longspan.streaming import SegmentDone
from longspan.train.memory import StepMemory
from longspan.train.phase import RunPhase
from longspan.train.ranks import Ranks
from longspan.train.report import Report

_BACKWARD_SHARE = 0.75
"""Of the time of both passes: the second computes forward once more, and backward, which takes twice as long."""


class StepStoppedError(Exception):
    """A signal has reached a rank: the step is given up, and its gradients with it. Raised on all ranks."""


class SegmentsOfStep:
    """Called after each pass over a segment, on every rank: `Between` of a step with `num_micro_batches`."""

    def __init__(
        self,
        step: int,
        num_micro_batches: int,
        ranks: Ranks,
        stop: StopRequest,
        phase: RunPhase,
        report: Report,
        memory: StepMemory,
    ) -> None:
        self._step, self._num_micro_batches = step, num_micro_batches
        self._ranks, self._stop, self._phase, self._report = ranks, stop, phase, report
        self._memory = memory
        self._micro_batch = 0

    def __call__(self, done: SegmentDone) -> None:
        self._memory.pass_ended()
        if done.kind == "again":
            return
        # Each rank's documents are its own, the number of these passes is not: the ranks meet here equally often.
        if bool(self._ranks.gather_numbers([self._stop.requested]).any()):
            raise StepStoppedError
        is_backward = done.kind == "backward"
        left = done.segment if is_backward else done.num_segments - 1 - done.segment
        passed = 1 - left / done.num_segments
        of_sequence = 1 - _BACKWARD_SHARE + _BACKWARD_SHARE * passed if is_backward else (1 - _BACKWARD_SHARE) * passed
        share = (self._micro_batch + of_sequence) / self._num_micro_batches
        where = f"segment {done.segment + 1} of {done.num_segments}"
        self._phase.name = "computing backward" if is_backward or left <= 1 else "computing forward"
        self._phase.detail = f"behind {where}"
        self._report.within_step(self._step, share, f"{where} {done.kind}")
        if is_backward and not done.segment:
            self._micro_batch += 1
