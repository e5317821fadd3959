"""Batches made ahead of the step that needs them, in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

from longspan.errors import DataError

Batch = TypeVar("Batch")

_SECONDS_TO_END = 2.0
"""How long the end of a run waits for the thread, which a read that hangs may hold for ever."""


class Loader(Generic[Batch]):
    """What `make` returns for the steps from `first` on, before `stop`, made in a thread, `ahead` steps at most before it is taken.

    A context, at whose end the thread has ended, or is left behind where reading takes longer. What `make` raises stops the thread,
    and is raised by `take`.

    timeout_seconds: longest time to wait for a step's batch. whose: of the message that it was not there.
    """

    def __init__(
        self,
        make: Callable[[int], Batch],
        first: int,
        stop: int,
        *,
        ahead: int = 2,
        timeout_seconds: float = 600.0,
        whose: str = "",
    ) -> None:
        self._make = make
        self._next_to_make, self._next_to_take, self._stop = first, first, stop
        self._ahead = ahead
        self._timeout = timeout_seconds
        self._whose = whose
        self._made: dict[int, Batch] = {}
        self._failure: BaseException | None = None
        self._given_up = False
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="longspan-loader", daemon=True)

    def __enter__(self) -> Loader[Batch]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        # A thread that waits for a disk that does not answer ends with the process.
        self._thread.join(_SECONDS_TO_END)

    def wait(self) -> float:
        """Wait until the next batch is there, or until it is known that it cannot be had; seconds that this took."""
        start = time.perf_counter()
        with self._changed:
            there = self._changed.wait_for(self._is_settled, self._timeout)
            if not there and self._failure is None:
                # Other ranks are told: a batch that comes now comes too late.
                self._given_up = True
                self._failure = DataError(
                    f"the batch of step {self._next_to_take + 1}{self._whose} was not there after {self._timeout:g} s of reading. "
                    "Look at the disk that holds the data, or raise parallel.timeout_seconds"
                )
        return time.perf_counter() - start

    @property
    def has_failed(self) -> bool:
        """Whether the next batch cannot be had; `take` raises why."""
        with self._changed:
            return self._failure is not None and (self._given_up or self._next_to_take not in self._made)

    def check(self) -> None:
        """Raise why the next batch cannot be had, if it cannot.

        Raises:
            DataError: if it was not there in time. Whatever `make` raised.
        """
        if self.has_failed:
            assert self._failure is not None
            raise self._failure

    def take(self) -> Batch:
        """The next step's batch, waited for; raises as `check`."""
        self.wait()
        self.check()
        with self._changed:
            batch = self._made.pop(self._next_to_take)
            self._next_to_take += 1
            self._changed.notify_all()
            return batch

    @property
    def is_settled(self) -> bool:
        """Whether there is nothing to wait for: the next batch is there, or cannot be had, or the last one was taken."""
        with self._changed:
            return self._is_settled()

    def _is_settled(self) -> bool:
        return self._next_to_take in self._made or self._failure is not None or self._next_to_take >= self._stop

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._made) < self._ahead)
                if self._closed or self._next_to_make >= self._stop:
                    return
                step = self._next_to_make
            try:
                batch = self._make(step)
            except BaseException as error:
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._made[step] = batch
                self._next_to_make += 1
                self._changed.notify_all()
