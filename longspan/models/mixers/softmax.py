"""Softmax attention (N): writes first and reads last, so that the query projection hides the exchange between ranks.

Shapes: B batch rows, T tokens of this rank, L tokens so far, C channels of the residual stream, H heads, H_kv key and value heads,
D head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from longspan.attention.softmax import write_softmax
from longspan.errors import ConfigError
from longspan.models.initial import InitialWeights
from longspan.models.mixers.blocks_of_keys import keys_before, keys_behind
from longspan.models.mixers.layer import Footprint, LayerMixer
from longspan.models.mixers.mixer import Context, LayerMemory, operations_of_matrices
from longspan.models.rotary import rotate

if TYPE_CHECKING:
    from longspan.models.config import LinearLlama3Config


class SoftmaxMixer(LayerMixer):
    """Llama 3's attention (arXiv 2407.21783): rotary embedding and grouped queries.

    It remembers ``{"keys": [B, L, H_kv, D], "values": [B, L, H_kv, D]}``; with a window the last ``window - 1`` tokens. In segments
    of time (`Context.in_segments`) those of segment i by themselves, as ``"keys.i"`` and ``"values.i"``.
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
        memory = write_softmax(
            k,
            v,
            initial_state=keys_before(context),
            output_final_state=context.outputs_memory,
            layout=context.layout,
            method=self.parallel.softmax_method,
            window=self.window,
            num_heads=self.num_heads,
        )
        q = rotate(self._heads(self.q_proj(x)), context.rotation)
        out: Tensor = self.out_proj(memory.read(q).flatten(2))
        if not context.outputs_memory:
            return out, None
        return out, keys_behind(*memory.final_state(), context)

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
