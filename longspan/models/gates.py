"""How an L layer forgets and overwrites: what makes the gates that operators take beside q, k and v.

Shapes: B batch rows, T tokens, C channels, H heads, K key size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.dtypes import at_least_float32
from longspan.features import gla_log_decay, mamba2_log_decay
from longspan.models.initial import DrawnModule

LOW_RANK = 16
"""Rank of the projection that makes a gate for every channel (GLA, arXiv 2312.06635)."""


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


class StepDecay(DrawnModule):
    """Mamba-2's step sizes, Δ = softplus(dt + dt_bias), and the log decays −e^A_log · Δ (arXiv 2405.21060).

    Both in float32 or wider. e^A_log starts uniform between `least_rate` and 16, and Δ at dt = 0 between 0.001 and 0.1, uniform in
    its logarithm: as in the code of Mamba-2's authors.

    Args:
        num_heads: H, each with a rate of its own.
        num_channels: of a head with a bias of their own: 1 for one step a head, K for one a key channel.
        least_rate: 1 in Mamba-2 and KDA, 0 in Gated DeltaNet.
    """

    def __init__(self, num_heads: int, num_channels: int = 1, least_rate: float = 1.0) -> None:
        super().__init__()
        self.least_rate = least_rate
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads * num_channels))

    def draw_parameters(self, generator: torch.Generator) -> None:
        """Rates, then steps."""
        # 1 less than what is drawn from [0, 1): a rate of 0 has no logarithm.
        rates = 16.0 - (16.0 - self.least_rate) * torch.empty(self.A_log.shape).uniform_(generator=generator)
        exponents = torch.empty(self.dt_bias.shape).uniform_(math.log(1e-3), math.log(1e-1), generator=generator)
        steps = exponents.double().exp()
        self.A_log.copy_(rates.log())
        # The inverse of softplus.
        self.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))

    def forward(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        """Step sizes and log decays, of dt ``[B, T, H]``; of ``[B, T, H · K]``, both ``[B, T, H, K]``."""
        steps = F.softplus(at_least_float32(dt) + at_least_float32(self.dt_bias))
        rates = at_least_float32(self.A_log).exp()
        if len(self.dt_bias) != len(self.A_log):
            steps, rates = steps.unflatten(-1, (len(self.A_log), -1)), rates.unsqueeze(-1)
        return steps, -rates * steps


class ChannelDecayGate(nn.Module):
    """One log decay per token and key channel, g = log σ(x·W₁·W₂ + bias) / 16 (GLA, arXiv 2312.06635).

    Never above zero, computed in float32 or wider. It starts at a time constant of 23 tokens in every channel.
    """

    def __init__(self, dim: int, num_heads: int, key_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_rank_proj = nn.Linear(dim, LOW_RANK, bias=False)
        self.from_rank_proj = nn.Linear(LOW_RANK, num_heads * key_size, bias=False)
        self.bias = nn.Parameter(torch.empty(num_heads * key_size))
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
