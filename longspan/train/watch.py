"""No wait without an end: each rank says where it is, and the ranks end together when one of them has failed.

A collective that waits too long for another rank raises an error on the rank that waits, which knows nothing of the one it waits
for: that one may be asleep, stopped, reading from a disk that does not answer. So each rank has a thread that

- publishes twice a second where the rank is: its step, its phase, and for how long. A rank that fails adds to its error where the
  others were, and which of them do not answer;
- ends its own rank soon after another one has failed, with the stacks of its threads, whatever the rank is waiting for;
- ends its rank where a wait that is no collective, for a batch or the disk, takes longer than `parallel.timeout_seconds`.

What a rank publishes is a file in the folder where local ranks meet, and an entry in the store of the process group otherwise.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from longspan.errors import ExchangeError, LongspanError
from longspan.launch import Place, report_failure, wake_to_show_stacks
from longspan.train.phase import RunPhase

_SECONDS_BETWEEN = 0.5
# After another rank has failed: a rank that sees the failure itself has this long to say so.
_SECONDS_TO_END = 3.0
# Ranks that wait in a collective give up first, and say who is late.
_SECONDS_BEYOND = 3.0
_SECONDS_TO_TELL = 6.0
_WAITS = ("reading a batch", "saving a checkpoint")
_MOST_LISTED = 8
_FAILURE = "failure"


class Board(Protocol):
    """Where ranks leave short texts for each other."""

    def put(self, name: str, text: str) -> None:
        """Leave a text under a name, in place of what is there."""

    def get(self, name: str) -> str | None:
        """The text under a name; None if there is none."""


class FolderBoard:
    """A folder that all ranks see."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, name: str, text: str) -> None:
        """Write a file, whole or not at all."""
        temporary = self._folder / f"{name}-{os.getpid()}.tmp"
        temporary.write_text(text)
        temporary.replace(self._folder / name)

    def get(self, name: str) -> str | None:
        """Read a file."""
        try:
            return (self._folder / name).read_text()
        except FileNotFoundError:
            return None


class StoreBoard:
    """A store of torch.distributed, over a connection of its own: a thread that waits in the store must not make another wait."""

    def __init__(self, store: Any, run: str) -> None:
        from torch.distributed import PrefixStore

        self._store: Any = PrefixStore(f"longspan watch {run}", store.clone())

    def put(self, name: str, text: str) -> None:
        """Set a key."""
        self._store.set(name, text)

    def get(self, name: str) -> str | None:
        """Read a key, without waiting for it."""
        return self._store.get(name).decode() if self._store.check([name]) else None


def board_of(place: Place, run: str) -> Board | None:
    """Where the ranks of a run leave texts, once they have met; None for a single rank.

    run: the same on all ranks, and of no other run: torchrun's store outlives the ranks that it starts anew.
    """
    if place.world_size == 1:
        return None
    if place.rendezvous is not None:
        return FolderBoard(place.rendezvous)
    from torch.distributed import distributed_c10d

    store: Any = distributed_c10d._get_default_store()
    return StoreBoard(store, run)


