"""The two sequence mixers of a hybrid: linear attention (L) and softmax attention (N).

Both write first and read last, so that everything between hides the exchange between ranks: the query projection, and
the output gate of a linear layer. They know a layout, and nothing of groups.

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream, H heads, H_kv key and value heads, D
head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from longspan.attention import linear
from longspan.attention.softmax import SoftmaxMethod, write_softmax
from longspan.exchange import Exchange
from longspan.features import elu_plus_one, unit_length
from longspan.layout import SequenceLayout
from longspan.models.config import LinearLlama3Config
from longspan.models.gates import GATE_BUILDERS
from longspan.models.layers import GatedRMSNorm, Rotation, rotate
from longspan.ops.variants import VARIANTS
from longspan.state import Dense


@dataclass
class LinearCache:
    """What a linear layer remembers of the tokens so far: one matrix a head, [B, H, D, D], or None before the first."""

    state: Tensor | None = None


@dataclass
class SoftmaxCache:
    """Keys and values of the tokens so far, of the last `window` at least, in buffers [B, capacity, H_kv, D].

    When the buffers are full, they are made twice as large as the tokens that are still seen.
    """

    window: int | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    num_tokens: int = 0
    """Number of tokens in the buffers."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add one token's k and v [B, 1, H_kv, D]; return those of the tokens that it sees, [B, n, H_kv, D]."""
        if self.keys is None or self.values is None or self.num_tokens == self.keys.shape[1]:
            seen = slice(self._first_seen_by(self.num_tokens), self.num_tokens)
            self.num_tokens = seen.stop - seen.start
            capacity = max(64, 2 * self.num_tokens)
            self.keys, self.values = (
                self._grown(old, x, seen, capacity) for old, x in ((self.keys, k), (self.values, v))
            )
        position = self.num_tokens
        self.keys[:, position], self.values[:, position] = k[:, 0], v[:, 0]
        self.num_tokens += 1
        seen = slice(self._first_seen_by(position), self.num_tokens)
        return self.keys[:, seen], self.values[:, seen]

    def _first_seen_by(self, position: int) -> int:
        return 0 if self.window is None else max(0, position + 1 - self.window)

    def _grown(self, old: Tensor | None, x: Tensor, seen: slice, capacity: int) -> Tensor:
        new = x.new_empty((x.shape[0], capacity, *x.shape[2:]))
        if old is not None:
            new[:, : self.num_tokens] = old[:, seen]
        return new


class LinearMixer(nn.Module):
    """Linear attention: o = out(norm_per_head(read(φ(q), write(φ(k), v))) ⊙ silu(gate)).

    φ is elu + 1 (arXiv 2006.16236) where states only decay: in short runs on source code it gave a lower loss than silu and
    than none, with each of those operators. The delta rules need keys of unit length: there φ is silu, then a length of 1
    (arXiv 2406.06484). The norm after reading makes the output's size independent of how much a state has gathered.
    """

    def __init__(self, config: LinearLlama3Config, operator: str) -> None:
        super().__init__()
        self.operator = operator
        self.exchange: str | Exchange = "auto"
        self.num_heads, self.head_dim = config.num_heads, config.size_of_head
        inner = self.num_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.gate_proj = (
            nn.Linear(config.dim, inner, bias=False) for _ in range(4)
        )
        self.decay = GATE_BUILDERS[operator](config.dim, self.num_heads, self.head_dim)
        self.has_unit_keys = VARIANTS[operator].transition is Dense
        self.norm = GatedRMSNorm(self.head_dim, config.norm_eps)
        self.out_proj = nn.Linear(inner, config.dim, bias=False)

    def forward(self, x: Tensor, layout: SequenceLayout | None, by: Rotation | None) -> Tensor:
        """x and the result are [B, T, C]; `by` is for softmax layers."""
        k, v, gates = self._written(x)
        memory = linear.write_linear(
            self.operator, k, v, gates, layout=layout, exchange=self.exchange, has_safe_gates=True
        )
        q, gate = self._features(self.q_proj(x)), self.gate_proj(x)
        return self._out(memory.read(q), gate)

    def step(self, x: Tensor, cache: LinearCache, by: Rotation | None) -> Tensor:
        """The layer's output for the next token [B, 1, C], after those in `cache`."""
        k, v, gates = self._written(x)
        memory = linear.write_linear(
            self.operator,
            k,
            v,
            gates,
            initial_state=cache.state,
            output_final_state=True,
            chunk_size=1,
            has_safe_gates=True,
        )
        o = memory.read(self._features(self.q_proj(x)))
        cache.state = memory.final_state()
        return self._out(o, self.gate_proj(x))

    def _written(self, x: Tensor) -> tuple[Tensor, Tensor, linear.Given]:
        return self._features(self.k_proj(x)), self._heads(self.v_proj(x)), self.decay(x)

    def _out(self, o: Tensor, gate: Tensor) -> Tensor:
        out: Tensor = self.out_proj(self.norm(o, self._heads(gate)).flatten(2))
        return out

    def _features(self, x: Tensor) -> Tensor:
        return unit_length(F.silu(self._heads(x))) if self.has_unit_keys else elu_plus_one(self._heads(x))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))


class SoftmaxMixer(nn.Module):
    """Llama 3's attention: rotary embedding and grouped queries."""

    def __init__(self, config: LinearLlama3Config) -> None:
        super().__init__()
        self.method: SoftmaxMethod = "auto"
        self.window = config.window
        self.num_heads, self.head_dim = config.num_heads, config.size_of_head
        inner, kv_inner = config.num_heads * self.head_dim, config.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.dim, inner, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_inner, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_inner, bias=False)
        self.out_proj = nn.Linear(inner, config.dim, bias=False)

    def forward(self, x: Tensor, layout: SequenceLayout | None, by: Rotation | None) -> Tensor:
        """x and the result are [B, T, C]; `by` turns each token's queries and keys."""
        assert by is not None
        k, v = rotate(self._heads(self.k_proj(x)), by), self._heads(self.v_proj(x))
        memory = write_softmax(k, v, layout=layout, method=self.method, window=self.window, num_heads=self.num_heads)
        q = rotate(self._heads(self.q_proj(x)), by)
        out: Tensor = self.out_proj(memory.read(q).flatten(2))
        return out

    def step(self, x: Tensor, cache: SoftmaxCache, by: Rotation | None) -> Tensor:
        """The layer's output for the next token [B, 1, C], after those in `cache`."""
        assert by is not None
        k, v = cache.append(rotate(self._heads(self.k_proj(x)), by), self._heads(self.v_proj(x)))
        q = rotate(self._heads(self.q_proj(x)), by)
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=q.shape[2] != k.shape[2]
        )
        out: Tensor = self.out_proj(o.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))
