"""How an L layer forgets and overwrites: the gates that each operator needs beside q, k and v.

Shapes: B batch rows, T tokens, C channels, H heads, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from longspan.dtypes import at_least_float32
from longspan.features import gla_log_decay, mamba2_log_decay
from longspan.ops.delta.form import BETA
from longspan.ops.gates import DecayKind, Gate
from longspan.ops.variants import VARIANTS, Variant

LOW_RANK = 16
"""Rank of the projection that makes a gate for every channel (GLA, arXiv 2312.06635)."""


class GateModules(nn.ModuleDict):
    """The gates of an operator that has none or several, by name."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for gate in self.values():
            made.update(gate(x))
        return made


class ConstantDecayGate(nn.Module):
    """Retention: head h multiplies its state by 1 − 2^(−5−h·s) a token (arXiv 2307.08621, equation 8).

    s spreads the heads over time constants of 2^5 to 2^12 tokens, whatever their number; RetNet's eight heads have s =
    1.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        spread = 7 / max(1, num_heads - 1)
        self.log_decay = tuple(math.log1p(-(2.0 ** (-5 - head * spread))) for head in range(num_heads))

    def forward(self, x: Tensor) -> dict[str, tuple[float, ...]]:
        # Numbers and not a buffer: the host needs them, and casting the model to bfloat16 would round 1 - 2^-12 to 1.
        return {"log_decay": self.log_decay}


class ScalarDecayGate(nn.Module):
    """One log decay per token and head, g = −e^A_log · softplus(x·W + dt_bias) (Mamba-2, arXiv 2405.21060).

    Never above zero, computed in float32 or wider. It starts with one time constant per head, from less than a token
    (head H − 1) to a thousand tokens (head 0).
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.dt_proj = nn.Linear(dim, num_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Spread A over 1 to 16, and the step size dt at zero input over 0.001 to 0.1, head by head, as Mamba-2 does."""
        num_heads = len(self.A_log)
        steps = torch.logspace(-3, -1, num_heads, dtype=torch.float64)
        with torch.no_grad():
            self.A_log.copy_(torch.linspace(1, 16, num_heads, dtype=torch.float64).log())
            # The inverse of softplus.
            self.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"g": mamba2_log_decay(self.dt_proj(x), self.A_log, self.dt_bias)}


class ChannelDecayGate(nn.Module):
    """One log decay per token and key channel, g = log σ(x·W₁·W₂ + bias) / 16 (GLA, arXiv 2312.06635).

    Never above zero, computed in float32 or wider. It starts at a time constant of 23 tokens in every channel.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_rank_proj = nn.Linear(dim, LOW_RANK, bias=False)
        self.from_rank_proj = nn.Linear(LOW_RANK, num_heads * head_dim, bias=False)
        self.bias = nn.Parameter(torch.empty(num_heads * head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the bias to zero."""
        with torch.no_grad():
            self.bias.zero_()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = at_least_float32(self.from_rank_proj(self.to_rank_proj(x))) + at_least_float32(self.bias)
        return {"g": gla_log_decay(logits).unflatten(-1, (self.num_heads, -1))}


class WriteStrength(nn.Module):
    """The delta rules' beta = σ(x·W), one per token and head: how much of what its key reads a token replaces.

    Between zero and one, computed in float32 or wider (DeltaNet, arXiv 2406.06484).
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.beta_proj = nn.Linear(dim, num_heads, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"beta": at_least_float32(self.beta_proj(x)).sigmoid()}


_MAKERS: dict[Gate | None, Callable[[int, int, int], nn.Module]] = {
    DecayKind.HEAD.gate: lambda dim, num_heads, head_dim: ConstantDecayGate(num_heads),
    DecayKind.TOKEN.gate: lambda dim, num_heads, head_dim: ScalarDecayGate(dim, num_heads),
    DecayKind.CHANNEL.gate: ChannelDecayGate,
    BETA: lambda dim, num_heads, head_dim: WriteStrength(dim, num_heads),
}
"""What makes a gate that variants declare: (dim, num_heads, head_dim) -> module."""


def _make_gates(variant: Variant, dim: int, num_heads: int, head_dim: int) -> nn.Module:
    made = {gate.name: _MAKERS[gate](dim, num_heads, head_dim) for gate in variant.gates}
    return next(iter(made.values())) if len(made) == 1 else GateModules(made)


GATE_BUILDERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    name: partial(_make_gates, variant)
    for name, variant in VARIANTS.items()
    if all(gate in _MAKERS for gate in variant.gates)
}
"""For each operator that an L layer can be, what makes its gates by name from the layer's input: (dim, num_heads,
head_dim) -> module."""
