"""The exchanges of a process group in their order, and what becomes of a rank that is out of step with the others.

Every rank of a group takes the same exchanges in the same order, backward too. Each has a number and a label, the same on all
ranks. A rank that has waited for long publishes the labels of its last exchanges in the group's store, and compares them with those
of other ranks that wait: where one number has two labels, the ranks are out of step, and all of them are told.
While nobody waits for long, nothing is published.

On the CPU exchanges run on process groups of their own, forward and backward apart, so that what does not belong together never
meets: gloo ends the process where two messages differ in length. After a failure these groups are closed, which ends what still
waits in them, and an *epoch* is over: the next exchange makes new ones, on all ranks alike, and counts from one again.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from longspan.comm.groups import forget, kept, new_group_beside, timeout_of
from longspan.comm.traffic import note_flight
from longspan.errors import ExchangeError, OutOfStepError

# A rank that waits for longer compares itself with the others, and again whenever so much time has passed.
SECONDS_UNTIL_COMPARED = 1.0
# How many of its last exchanges a rank publishes: what is in flight in a deep model, forward and backward.
_NUM_PUBLISHED = 512
# How many exchanges the tags of messages tell apart: the rest of a tag numbers the messages of one exchange.
NUM_TAGS = 2**11
# The tag of no message.
_NO_TAG = 2**31 - 1
_CAUSES = (
    "Every rank must make the same calls in the same order, and backpropagate through the same of them. Usual causes: a rank that "
    "skips a layer or a batch, detaches an output, or takes none of a layer's outputs into its loss; an error that one rank caught "
    "and went on from"
)

# Which forward exchange a backward one belongs to; threads see their own.
_forward_of: ContextVar[int | None] = ContextVar("forward_of", default=None)


@dataclass(frozen=True)
class Step:
    """One exchange of this rank. number: counts those of its group and epoch, from one. begun: seconds, `time.perf_counter`."""

    epoch: int
    number: int
    label: str
    begun: float = field(default_factory=time.perf_counter, compare=False)

    @property
    def word(self) -> int:
        """What messages of the exchange carry: 64 bits of number and label, positive."""
        return (crc32(self.label.encode()) >> 1) << 32 | self.number % 2**32

    @property
    def tag(self) -> int:
        """A small number that tells messages of this exchange from those of others: it depends on its number and label."""
        return crc32(f"{self.number} {self.label}".encode()) % NUM_TAGS

    def check(self, words: Tensor) -> None:
        """Raise OutOfStepError unless all `words`, as they arrived on the host, are this exchange's."""
        for place, word in enumerate(words.tolist()):
            if word != self.word:
                raise OutOfStepError(
                    f"the ranks of a group are out of step: what arrived for exchange {self.number} of the group, {self.label!r}, "
                    f"was sent for {self._described(word)} (row {place} of {len(words)}). {_CAUSES}"
                )

    def _described(self, word: int) -> str:
        number = word % 2**32
        return f"exchange {number}" if number != self.number else "another kind of exchange of the same number"


# The step whose work a thread does.
_current: ContextVar[Step | None] = ContextVar("current", default=None)


@dataclass
class Steps:
    """The exchanges that this rank has begun on one group.

    failure: what has gone wrong in this epoch, until the caller has been told.
    """

    epoch: int = 0
    number: int = 0
    recent: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=_NUM_PUBLISHED))
    failure: BaseException | None = None
    unread: deque[tuple[torch.Event, Tensor, Step]] = field(default_factory=deque)
    """Words that arrived on another device, on their way to the host, which never waits for them."""


def steps_of(group: dist.ProcessGroup) -> Steps:
    """The steps of a group."""
    return kept(group, "steps", Steps)


@contextmanager
def backward_of(number: int) -> Iterator[None]:
    """Names the forward exchange whose backward is begun in the block."""
    token = _forward_of.set(number)
    try:
        yield
    finally:
        _forward_of.reset(token)


def begin(group: dist.ProcessGroup, name: str, phase: str) -> Step:
    """The step of an exchange that is about to be launched; to be called on every rank of the group.

    Raises:
        ExchangeError: if an earlier exchange of the group has failed unseen.
    """
    steps = steps_of(group)
    while steps.failure is None and steps.unread and steps.unread[0][0].query():
        _, words, step = steps.unread.popleft()
        try:
            step.check(words)
        except OutOfStepError as error:
            steps.failure = error
    if steps.failure is not None:
        raise _error_to_raise(group, steps.failure, None)
    steps.number += 1
    forward = _forward_of.get()
    label = f"{phase} {name}" if forward is None else f"{phase} {name} of exchange {forward}"
    steps.recent.append((steps.number, label))
    return Step(steps.epoch, steps.number, label)


