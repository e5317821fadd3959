"""Faults at named instants of a run, so that tests hit an instant exactly: for tests alone.

Code says where it is by `reached`, which is an audit event of Python (`sys.audit`): without a hook it costs nothing, and there is
no hook unless a fault is asked for, by the environment variable that `longspan.launch` reads:

    LONGSPAN_FAULT="checkpoint.written:rank=0:step=5:kill"
    LONGSPAN_FAULT="forward:rank=1:step=3:sleep=60;gradients:rank=0:step=2:nan"

A fault is a point, conditions, and what happens there, with colons between; several faults are separated by semicolons. The points
are the phases of a run (`longspan.train.phase.PHASES`), and where code calls `reached`:

    batch                 in the thread that reads ahead: a batch is read next
    gradients             this rank's gradients are made, and are summed over the ranks next
    gradients.summed      the sums are there; the ranks decide together whether to take the step
    checkpoint.begun      nothing is written yet
    checkpoint.file       before each file of this rank
    checkpoint.writing    within each file of tensors, after the first of them
    checkpoint.written    everything of all ranks is on the disk under a temporary name
    checkpoint.renamed    the checkpoint is there; the older ones have not been removed yet
    checkpoint.removing   an older one has lost its name, and its files are removed next

Conditions: ``rank=N``, ``step=N`` (counted from 1), ``attempt=N`` (how often torchrun has started the ranks anew, 0 at first),
``count=N`` (the Nth time that all other conditions hold, 1 if not said; a fault happens once in a process).

Actions: ``kill`` (SIGKILL), ``stop`` (SIGSTOP), ``exit`` (a rank that ends without a word), ``sleep=SECONDS``, ``raise``
(RuntimeError), ``full`` (OSError of a full disk), ``nan`` (a gradient becomes NaN, at the points of gradients).
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longspan.errors import ConfigError

_EVENT = "longspan.fault"
_ACTIONS = ("kill", "stop", "exit", "sleep", "raise", "full", "nan")
_CONDITIONS = ("rank", "step", "attempt", "count")


def reached(point: str, step: int | None = None, what: object = None) -> None:
    """Say that the run has come to `point`: where a fault is asked for, it happens here.

    step: the optimizer step, counted from 1. what: what a fault may break: a model.
    """
    sys.audit(_EVENT, point, step, what)


@dataclass(frozen=True)
class Fault:
    """What happens at a point; a condition of None always holds."""

    point: str
    action: str
    seconds: float = 0.0
    rank: int | None = None
    step: int | None = None
    attempt: int | None = None
    count: int = 1

    def fits(self, point: str, rank: int, step: int | None, attempt: int) -> bool:
        """Whether the fault belongs to this instant."""
        return (
            point == self.point
            and self.rank in (None, rank)
            and self.attempt in (None, attempt)
            and (self.step is None or self.step == step)
        )


def parse_faults(text: str) -> tuple[Fault, ...]:
    """The faults of `LONGSPAN_FAULT`.

    Raises:
        ConfigError: for what is none; the message says what is.
    """
    return tuple(_parse(entry.strip()) for entry in text.split(";") if entry.strip())


def _parse(entry: str) -> Fault:
    point, *conditions = entry.split(":")
    if not point or not conditions:
        raise _refused(entry, "a fault is a point, conditions and an action")
    action, equals, seconds = conditions.pop().partition("=")
    if action not in _ACTIONS or bool(equals) != (action == "sleep"):
        raise _refused(entry, f"the last part must be one of {', '.join(_ACTIONS)}, with seconds for sleep")
    numbers: dict[str, int] = {}
    for condition in conditions:
        name, _, value = condition.partition("=")
        if name not in _CONDITIONS or not value.isdecimal():
            raise _refused(entry, f"{condition!r} is no condition: {', '.join(_CONDITIONS)}, with a number each")
        numbers[name] = int(value)
    try:
        return Fault(point, action, seconds=float(seconds or 0.0), **numbers)
    except ValueError as error:
        raise _refused(entry, str(error)) from error


def _refused(entry: str, why: str) -> ConfigError:
    return ConfigError(
        f"LONGSPAN_FAULT has {entry!r}: {why}. It is for tests, such as checkpoint.written:rank=0:step=5:kill; unset it to run "
        "without faults"
    )


def install_faults(faults: Sequence[Fault], rank: int, attempt: int) -> None:
    """Let `faults` happen in this process, which is `rank` and was started for the `attempt`-th time, counted from 0."""
    if not faults:
        return
    left = list(faults)
    counts = dict.fromkeys(range(len(left)), 0)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event != _EVENT:
            return
        point, step, what = arguments
        for number, fault in enumerate(left):
            if fault.fits(point, rank, step, attempt):
                counts[number] += 1
                if counts[number] == fault.count:
                    _happen(fault, rank, step, what)

    sys.addaudithook(hook)


def _happen(fault: Fault, rank: int, step: int | None, what: Any) -> None:
    at = "" if step is None else f", step {step}"
    sys.stderr.write(f"longspan: fault: {fault.action} at {fault.point}, rank {rank}{at}, time {time.time():.3f}\n")
    sys.stderr.flush()
    if fault.action in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if fault.action == "kill" else signal.SIGSTOP)
    elif fault.action == "exit":
        os._exit(7)
    elif fault.action == "sleep":
        time.sleep(fault.seconds)
    elif fault.action == "raise":
        raise RuntimeError(f"a fault that was asked for, at {fault.point}")
    elif fault.action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        next(parameter.grad for parameter in what.parameters() if parameter.grad is not None).mul_(float("nan"))
