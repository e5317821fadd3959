"""Progress beside the main thread: an exchange of several steps runs on while the caller computes.

A topology of several steps (receive, fold, send; all-to-all, scan, all-to-all) is written as plain straight-line code and given to
`run_beside`. What comes back is a `Task`, to be waited for where the result is needed.

- On the CPU the work runs in a daemon thread, one per process group, in the order of the calls.
- On CUDA the host only queues the work, at once, on a side stream, one per process group: nothing in it may make the host wait.

The work is given process groups of its own, with the ranks of the caller's, made at the first use. Operations of a group are
matched by their order, and the order between a thread and the main thread differs from rank to rank. Messages have a group apart
from that of collectives: ranks send and receive unequal numbers of them, which a collective of the same group would take for a
mismatch (gloo with TORCH_DISTRIBUTED_DEBUG=DETAIL).
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Generic, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.comm.groups import kept, new_group_beside
from longspan.comm.numbering import (
    Step,
    Steps,
    begin,
    close_connections,
    own_groups,
    steps_of,
    wait_in_step,
    working_on,
)
from longspan.comm.profiling import named_range
from longspan.comm.traffic import waiting
from longspan.errors import ExchangeError

T = TypeVar("T")
Work = Callable[[dist.ProcessGroup], T]
Operations = Literal["collectives", "messages"]
_Item = tuple[Callable[[dist.ProcessGroup], Any], dist.ProcessGroup, Future[Any], Steps, Step]
_log = logging.getLogger("longspan")

# How long the end of a process waits for a work that may be about to finish.
_SECONDS_TO_FINISH = 0.5


class Task(ABC, Generic[T]):
    """Work under way beside the main thread."""

    @abstractmethod
    def wait(self) -> T:
        """What the work returned; raises what it raised. The time spent counts as waiting for other ranks."""


def run_beside(
    group: dist.ProcessGroup,
    device: torch.device,
    work: Work[T],
    operations: Operations = "collectives",
    *,
    name: str = "work",
    phase: str = "forward",
) -> Task[T]:
    """Run `work` beside the main thread.

    Args:
        group: of two ranks or more.
        device: where the tensors are. The work sees them as they are at the call.
        work: called with the process group for its operations, without gradients and without autocast. It returns tensors, or
            tuples, lists or dataclasses of them, that it has made or been given. It must not write into what it has been given.
        operations: what the work does on its group, collectives or point-to-point messages, never both.
        name, phase: of the exchange, as `longspan.comm.numbering.begin` takes them.

    Every rank of the group calls this for the same work, in the same order. Works of one group run one after another.
    Once a work has failed, those begun after it fail too; the next one that is begun has new groups.

    Raises:
        ExchangeError: if an earlier work failed, and nobody has waited for its result.
    """
    step = begin(group, name, phase)
    if device.type == "cpu":
        sides = own_groups(group, (operations,), lambda side: _dedicated(group, f"{operations} {side}", device))
        worker = kept(group, "worker", lambda: _Worker(f"longspan-exchange-rank-{group.rank()}"))
        return worker.submit(work, sides[phase == "backward"], group, step)
    dedicated = kept(group, ("beside", operations, device.type), lambda: _dedicated(group, operations, device))
    stream = kept(group, ("stream", device), lambda: torch.Stream(device))
    with working_on(step):
        return _StreamTask(stream, lambda: work(dedicated))


def _dedicated(group: dist.ProcessGroup, operations: str, device: torch.device) -> dist.ProcessGroup:
    made = new_group_beside(group, description=f"longspan {operations}")
    if device.type != "cpu":
        # NCCL makes its communicator at the first operation, which all ranks must join; a message has but two.
        dist.all_reduce(torch.zeros(1, device=device), group=made)
    return made


@contextmanager
def _plain(device_type: str) -> Iterator[None]:
    """Without gradients and without autocast: states keep their dtype whatever the layer around them computes in."""
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


class _Worker:
    """A daemon thread that runs works in order; it ends with the worker, or with the process.

    What it still waits for then will never come: it belongs to an exchange that was not finished. Its group's connections are
    closed, so that the wait ends with an error. A thread that stays in torch while Python shuts down would abort the process.
    """

    def __init__(self, name: str) -> None:
        self._works: SimpleQueue[_Item | None] = SimpleQueue()
        running: list[dist.ProcessGroup] = []
        thread = threading.Thread(target=_serve, args=(self._works, running), name=name, daemon=True)
        thread.start()
        weakref.finalize(self, _end, self._works, running, thread)
        _log.info("a thread begins, %s: exchanges of several steps run in it", name)

    def submit(self, work: Work[T], own: dist.ProcessGroup, group: dist.ProcessGroup, step: Step) -> Task[T]:
        done: Future[T] = Future()
        self._works.put((work, own, done, steps_of(group), step))
        return _ThreadTask(done, group, step)


def _serve(works: SimpleQueue[_Item | None], running: list[dist.ProcessGroup]) -> None:
    while (item := works.get()) is not None:
        work, group, done, steps, step = item
        running.append(group)
        try:
            if steps.epoch != step.epoch or steps.failure is not None:
                said = "" if steps.failure is None else f": {steps.failure}"
                raise ExchangeError(f"an earlier exchange of this process group failed{said}") from steps.failure
            with named_range("longspan.exchange.work"), _plain("cpu"), working_on(step):
                done.set_result(work(group))
        except BaseException as error:
            # Everything: whatever ends a work must reach the one who waits for it.
            if steps.epoch == step.epoch and steps.failure is None:
                steps.failure = error
            done.set_exception(error)
        running.clear()
        # Not kept while the thread waits for the next one.
        del item, work, group, done, steps


def _end(works: SimpleQueue[_Item | None], running: list[dist.ProcessGroup], thread: threading.Thread) -> None:
    works.put(None)
    if thread is threading.current_thread():
        return
    thread.join(_SECONDS_TO_FINISH)
    if thread.is_alive():
        for group in list(running):
            close_connections(group)
        thread.join(_SECONDS_TO_FINISH)


class _ThreadTask(Task[T]):
    def __init__(self, done: Future[T], group: dist.ProcessGroup, step: Step) -> None:
        self._done, self._group, self._step = done, group, step

    def wait(self) -> T:
        def wait_for(seconds: float) -> bool:
            try:
                self._done.result(seconds)
            except TimeoutError:
                if self._done.done():
                    raise
                return False
            return True

        with waiting():
            wait_in_step(wait_for, self._group, self._step)
            return self._done.result()


class _StreamTask(Task[T]):
    """Work that has been queued on a side stream.

    The work is kept until it has been waited for: its inputs then are not freed, and their memory not given to what the current
    stream does next, while the side stream may still read them.
    """

    def __init__(self, stream: torch.Stream, work: Callable[[], T]) -> None:
        self._stream = stream
        self._work: Callable[[], T] | None = work
        stream.wait_stream(torch.accelerator.current_stream(stream.device))
        with stream, named_range("longspan.exchange.work"), _plain(stream.device.type):
            self._result = work()
        self._finished = stream.record_event()

    def wait(self) -> T:
        current = torch.accelerator.current_stream(self._stream.device)
        with waiting():
            current.wait_event(self._finished)
        for tensor in _tensors(self._result):
            # Made on the side stream, used on this one.
            tensor.record_stream(current)
        self._work = None
        return self._result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
