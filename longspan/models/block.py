"""A block of Llama 3: a mixer, and then a feed-forward layer.

Shapes: B batch rows, T tokens (this rank's where a layout is given), C channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from longspan.models.config import LinearLlama3Config
from longspan.models.experts import build_feed_forward
from longspan.models.feed_forward import FeedForward
from longspan.models.initial import InitialWeights
from longspan.models.mixers import Context, LayerMemory, LayerMixer, build_mixer
from longspan.models.norms import RMSNorm


class HybridBlock(nn.Module):
    """x + mixer(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.dim, config.norm_eps)
        self.mixer: LayerMixer = build_mixer(config, layer)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward: FeedForward = build_feed_forward(config)

    def forward(
        self, x: Tensor, context: Context, handed: Tensor | None = None
    ) -> tuple[Tensor, LayerMemory | None, *tuple[Tensor, ...]]:
        """x and the result are [B, T, C], or the latter [B, 0, C] where nobody reads its tokens.

        Also what the mixer remembers, if it is asked for, what it hands on, and with experts what `Routed` holds.

        handed: what the first layer of its kind has handed on, if the mixer takes it. One by one: reentrant checkpointing finds no
        tensors inside of others.
        """
        mixed, memory, *for_others = self.mixer(self.mixer_norm(x), context, *(() if handed is None else (handed,)))
        if not context.outputs_tokens:
            return x[:, :0], memory, *for_others
        x = x + mixed
        fed, routed = self.feed_forward(self.feed_forward_norm(x), context)
        return x + fed, memory, *for_others, *(() if routed is None else routed)

    def init_weights(self, initial: InitialWeights) -> None:
        """Set the initial weights."""
        initial.fill(self.mixer_norm)
        self.mixer.init_weights(initial)
        initial.fill(self.feed_forward_norm)
        self.feed_forward.init_weights(initial)

    def flops_per_token(self, seq_len: int) -> float:
        """Operations of forward and backward for one token of a sequence of `seq_len`."""
        return self.mixer.flops_per_token(seq_len) + self.feed_forward.flops_per_token()
