"""What a softmax layer remembers: all keys and values in one tensor each, or in segments of time as blocks, one of each segment.

A block is an output of its segment and an input of all later ones, passed on as it is: nothing is copied from segment to segment,
and the gradients that later segments send are summed in one place.

Shapes: B batch rows, L tokens so far, H_kv key and value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from longspan.attention.softmax.final_state import KeysAndValues


class KeyBlocks:
    """Keys and values ``[B, L_i, H_kv, D]`` of segments i, in order, by names ``"keys.i"`` and ``"values.i"``.

    Opaque to FSDP2, which would put what is in arguments through a node, and no block would be the one that entered.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    @property
    def numbers(self) -> list[int]:
        """Of the segments."""
        return sorted(int(name.removeprefix("keys.")) for name in self.tensors if name.startswith("keys."))

    def joined(self) -> KeysAndValues:
        """Keys and values of all blocks, ``[B, L, H_kv, D]`` each."""
        keys, values = (
            torch.cat([self.tensors[f"{name}.{number}"] for number in self.numbers], dim=1)
            for name in ("keys", "values")
        )
        return keys, values

    def followed_by(self, keys: Tensor, values: Tensor, num_earlier: int) -> KeyBlocks:
        """With one more block; earlier ones are left out of which none of the last `num_earlier` tokens before it is."""
        tensors: dict[str, Tensor] = {}
        numbers = self.numbers
        for number in reversed(numbers):
            if num_earlier <= 0:
                break
            tensors |= {f"{name}.{number}": self.tensors[f"{name}.{number}"] for name in ("keys", "values")}
            num_earlier -= self.tensors[f"keys.{number}"].shape[1]
        number = numbers[-1] + 1 if numbers else 0
        return KeyBlocks(tensors | {f"keys.{number}": keys, f"values.{number}": values})
