"""A mixture of experts in the place of a feed-forward layer: a router sends each token to a few of many small SwiGLU layers.

Shapes: B batch rows, T tokens of this rank, N = B · T, C channels, E experts of width F, k experts of a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.autocast import without_autocast
from longspan.dtypes import at_least_float32
from longspan.models.config import LinearLlama3Config
from longspan.models.feed_forward import FeedForward, SwiGLU
from longspan.models.initial import InitialWeights
from longspan.models.mixers.mixer import Context
from longspan.models.routing import Routed
from longspan.ops.experts.swiglu import expert_swiglu


class Router(nn.Module):
    """Which k of E experts take a token, and with which weights.

    The probabilities are softmax(x Wᵀ), computed in float32 (float64 for float64) whatever x and W are. The k likeliest experts
    take the token, with their probabilities divided by the sum of these k: what a softmax over the k largest logits gives, as in
    Mixtral (arXiv 2401.04088). A single expert has its probability as it is (arXiv 2101.03961): divided it would be 1, and the loss
    would have no gradient for the router.
    """

    def __init__(self, dim: int, num_experts: int, experts_per_token: int) -> None:
        super().__init__()
        self.experts_per_token = experts_per_token
        self.weight = nn.Parameter(torch.empty(num_experts, dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Routed]:
        """Of x ``[N, C]`` the chosen experts, int64 ``[N, k]``, the likeliest first; their weights ``[N, k]``; what was decided."""
        wide = at_least_float32(x)
        with without_autocast(x):
            logits = F.linear(wide, self.weight.to(wide.dtype))
        logs = logits.logsumexp(-1)
        probabilities = (logits - logs.unsqueeze(-1)).exp()
        weights, chosen = probabilities.topk(self.experts_per_token, dim=-1)
        if self.experts_per_token > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights, self._sums(logits, logs, probabilities, chosen)

    def _sums(self, logits: Tensor, logs: Tensor, probabilities: Tensor, chosen: Tensor) -> Routed:
        ones = torch.ones_like(chosen).flatten()
        choices = torch.zeros(len(self.weight), dtype=torch.int64, device=chosen.device)
        choices = choices.scatter_add(0, chosen.flatten(), ones)
        # -Σ p log p, of log p = logit - log Σ e^logit.
        entropy = (logs.detach() - (probabilities.detach() * logits.detach()).sum(-1)).sum()
        return Routed(choices, probabilities.sum(0), logs.square().sum(), entropy)


class Experts(nn.Module):
    """The matrices of E SwiGLU layers, stacked: gate and up ``[E, F, C]``, down ``[E, C, F]``; see `expert_swiglu`."""

    def __init__(self, num_experts: int, dim: int, hidden_dim: int, chunk_size: int) -> None:
        super().__init__()
        self.chunk_size = chunk_size
        self.gate_proj = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.up_proj = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """``[N, C]`` of x ``[N, C]`` by the experts chosen ``[N, k]``, with weights ``[N, k]``."""
        return expert_swiglu(x, chosen, weights, self.gate_proj, self.up_proj, self.down_proj, self.chunk_size)


class MixtureOfExperts(FeedForward):
    """Σ over a token's k experts of weight · expert(x), and a shared layer that takes every token.

    No token is dropped, however many choose one expert. Every rank has all experts and computes its own tokens.

    num_shared: experts that every token passes (arXiv 2401.06066): one SwiGLU of so many times the width, without a weight; 0 is
    none. chunk_size: as in `SwiGLU`, of the experts; the router takes all tokens at once.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        experts_per_token: int,
        num_shared: int = 0,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        self.router = Router(dim, num_experts, experts_per_token)
        self.experts = Experts(num_experts, dim, hidden_dim, chunk_size)
        self.shared = SwiGLU(dim, num_shared * hidden_dim, chunk_size) if num_shared else None

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Routed]:
        tokens = x.flatten(0, 1)
        chosen, weights, routed = self.router(tokens)
        out = self.experts(tokens, chosen, weights).view(x.shape)
        if self.shared is not None:
            out = out + self.shared(x, context)[0]
        return out, routed

    def init_weights(self, initial: InitialWeights) -> None:
        initial.fill_own(self.router)
        initial.fill_own(self.experts, residual=("down_proj",))
        if self.shared is not None:
            self.shared.init_weights(initial)

    def flops_per_token(self) -> float:
        shared = 0.0 if self.shared is None else self.shared.flops_per_token()
        return 6.0 * (self.router.weight.numel() + self._numbers_of_experts(self.router.experts_per_token)) + shared

    def num_idle_parameters(self) -> int:
        return self._numbers_of_experts(len(self.router.weight) - self.router.experts_per_token)

    def _numbers_of_experts(self, number: int) -> int:
        return number * sum(matrices.shape[1:].numel() for matrices in self.experts.parameters())


def build_feed_forward(config: LinearLlama3Config) -> FeedForward:
    """The feed-forward layer of a block: one that takes all tokens, or with experts a mixture of them."""
    if not config.num_experts:
        return SwiGLU(config.dim, config.hidden_dim, config.feed_forward_chunk)
    return MixtureOfExperts(
        config.dim,
        config.hidden_dim,
        config.num_experts,
        config.experts_per_token,
        config.num_shared_experts,
        config.feed_forward_chunk,
    )
