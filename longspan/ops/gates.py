"""The arguments of a variant beside q, k and v, and the kind of its decay, which is declared once and serves every engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from longspan.layout import SequenceLayout
from longspan.state import ChannelDecay, HeadDecay, Identity, ScalarDecay, Transition
from longspan.tracing import has_no_values

Gates = Mapping[str, Tensor]


@dataclass(frozen=True)
class Gate:
    """An argument of a variant beside q, k and v.

    dims: its dimensions among B, T, N, H, K and M, as in ``"BTH"``. is_log_decay: it must not exceed zero. differentiable: it may
    require a gradient.
    """

    name: str
    dims: str
    is_log_decay: bool = False
    differentiable: bool = True


class DecayKind(Enum):
    """What decays, and what the log decays are called and shaped; the value holds the gate, if any, and the form of A."""

    NONE = (None, Identity)
    HEAD = (Gate("log_decay", "H", is_log_decay=True, differentiable=False), HeadDecay)
    """Every head by a constant."""
    TOKEN = (Gate("g", "BTH", is_log_decay=True), ScalarDecay)
    """Every head by a number per token."""
    CHANNEL = (Gate("g", "BTHK", is_log_decay=True), ChannelDecay)
    """Every key channel by a number per token."""

    @property
    def gate(self) -> Gate | None:
        """The argument that holds the log decays."""
        return self.value[0]

    @property
    def gates(self) -> tuple[Gate, ...]:
        """`gate`, or nothing."""
        return () if self.gate is None else (self.gate,)

    @property
    def transition(self) -> type[Transition]:
        """The form of A where a decay is all that happens to a state."""
        return self.value[1]

    def of(self, gates: Gates) -> LogDecays:
        """The log decays among the gates of a call."""
        return LogDecays(self, None if self.gate is None else gates[self.gate.name])


@dataclass(frozen=True)
class LogDecays:
    """The log decays of one call, in the shape of its kind; None for `DecayKind.NONE`."""

    kind: DecayKind
    values: Tensor | None

    @property
    def in_time(self) -> Tensor | None:
        """``[B, T, H]`` or ``[B, T, H, K]``; None where they are not of tokens."""
        return self.values if self.kind in (DecayKind.TOKEN, DecayKind.CHANNEL) else None

    @property
    def constant(self) -> Tensor | None:
        """``[H]``; None where they are not constant. Its device may be the CPU while q, k and v are elsewhere."""
        return self.values if self.kind is DecayKind.HEAD else None

    @property
    def numbers(self) -> tuple[float, ...] | None:
        """A constant's numbers where the host has them: of a tensor on the CPU."""
        x = self.constant
        return None if x is None or x.device.type != "cpu" or has_no_values(x) else tuple(x.tolist())

    def on(self, layout: SequenceLayout, device: torch.device) -> LogDecays:
        """The same on `device`; of a constant of the host one copy is made for a layout, and the host never waits for it."""
        x = self.constant
        if x is None or x.device == device:
            return self
        numbers = self.numbers
        if numbers is None or torch.compiler.is_compiling():
            return replace(self, values=x.to(device, non_blocking=True))
        key = ("constant", numbers, x.dtype, device)
        return replace(self, values=layout.cached(key, lambda: x.to(device, non_blocking=True)))
