"""RWKV-7's time mixing (`rwkv7`).

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream, H heads, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longspan.attention.shift import token_shift
from longspan.dtypes import at_least_float32
from longspan.features import unit_length
from longspan.models.initial import InitialWeights
from longspan.models.mixers.layer import Footprint, LayerMixer, memory_of, write_state
from longspan.models.mixers.mixer import Context, Mixed, operations_of_matrices
from longspan.models.norms import group_norm
from longspan.ops.delta.form import DEFAULT_CHUNK_SIZE

if TYPE_CHECKING:
    from longspan.models.config import LinearLlama3Config

_POWERS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
"""Shares of the token before at first: 1 − (channel / C)^(power · (1 − layer / layers)), as in the authors' code."""

_MOST_DECAY = math.exp(-0.5)


class TokenMix(nn.Module):
    """The six inputs of a layer, each x_t + (x_{t-1} − x_t) ⊙ μ with a μ of its own, ``[6, C]``."""

    def __init__(self, dim: int, depth: float) -> None:
        """depth: of the layer, from 0 to less than 1."""
        super().__init__()
        self._depth = depth
        self.mu = nn.Parameter(torch.empty(len(_POWERS), dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `_POWERS` says."""
        dim = self.mu.shape[1]
        with torch.no_grad():
            for row, power in zip(self.mu, _POWERS.values(), strict=True):
                row.copy_(1 - (torch.arange(dim, dtype=torch.float64) / dim) ** (power * (1 - self._depth)))

    def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, ...]:
        difference = before - x
        return tuple(torch.addcmul(x, difference, mu) for mu in self.mu)


class LowRank(nn.Module):
    """A map through a small rank with a function between: ``f(x W₁) W₂``."""

    def __init__(self, dim: int, rank: int, size: int, function: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.to_rank_proj = nn.Linear(dim, rank, bias=False)
        self.from_rank_proj = nn.Linear(rank, size, bias=False)
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        x = self.to_rank_proj(x)
        out: Tensor = self.from_rank_proj(x if self._function is None else self._function(x))
        return out


class ChannelNumbers(nn.Module):
    """What a layer learns of each channel of its heads, ``[H · D]`` each; they start as in the authors' code (arXiv 2503.14456).

    decay, rate: biases of d and a. removal, replacement: ξ and α, which make the key that is removed and the one that is written.
    bonus: ρ. scale, shift: of the norm of each head. value: bias of ν, the share of the first layer's values; not in the first.
    """

    def __init__(self, num_heads: int, head_dim: int, depth: float, progress: float, takes_values: bool) -> None:
        """depth: of the layer, from 0 to 1, both included. progress: (layer + 1) / layers."""
        super().__init__()
        self._head_dim, self._depth, self._progress = head_dim, depth, progress
        made = (nn.Parameter(torch.empty(num_heads * head_dim)) for _ in range(7))
        self.decay, self.rate, self.removal, self.replacement, self.bonus, self.scale, self.shift = made
        self.value = nn.Parameter(torch.empty(num_heads * head_dim)) if takes_values else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Decays from slow to fast over all channels, and from one end of a head to the other."""
        size = len(self.decay)
        place = torch.arange(size, dtype=torch.float64)
        share, middle = place / max(size - 1, 1), max(self._head_dim - 1, 1) / 2
        in_head = (place % self._head_dim - (self._head_dim - 1) / 2) / middle
        zigzag = in_head * in_head.abs()
        with torch.no_grad():
            self.decay.copy_(-6 + 6 * share ** (1 + self._depth**0.3) + 0.5 + 2.5 * zigzag)
            self.rate.copy_(-0.19 + 0.3 * zigzag + 0.4 * (share - 0.5))
            self.removal.copy_(0.71 - 0.1 * (share - 0.5))
            self.replacement.fill_(1.02)
            self.bonus.fill_(-0.04)
            if self.value is not None:
                self.value.copy_(0.73 - 0.4 * (share - 0.5))
            self.scale.fill_(self._progress**0.7)
            self.shift.zero_()


class RWKV7Mixer(LayerMixer):
    """o = out((norm_per_head(read(r, write(k, v))) + (r·ρ·k) v) ⊙ gate): RWKV-7's recurrence between a shift of tokens and a gate.

    RWKV-7's time mixing (arXiv 2503.14456): six inputs, each between a token and the one before it; keys that are removed, of
    length 1, and keys that are written, made of the same key; in-context learning rates σ(·), and decays exp(−e^{−1/2} σ(·)), one
    per token and key channel, and the gate, through small ranks. 4 C² + 2 (R_w + R_a + R_g) C numbers and those of channels, where
    H · D = C.

    The first such layer of a model hands its values on, and the others take a share ν = σ(·) of them, per token and channel and
    through a rank R_v: v + ν (v_first − v). 2 R_v C numbers and those of ν's bias more.

    It remembers ``{"state": [B, H, D, D], "taps": [B, 1, C]}``.
    """

    name = "rwkv7"

    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.num_heads, self.head_dim = config.num_heads, config.size_of_head
        inner = self.num_heads * self.head_dim
        self.token_mix = TokenMix(config.dim, layer / config.num_layers)
        self.r_proj, self.k_proj, self.v_proj = (nn.Linear(config.dim, inner, bias=False) for _ in range(3))
        of_head = 2.5 * self.head_dim / 64
        self.decay_proj = LowRank(config.dim, _rank(config.dim, of_head), inner, torch.tanh)
        self.rate_proj = LowRank(config.dim, _rank(config.dim, of_head), inner)
        self.gate_proj = LowRank(config.dim, _rank(config.dim, 5.0), inner, torch.sigmoid)
        number = config.layer_operators[:layer].count(self.name)
        self.takes_on, self.hands_on = number > 0, number == 0 and config.layer_operators.count(self.name) > 1
        self.value_proj: LowRank | None = None
        if self.takes_on:
            self.value_proj = LowRank(config.dim, _rank(config.dim, 1.7 * self.head_dim / 64), inner)
        depth, progress = layer / max(config.num_layers - 1, 1), (layer + 1) / config.num_layers
        self.channels = ChannelNumbers(self.num_heads, self.head_dim, depth, progress, self.takes_on)
        self.eps = self.head_dim * config.norm_eps
        self.out_proj = nn.Linear(inner, config.dim, bias=False)

    def mix(self, x: Tensor, context: Context) -> Mixed:
        return self._mix(x, context, None)

    def mix_with(self, x: Tensor, context: Context, handed: Tensor) -> Mixed:
        return self._mix(x, context, handed)

    def _mix(self, x: Tensor, context: Context, first: Tensor | None) -> Mixed:
        """first: the values of the first such layer, ``[B, T, H · D]``, in the others."""
        before, last = self._token_before(x, context)
        of_r, of_w, of_k, of_v, of_a, of_g = self.token_mix(x, before)
        own = self.channels
        key, values = self.k_proj(of_k), self._values(of_v, first)
        v = self._heads(values)
        w = -_MOST_DECAY * (at_least_float32(self.decay_proj(of_w)) + at_least_float32(own.decay)).sigmoid()
        rate = (at_least_float32(self.rate_proj(of_a)) + at_least_float32(own.rate)).sigmoid()
        removed = unit_length(self._heads(key * own.removal))
        k = self._heads((key * (1 + (rate - 1) * own.replacement)).to(key.dtype))
        gates = {"a": -removed, "b": removed * self._heads(rate), "g": self._heads(w)}
        memory = write_state("dplr_delta_rule", k, v, gates, context, self.parallel)
        r = self._heads(self.r_proj(of_r))
        bonus = (r * k * self._of_heads(own.bonus)).sum(-1, keepdim=True) * v
        gate = self.gate_proj(of_g)
        normed = group_norm(memory.read(r, scale=1.0), self.eps)
        read = normed * self._of_heads(own.scale) + self._of_heads(own.shift) + bonus
        out: Tensor = self.out_proj(read.flatten(2) * gate)
        return out, memory_of(memory, context, last), *((values,) if self.hands_on else ())

    def _values(self, x: Tensor, first: Tensor | None) -> Tensor:
        """The layer's own values, mixed with those of the first layer, ``[B, T, H · D]``."""
        v: Tensor = self.v_proj(x)
        if self.value_proj is None:
            return v
        assert first is not None and self.channels.value is not None
        share = (at_least_float32(self.value_proj(x)) + at_least_float32(self.channels.value)).sigmoid()
        return torch.lerp(v, first, share.to(v.dtype))

    def init_weights(self, initial: InitialWeights) -> None:
        initial.fill(self, residual=(self.out_proj,))

    def flops_per_token(self, seq_len: int) -> float:
        # What is removed is read, and both keys write: one product more than in a delta rule.
        state = 24.0 * self.num_heads * self.head_dim * self.head_dim
        return operations_of_matrices(self) + state

    def footprint(self) -> Footprint:
        inner, dim = self.num_heads * self.head_dim, self.r_proj.in_features
        ranks = sum(part.to_rank_proj.out_features for part in (self.decay_proj, self.rate_proj, self.gate_proj))
        state = inner * self.head_dim
        # Chunks have two rows a token, and so half the tokens: twice the states, counted as numbers of tokens.
        squares = DEFAULT_CHUNK_SIZE * self.num_heads * 3 // 2
        wide = 16 * inner + 3 * self.num_heads + squares + state // DEFAULT_CHUNK_SIZE
        if self.value_proj is not None:
            ranks, wide = ranks + self.value_proj.to_rank_proj.out_features, wide + 2 * inner
        # The tokens before each, six inputs, but not x itself, which the norm keeps.
        return Footprint(6 * dim + ranks + 11 * inner + self.num_heads, wide, state, transition=state, halo=dim)

    def _token_before(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """The token before each, and the last one if the context asks what is remembered, ``[B, 1, C]``."""
        taps = context.remembered("taps")
        found = token_shift(
            x,
            initial_state=None if taps is None else taps.squeeze(1),
            output_final_state=context.outputs_memory,
            layout=context.layout,
        )
        return (found[0], found[1].unsqueeze(1)) if isinstance(found, tuple) else (found, None)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def _of_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.num_heads, self.head_dim))


def _rank(dim: int, factor: float) -> int:
    """factor · √C, rounded to a multiple of 32 that is not 0: the ranks of the authors' code."""
    return max(32, round(factor * dim**0.5 / 32) * 32)
