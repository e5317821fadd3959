"""Softmax attention (N): writes first and reads last, so that the query projection hides the exchange between ranks.

Shapes: B batch rows, T tokens of this rank, L tokens so far, C channels of the residual stream, H heads, H_kv key and value heads,
D head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longspan.attention.softmax import EarlierKeys, write_softmax
from longspan.attention.softmax.final_state import KeysAndValues, final_keys
from longspan.autocast import as_in_product
from longspan.errors import ConfigError
from longspan.layout import SequenceLayout
from longspan.models.initial import InitialWeights
from longspan.models.mixers.growing import Grown, append
from longspan.models.mixers.layer import Footprint, LayerMixer
from longspan.models.mixers.mixer import Context, LayerMemory, operations_of_matrices
from longspan.models.rotary import rotate
from longspan.tracing import has_no_values

if TYPE_CHECKING:
    from longspan.layout import SequenceLayout
    from longspan.models.config import LinearLlama3Config


class SoftmaxMixer(LayerMixer):
    """Llama 3's attention (arXiv 2407.21783): rotary embedding and grouped queries.

    It remembers ``{"keys": [B, L, H_kv, D], "values": [B, L, H_kv, D]}``; with a window the last ``window - 1`` tokens. In segments
    of time (`empty_memory`) each rank remembers those of its own tokens, as `longspan.EarlierKeys`, until `whole_memory`.
    """

    name = "softmax"
    rotates = True

    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.window = config.window
        self.num_heads, self.head_dim = config.num_heads, config.size_of_head
        inner, kv_inner = config.num_heads * self.head_dim, config.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.dim, inner, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_inner, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_inner, bias=False)
        self.out_proj = nn.Linear(inner, config.dim, bias=False)

    @classmethod
    def check(cls, config: LinearLlama3Config) -> None:
        if config.size_of_head % 2:
            raise ConfigError(
                f"the size of a head must be even, for the rotary embedding of softmax layers; got {config.size_of_head}"
            )

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, LayerMemory | None]:
        assert context.rotation is not None
        k, v = rotate(self._heads(self.k_proj(x)), context.rotation), self._heads(self.v_proj(x))
        k, v = as_in_product(k), as_in_product(v)
        earlier = None if context.memory is None else context.memory.earlier
        before = _keys_before(context)
        grows = _grows(k, before, context)
        if not context.outputs_tokens:
            return x[:, :0], self._behind(k, v, before, grows, context)
        memory = write_softmax(
            k,
            v,
            initial_state=before,
            earlier=earlier,
            output_final_state=context.outputs_memory and not grows and earlier is None,
            layout=context.layout,
            method=self.parallel.softmax_method,
            window=self.window,
            num_heads=self.num_heads,
        )
        q = rotate(self._heads(self.q_proj(x)), context.rotation)
        out: Tensor = self.out_proj(memory.read(q).flatten(2))
        if not context.outputs_memory:
            return out, None
        if earlier is not None or grows:
            return out, self._behind(k, v, before, grows, context)
        keys, values = memory.final_state()
        return out, LayerMemory({"keys": keys, "values": values})

    def empty_memory(self, offload: bool) -> LayerMemory:
        return LayerMemory(earlier=EarlierKeys(offload=offload, requires_grad=True))

    def whole_memory(self, memory: LayerMemory, layout: SequenceLayout) -> LayerMemory:
        # In a window of one token nothing is kept of those before.
        if memory.earlier is None or not memory.earlier.parts:
            return LayerMemory(memory.tensors)
        keys, values = memory.earlier.whole(layout, window=self.window)
        return LayerMemory({"keys": keys, "values": values})

    def _behind(self, k: Tensor, v: Tensor, before: KeysAndValues | None, grows: bool, context: Context) -> LayerMemory:
        """What is remembered behind k and v ``[B, T, H_kv, D]``, where no read has brought the final state together."""
        earlier = None if context.memory is None else context.memory.earlier
        if earlier is not None:
            return LayerMemory(earlier=earlier.followed_by(k, v, context.layout, window=self.window))
        if grows:
            return self._grown(k, v, before, context.memory)
        layout = context.layout or SequenceLayout.local(k.shape[1])
        keys, values = final_keys(k, v, before, layout, self.window, False)
        return LayerMemory({"keys": keys, "values": values})

    def _grown(self, k: Tensor, v: Tensor, before: KeysAndValues | None, memory: LayerMemory | None) -> LayerMemory:
        """What is remembered behind `before`, to the bit as `final_state` has it, written where there is room."""
        most = None if self.window is None else self.window - 1
        ends = {} if memory is None else memory.grown
        tensors: dict[str, Tensor] = {}
        grown: dict[str, Grown] = {}
        for name, new, earlier in zip(("keys", "values"), (k, v), before or (None, None), strict=True):
            tensors[name], grown[name] = append(earlier, ends.get(name), new, most)
        return LayerMemory(tensors, grown=grown)

    def init_weights(self, initial: InitialWeights) -> None:
        initial.fill(self, residual=(self.out_proj,))

    def flops_per_token(self, seq_len: int) -> float:
        window = seq_len if self.window is None else min(self.window, seq_len)
        # What a token sees on average.
        seen = window - window**2 / (2 * seq_len)
        return operations_of_matrices(self) + 12 * self.num_heads * self.head_dim * seen

    def footprint(self) -> Footprint:
        # q and o; k and v; the log-sum-exp.
        narrow = 2 * self.num_heads * self.head_dim + self.k_proj.out_features + self.v_proj.out_features
        return Footprint(narrow, wide=self.num_heads, state=0)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


def _keys_before(context: Context) -> KeysAndValues | None:
    """Keys and values of all earlier tokens, ``[B, L, H_kv, D]`` each; None before the first token, and in segments of time."""
    keys, values = context.remembered("keys"), context.remembered("values")
    return None if keys is None or values is None else (keys, values)


def _grows(k: Tensor, before: KeysAndValues | None, context: Context) -> bool:
    """Whether tokens are written behind all that are remembered: where this rank has them, and no gradient passes through."""
    layout = context.layout
    is_whole = layout is None or (layout.num_ranks == 1 and not layout.is_packed)
    in_place = context.outputs_memory and not context.in_segments and not torch.is_grad_enabled()
    return in_place and is_whole and not has_no_values(k) and _all_go_on(before, layout)


def _all_go_on(before: KeysAndValues | None, layout: SequenceLayout | None) -> bool:
    """Whether the document that these tokens begin with goes on from all keys before them, none of which is of another document."""
    if before is None or layout is None or layout.continues is None:
        return True
    return before[0].shape[1] <= layout.continues
