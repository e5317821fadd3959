"""What a training step keeps of a Linear-Llama3 between forward and backward: counted in the layers, not measured.

Every number here, and those that mixers give of themselves, is a count of tensors that autograd saves for a token, found with
`torch.autograd.graph.saved_tensors_hooks`; a test counts them again, for each mixer in float32 and bfloat16. Letters: C width of
the residual stream, F width of the feed-forward layer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Protocol

_FLOAT32 = 4
_STATE_CHUNK = {2: 128, 4: 64}
_DELTA_CHUNK = 64


class MixerSizes(Protocol):
    """What the mixer of a layer takes, in numbers, as `longspan.models` has it (``Footprint``).

    narrow: saved for a token, in the dtype of the layer; wide: in float32 always. state: of a memory state of one row of the batch,
    0 for a softmax layer. transition: of a matrix that is sent beside a state; delta rules have one. halo: of what a short
    convolution is sent for a segment, in the dtype of the layer.
    """

    @property
    def narrow(self) -> int: ...
    @property
    def wide(self) -> int: ...
    @property
    def state(self) -> int: ...
    @property
    def transition(self) -> int: ...
    @property
    def halo(self) -> int: ...


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a Linear-Llama3.

    kv_heads, head_dim: of softmax layers. operators: the mixer of each layer; mixers: what each of these takes. num_parameters: of
    the whole model; layer_parameters: of its largest layer; matrix_parameters: of all linear maps, the output's among them, and of
    all experts. loss_chunk: tokens whose logits are held at once. feed_forward_chunk: tokens that a feed-forward layer computes at
    once, keeping nothing of its width; 0 is all, kept. num_experts: of a feed-forward layer, of width hidden_dim each, 0 for a
    plain one; experts_per_token, num_shared_experts: those that a token takes. window: of softmax layers; None is none.
    """

    dim: int
    hidden_dim: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    operators: tuple[str, ...]
    mixers: Mapping[str, MixerSizes]
    num_parameters: int
    layer_parameters: int
    matrix_parameters: int
    loss_chunk: int
    feed_forward_chunk: int
    num_experts: int = 0
    experts_per_token: int = 0
    num_shared_experts: int = 0
    window: int | None = None


def mixer_bytes(sizes: ModelSizes, operator: str, num_tokens: int, number_bytes: int) -> int:
    """Bytes that a layer's mixer saves for `num_tokens` of this rank, states apart; number_bytes: of the layer's dtype, 2 or 4."""
    mixer = sizes.mixers[operator]
    return (mixer.narrow * number_bytes + mixer.wide * _FLOAT32) * num_tokens


def state_bytes(sizes: ModelSizes, operator: str, num_tokens: int, number_bytes: int, num_segments: int = 1) -> int:
    """Bytes of the float32 states that a linear layer saves: one at each chunk's start, and one behind each segment."""
    mixer = sizes.mixers[operator]
    chunk = _DELTA_CHUNK if mixer.transition else _STATE_CHUNK[number_bytes]
    return (ceil(num_tokens / chunk) + num_segments) * mixer.state * _FLOAT32


def block_bytes(sizes: ModelSizes, operator: str, num_tokens: int, number_bytes: int) -> int:
    """Bytes that a whole layer saves, states apart: the mixer, two norms and the feed-forward layer."""
    wide = 4 * sizes.dim + 2
    norms = (2 * sizes.dim * number_bytes + wide * _FLOAT32) * num_tokens
    fed = feed_forward_bytes(sizes, num_tokens, number_bytes)
    return norms + fed + mixer_bytes(sizes, operator, num_tokens, number_bytes)


def feed_forward_bytes(sizes: ModelSizes, num_tokens: int, number_bytes: int) -> int:
    """Bytes that a feed-forward layer saves beside its input."""
    width = 4 * sizes.hidden_dim * (sizes.num_shared_experts if sizes.num_experts else 1)
    own = 0 if sizes.feed_forward_chunk else width * number_bytes
    if sizes.num_experts:
        # The router's input, logits and probabilities; of each choice its probability, weight and number.
        wide_input = 0 if number_bytes == _FLOAT32 else sizes.dim
        own += (wide_input + 2 * sizes.num_experts + 2 + 2 * sizes.experts_per_token) * _FLOAT32
        own += 8 * sizes.experts_per_token
        if not sizes.feed_forward_chunk:
            # Two tensors of the width in the order of the experts, and where each row comes from and goes to.
            own += sizes.experts_per_token * (2 * sizes.hidden_dim * number_bytes + 2 * 8)
    return own * num_tokens


def outside_bytes(sizes: ModelSizes, num_tokens: int) -> int:
    """Bytes that the model saves outside its layers: the last norm, the rotation, and the token ids with their labels."""
    rotation = sizes.head_dim * _FLOAT32 if "softmax" in sizes.operators else 0
    return (sizes.dim * 2 * _FLOAT32 + _FLOAT32 + rotation + 2 * 8) * num_tokens


def kept_loss_bytes(sizes: ModelSizes, num_tokens: int, number_bytes: int) -> int:
    """Bytes that the loss saves: the gradients of its input, in the dtype of the layers, and of its matrix, float32."""
    return sizes.dim * (num_tokens * number_bytes + sizes.vocab_size * _FLOAT32)


def loss_bytes(sizes: ModelSizes, num_tokens: int, number_bytes: int) -> int:
    """Bytes of the loss at its largest: what it saves, and a chunk's logits with their gradient, or what it saves once more."""
    kept = kept_loss_bytes(sizes, num_tokens, number_bytes)
    # A chunk's logits and gradient are float32; narrow products have their own results.
    chunk = min(sizes.loss_chunk, num_tokens) * sizes.vocab_size * 2 * _FLOAT32
    if number_bytes < _FLOAT32:
        chunk += (min(sizes.loss_chunk, num_tokens) + sizes.dim) * sizes.vocab_size * number_bytes
    return kept + max(chunk, kept)


def gathered_bytes(sizes: ModelSizes, seq_len: int, rows: int, number_bytes: int) -> int:
    """Bytes of all ranks' keys and values in one softmax layer that gathers them; they are let go of after each layer."""
    return 2 * sizes.kv_heads * sizes.head_dim * seq_len * rows * number_bytes
