"""How well a language model's head predicts each token, without holding the logits of all tokens: `score_tokens`.

What `longspan.chunked_cross_entropy` adds up, token by token and without gradients: for evaluation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.autocast import as_in_product, without_autocast
from longspan.dtypes import accumulation_dtype
from longspan.ops.chunked.cross_entropy import chunk_size_of


class TokenScores(NamedTuple):
    """What became of the label of each token.

    nats: ``[...]``, its cross-entropy, float32 (float64 for float64); 0 where there is none. is_likeliest: bool ``[...]``, whether
    greedy decoding would choose it; False where there is none.
    """

    nats: Tensor
    is_likeliest: Tensor


@torch.no_grad()
def score_tokens(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, chunk_size: int | None = None
) -> TokenScores:
    """The cross-entropy of each label, and whether it is the likeliest word.

    Args:
        hidden: what the head reads, ``[..., D]``.
        weight: of the head, ``[V, D]``, the dtype of hidden.
        labels: int64 ``[...]``, from 0 to V − 1, or `ignore_index`: those tokens take no product.
        chunk_size: tokens whose logits are held at once; None is as in `chunked_cross_entropy`.
    """
    x, words = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    dtype = as_in_product(hidden.new_empty(0)).dtype
    wide = accumulation_dtype(dtype)
    matrix = weight.to(dtype)
    nats = x.new_zeros(len(x), dtype=wide)
    is_likeliest = torch.zeros_like(words, dtype=torch.bool)
    labelled = (words != ignore_index).nonzero().squeeze(1)
    with without_autocast(x):
        for rows in labelled.split(chunk_size or chunk_size_of(len(weight))):
            logits = F.linear(x[rows].to(dtype), matrix).to(wide)
            nats[rows] = F.cross_entropy(logits, words[rows], reduction="none")
            is_likeliest[rows] = logits.argmax(-1) == words[rows]
    return TokenScores(nats.view(labels.shape), is_likeliest.view(labels.shape))
