"""How large a model is and how much it computes, from its config alone: no weight is made."""

from __future__ import annotations

import torch

from longspan.models.config import LinearLlama3Config
from longspan.models.linear_llama3 import LinearLlama3


def num_parameters(config: LinearLlama3Config) -> int:
    """Number of trained numbers of a model; a tied matrix counts once."""
    return on_meta(config).num_parameters()


def num_active_parameters(config: LinearLlama3Config) -> int:
    """Number of those that a token meets: of the experts of a layer those that it takes."""
    return on_meta(config).num_active_parameters()


def flops_per_token(config: LinearLlama3Config, seq_len: int) -> float:
    """Floating-point operations of forward and backward of a model for one token of a sequence of `seq_len`.

    Six for each number of a matrix or a convolution that a token meets, and the products by which mixers write and read: of linear
    attention in its recurrent form, whatever a chunk form computes more; of softmax attention with what a token sees on average.
    Embeddings, norms, activations and gates that are no matrices are not counted, and nor is recomputation.
    """
    return on_meta(config).flops_per_token(seq_len)


def on_meta(config: LinearLlama3Config) -> LinearLlama3:
    """The model with shapes and no values."""
    with torch.device("meta"):
        return LinearLlama3(config)