class Watch:
    """The thread of one rank. Other ranks see it from `meet` on, which is called when all have met."""

    def __init__(self, place: Place, phase: RunPhase, timeout_seconds: float) -> None:
        self._place = place
        self._phase = phase
        self._timeout = timeout_seconds
        self._board: Board | None = None
        self._beats = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="longspan-watch", daemon=True)

    def meet(self, run: str) -> None:
        """Begin to tell the other ranks where this one is. run: as of `board_of`."""
        self._board = board_of(self._place, run)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what is done in the block; an error that passes tells where the other ranks were, and ends them."""
        self._thread.start()
        try:
            yield
        except Exception as error:
            # A store on a host that has gone may not answer at all.
            teller = threading.Thread(target=self._tell, args=(error,), daemon=True)
            teller.start()
            teller.join(_SECONDS_TO_TELL)
            raise
        finally:
            self._ended.set()

    def _tell(self, error: Exception) -> None:
        board = self._board
        if board is None:
            return
        # Where the store has gone, there is nobody to tell.
        with contextlib.suppress(Exception):
            earlier = board.get(_FAILURE)
            if earlier is None:
                board.put(_FAILURE, f"{self._phase.describe(self._place)}: {type(error).__name__}")
            if isinstance(error, LongspanError) and not isinstance(error, ExchangeError):
                # All ranks refuse alike.
                return
            if earlier is None:
                for line in self._others(board):
                    error.add_note(line)
            else:
                # The rank that was first shall be the first to say so.
                time.sleep(4.0 * self._period)
                error.add_note(f"after the failure of {earlier}")

    def _others(self, board: Board) -> list[str]:
        """Where the other ranks are: first those that do not answer, then those that are elsewhere than this one."""
        ranks = [rank for rank in range(self._place.world_size) if rank != self._place.rank]
        before = {rank: _read(board, rank) for rank in ranks}
        time.sleep(3.0 * self._period)
        silent: list[str] = []
        elsewhere: list[str] = []
        beside: list[str] = []
        for rank in ranks:
            state = _read(board, rank)
            if state is None:
                silent.append(f"rank {rank} has said nothing yet")
            elif state == before[rank]:
                silent.append(f"rank {rank} does not answer; last heard of: {state['at']}")
                self._wake(state)
            else:
                is_beside = (state["step"], state["phase"]) == (self._phase.step, self._phase.name)
                (beside if is_beside else elsewhere).append(f"rank {rank}: {state['at']}, for {state['seconds']:.0f} s")
        lines = [*silent, *elsewhere, *beside]
        more = [f"{len(lines) - _MOST_LISTED} more ranks"] if len(lines) > _MOST_LISTED else []
        return lines[:_MOST_LISTED] + more

    def _wake(self, state: dict[str, Any]) -> None:
        # Of local ranks the starting command asks for stacks.
        if self._place.rendezvous is None and state["host"] == socket.gethostname():
            wake_to_show_stacks(state["pid"])

    @property
    def _period(self) -> float:
        # One store serves all ranks.
        return _SECONDS_BETWEEN * (1.0 + self._place.world_size / 500)

    def _run(self) -> None:
        while not self._ended.wait(self._period):
            self._check_wait()
            if self._board is not None:
                self._look(self._board)

    def _look(self, board: Board) -> None:
        try:
            self._publish(board)
            failure = board.get(_FAILURE)
        except Exception as error:
            # The store ends with its host: the run is over, and so is the folder of local ranks.
            failure = f"the ranks' store has gone: {type(error).__name__}"
        # The command that started local ranks ends them, and says what they were doing.
        if failure is None or self._place.rendezvous is not None or self._ended.wait(_SECONDS_TO_END):
            return
        sys.stderr.write(
            f"longspan: {self._phase.describe(self._place)} for {self._seconds():.0f} s, ends because another rank has failed "
            f"({failure}). Its threads were here:\n"
        )
        self._exit()

    def _exit(self) -> None:
        sys.stderr.flush()
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
        os._exit(1)

    def _publish(self, board: Board) -> None:
        self._beats += 1
        state = {
            "beats": self._beats,
            "step": self._phase.step,
            "phase": self._phase.name,
            "at": self._phase.where,
            "seconds": self._seconds(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        board.put(_name(self._place.rank), json.dumps(state))

    def _seconds(self) -> float:
        return time.monotonic() - self._phase.since

    def _check_wait(self) -> None:
        if self._phase.name not in _WAITS or self._seconds() <= self._timeout + _SECONDS_BEYOND:
            return
        error = TimeoutError(
            f"this takes longer than {self._timeout:g} s, parallel.timeout_seconds: {self._phase.describe(self._place)}. Look at "
            "the disk, or give more time"
        )
        report_failure(self._place, error)
        self._exit()


def _name(rank: int) -> str:
    return f"watch-{rank}"


def _read(board: Board, rank: int) -> dict[str, Any] | None:
    text = board.get(_name(rank))
    if text is None:
        return None
    state: dict[str, Any] = json.loads(text)
    return state