def channel(group: dist.ProcessGroup, device: torch.device, phase: str) -> dist.ProcessGroup:
    """The process group for collectives of the calling thread: one of our own for each phase on the CPU, else `group` itself."""
    if device.type != "cpu":
        return group
    sides = own_groups(group, ("direct",), lambda side: new_group_beside(group, None, f"longspan direct {side}"))
    return sides[phase == "backward"]


def own_groups(
    group: dist.ProcessGroup, key: tuple[Any, ...], make: Callable[[str], dist.ProcessGroup]
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Two process groups of our own beside `group`, forward and backward, made together at the first call of an epoch."""
    return kept(group, ("own groups", *key), lambda: (make("forward"), make("backward")))


def launch(
    group: dist.ProcessGroup,
    device: torch.device,
    name: str,
    phase: str,
    collective: Callable[[dist.ProcessGroup, Step], Any],
    words: Callable[[], Tensor] | None = None,
) -> Any:
    """Begin an exchange that is one collective of the calling thread.

    collective: launches it on a process group and returns its work. words: once it is done, the words that arrived, which must be
    those of the step; None where messages carry none.

    Returns:
        What is to be waited for, by ``wait()``, which raises as `wait_in_step` does.
    """
    step = begin(group, name, phase)
    own = channel(group, device, phase)
    try:
        work = collective(own, step)
    except RuntimeError as error:
        raise _error_to_raise(group, error, step) from error
    return _Watched(work, group, step, device, words)


@dataclass(frozen=True)
class _Watched:
    work: Any
    group: dist.ProcessGroup
    step: Step
    device: torch.device
    words: Callable[[], Tensor] | None

    def wait(self) -> None:
        if self.device.type != "cpu":
            self.work.wait()
            if self.words is not None:
                check_arrived(self.words(), self.group, self.step)
            return

        def wait_for(seconds: float) -> bool:
            try:
                self.work.wait(timedelta(seconds=seconds))
            except RuntimeError:
                if self.work.is_completed():
                    raise
                return False
            return True

        words, step = self.words, self.step
        wait_in_step(wait_for, self.group, step, None if words is None else lambda: step.check(words()))


def check_arrived(words: Tensor, group: dist.ProcessGroup, step: Step) -> None:
    """Check the words of messages that arrived: at once on the CPU; elsewhere when a later exchange finds them on the host.

    Raises:
        OutOfStepError: if they are another exchange's.
    """
    if words.device.type == "cpu":
        step.check(words)
        return
    on_host = torch.empty(words.shape, dtype=words.dtype, pin_memory=True)
    on_host.copy_(words, non_blocking=True)
    event = torch.accelerator.current_stream(words.device).record_event()
    steps_of(group).unread.append((event, on_host, step))


@contextmanager
def working_on(step: Step) -> Iterator[None]:
    """In the block this thread does the work of `step`."""
    token = _current.set(step)
    try:
        yield
    finally:
        _current.reset(token)


def current_step() -> Step:
    """The step whose work this thread does."""
    step = _current.get()
    assert step is not None, "outside a work of run_beside"
    return step


def wait_in_step(
    wait_for: Callable[[float], bool], group: dist.ProcessGroup, step: Step, check: Callable[[], None] | None = None
) -> None:
    """Wait until `wait_for`, given seconds, says that it is done; then `check` what arrived.

    Raises:
        OutOfStepError: on every rank that waits, where ranks have begun different exchanges.
        ExchangeError: where a rank does not come before the group's timeout, or the exchange fails in another way.
    """
    deadline = time.monotonic() + timeout_of(group).total_seconds()
    pause = SECONDS_UNTIL_COMPARED
    try:
        while not wait_for(min(pause, max(0.01, deadline - time.monotonic()))):
            _publish_and_compare(group, step)
            if time.monotonic() >= deadline:
                raise _timeout_error(group, step)
        note_flight(step.begun)
        if check is not None:
            check()
    except Exception as error:
        told = _error_to_raise(group, error, step)
        if told is error:
            raise
        raise told from error


def _publish_and_compare(group: dist.ProcessGroup, step: Step) -> None:
    """Publish where this rank is, and raise if another one that waits is elsewhere."""
    steps, rank = steps_of(group), group.rank()
    if step.epoch != steps.epoch:
        return
    store = _store(group)
    if store.check([_failure_key(step.epoch)]):
        raise OutOfStepError(store.get(_failure_key(step.epoch)).decode())
    store.set(f"{step.epoch}/at/{rank}", json.dumps([step.number, list(steps.recent)]))
    own = dict(steps.recent)
    for other in range(group.size()):
        at = None if other == rank else _position(store, step.epoch, other)
        for number, label in at[1] if at is not None else ():
            if own.get(number, label) != label:
                first, second = sorted([(rank, own[number]), (other, label)])
                raise OutOfStepError(
                    f"the ranks of a group are out of step: exchange {number} of the group is {first[1]!r} on rank {first[0]} and "
                    f"{second[1]!r} on rank {second[0]}. {_CAUSES}"
                )


def _position(store: dist.Store, epoch: int, rank: int) -> tuple[int, list[tuple[int, str]]] | None:
    """The number of the exchange that a rank waited for when it last published, and the labels of its last ones."""
    key = f"{epoch}/at/{rank}"
    if not store.check([key]):
        return None
    number, recent = json.loads(store.get(key))
    return number, recent


def _timeout_error(group: dist.ProcessGroup, step: Step) -> ExchangeError:
    seconds, elsewhere = timeout_of(group).total_seconds(), []
    for other in range(group.size()):
        if other == group.rank():
            continue
        at = _position(_store(group), step.epoch, other)
        if at is None:
            elsewhere.append(f"rank {other} has waited for no exchange")
        elif at[0] != step.number:
            elsewhere.append(f"rank {other} has waited last for exchange {at[0]}")
    return OutOfStepError(
        f"rank {group.rank()} of {group.size()} has waited {seconds:g} s, the timeout of its process group, for exchange "
        f"{step.number} of the group, {step.label!r}; {', '.join(elsewhere) or 'the others wait for it, too'}. {_CAUSES}"
    )


def _error_to_raise(group: dist.ProcessGroup, error: BaseException, step: Step | None) -> BaseException:
    """What to raise for `error`: the epoch is over, and the next exchange begins a new one."""
    steps = steps_of(group)
    epoch = steps.epoch if step is None else step.epoch
    if isinstance(error, RuntimeError) and not isinstance(error, OutOfStepError):
        error = _explained_failure(group, error, epoch, step)
    if isinstance(error, OutOfStepError):
        # Those who still wait find it there.
        with suppress(RuntimeError):
            _store(group).set(_failure_key(epoch), str(error))
    if epoch == steps.epoch:
        _close_epoch(group, steps)
    return error


def _explained_failure(group: dist.ProcessGroup, error: RuntimeError, epoch: int, step: Step | None) -> ExchangeError:
    """What broke a connection."""
    with suppress(RuntimeError):
        store = _store(group)
        if store.check([_failure_key(epoch)]):
            return OutOfStepError(store.get(_failure_key(epoch)).decode())
        if step is not None and "imed out" in str(error) and not isinstance(error, ExchangeError):
            return _timeout_error(group, step)
    if isinstance(error, ExchangeError):
        return error
    what = "an earlier exchange" if step is None else f"exchange {step.number}, {step.label!r},"
    return ExchangeError(
        f"rank {group.rank()} of {group.size()}: {what} of its process group failed: {error}. A rank has died, raised an "
        "error of its own, or is out of step; what it says itself tells which. The next exchange makes new connections"
    )


def _failure_key(epoch: int) -> str:
    return f"{epoch}/failed"


def _close_epoch(group: dist.ProcessGroup, steps: Steps) -> None:
    for entry in forget(group, _belongs_to_epoch):
        for made in entry if isinstance(entry, tuple) else ():
            if isinstance(made, dist.ProcessGroup):
                close_connections(made)
                with suppress(Exception):
                    dist.destroy_process_group(made)
    steps.epoch += 1
    kept(group, "epochs", lambda: [0])[0] = steps.epoch
    steps.number = 0
    steps.recent.clear()
    steps.unread.clear()
    steps.failure = None


def destroy(group: dist.ProcessGroup) -> None:
    """Destroy a group with all that was made beside it: gloo's idle groups wake a hundred times per second."""
    dist.barrier(group)
    _close_epoch(group, steps_of(group))
    dist.destroy_process_group(group)


def _belongs_to_epoch(key: Any) -> bool:
    return isinstance(key, tuple) and bool(key) and key[0] in ("own groups", "made beside", "connected")


def close_connections(group: dist.ProcessGroup) -> None:
    """Make all operations under way on a gloo group fail, here and on its other ranks, as if a receive had run out of time."""
    other = (group.rank() + 1) % group.size()
    with suppress(RuntimeError):
        group.recv([torch.empty(1)], other, _NO_TAG).wait(timedelta(milliseconds=1))


def _store(group: dist.ProcessGroup) -> dist.Store:
    store = distributed_c10d._get_process_group_store(group)
    return dist.PrefixStore("longspan steps", store)
