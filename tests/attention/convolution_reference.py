"""What a short convolution and a token shift are: tap by tap and document by document; and inputs for their tests."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from longspan.layout import Order

ORDERS: list[Order] = ["contiguous", "zigzag"]
Documents = list[int] | None
LENGTHS = (4, 9, 37)
NUM_CHANNELS = 3


def documents_of(seq_len: int) -> list[Documents]:
    """None, and boundaries on shards and inside them with one-token documents and some shorter than a halo."""
    return [None, sorted({0, 1, 2, seq_len // 4, seq_len // 2, seq_len // 2 + 2, seq_len - 1, seq_len})]


def inputs(
    seq_len: int, taps: int, documents: Documents, *, batch: int = 1, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Global x, parameters, initial state, and random gradients of y and of the final state."""
    generator = torch.Generator().manual_seed(seq_len * 10 + taps)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    num_states = batch if documents is None else len(documents) - 1
    return {
        "x": normal(batch, seq_len, NUM_CHANNELS),
        "weight": normal(NUM_CHANNELS, taps),
        "bias": normal(NUM_CHANNELS),
        "initial_state": normal(num_states, taps - 1, NUM_CHANNELS),
        "grad_y": normal(batch, seq_len, NUM_CHANNELS),
        "grad_final": normal(num_states, taps - 1, NUM_CHANNELS),
    }


def definition(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, documents: Documents, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y and the final state, tap by tap and document by document."""
    width = weight.shape[1] - 1
    outputs, finals = [], []
    for number, (start, stop) in enumerate(pairwise(documents or [0, x.shape[1]])):
        if initial is None:
            before = x.new_zeros(x.shape[0], width, x.shape[2])
        else:
            before = initial if documents is None else initial[number : number + 1]
        tokens = torch.cat([before, x[:, start:stop]], dim=1)
        z = torch.stack([tokens[:, tap : tap + stop - start] * weight[:, tap] for tap in range(width + 1)]).sum(0)
        outputs.append(z if bias is None else z + bias)
        finals.append(tokens[:, stop - start :])
    y = torch.cat(outputs, dim=1)
    return y if activation is None else y * torch.sigmoid(y), torch.cat(finals)
