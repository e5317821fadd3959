"""How an L layer forgets: what each operator needs beside q, k and v.

Shapes: B batch rows, T tokens, C channels, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.models.layers import at_least_float32


class NoDecay(nn.Module):
    """Basic linear attention: nothing is forgotten."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {}


class FixedDecay(nn.Module):
    """Retention: head h multiplies its state by 1 − 2^(−5−h·s) a token (arXiv 2307.08621, equation 8).

    s spreads the heads over time constants of 2^5 to 2^12 tokens, whatever their number; RetNet's eight heads have s =
    1.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        spread = 7 / max(1, num_heads - 1)
        self.log_decay = tuple(math.log1p(-(2.0 ** (-5 - head * spread))) for head in range(num_heads))
        # Not a buffer: casting the model to bfloat16 would round 1 - 2^-12 to 1.
        self._on_device: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        key = (x.device, dtype)
        if key not in self._on_device:
            # An inference tensor kept from a first call in inference mode could not be used in training.
            with torch.inference_mode(False):
                self._on_device[key] = torch.tensor(self.log_decay, dtype=dtype, device=x.device)
        return {"log_decay": self._on_device[key]}


class ScalarDecay(nn.Module):
    """Simple GLA: log decay g = −e^A_log · softplus(x·W + dt_bias), one a token and head (Mamba-2, arXiv 2405.21060).

    Never above zero, computed in float32 or wider. It starts with one time constant a head, from less than a token
    (head H − 1) to a thousand tokens (head 0).
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.dt_proj = nn.Linear(dim, num_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set A and the step size dt at zero input to Mamba-2's ranges, 1 to 16 and 0.001 to 0.1, spread over the
        heads."""
        num_heads = len(self.A_log)
        steps = torch.logspace(-3, -1, num_heads, dtype=torch.float64)
        with torch.no_grad():
            self.A_log.copy_(torch.linspace(1, 16, num_heads, dtype=torch.float64).log())
            # The inverse of softplus.
            self.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        steps = at_least_float32(self.dt_proj(x)) + at_least_float32(self.dt_bias)
        return {"g": -at_least_float32(self.A_log).exp() * F.softplus(steps)}


DECAYS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear_attention": lambda dim, num_heads: NoDecay(),
    "retention": lambda dim, num_heads: FixedDecay(num_heads),
    "simple_gla": ScalarDecay,
}
"""For each operator that an L layer can be, what makes its gates by name from the layer's input: (dim, num_heads) ->
module."""
