"""What a softmax layer remembers: all keys and values in one tensor each, or in segments of time as blocks, one of each segment.

A block is an output of its segment and an input of all later ones, passed on as it is: nothing is copied from segment to segment,
and the gradients that later segments send are summed in one place.

Shapes: B batch rows, L tokens so far, H_kv key and value heads, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.attention.softmax.final_state import KeysAndValues
from longspan.models.mixers.mixer import Context, LayerMemory


def keys_before(context: Context) -> KeysAndValues | None:
    """Keys and values of all earlier tokens, ``[B, L, H_kv, D]`` each; None before the first token."""
    if context.memory is None:
        return None
    if not context.in_segments:
        keys, values = context.memory.tensors["keys"], context.memory.tensors["values"]
        return keys, values
    numbers = _numbers(context.memory)
    keys, values = (
        torch.cat([context.memory.tensors[f"{name}.{number}"] for number in numbers], dim=1)
        for name in ("keys", "values")
    )
    return keys, values


def keys_behind(keys: Tensor, values: Tensor, context: Context) -> LayerMemory:
    """What is remembered after this call's tokens.

    Args:
        keys, values: of all tokens so far, or with a window of the last ``window - 1``, ``[B, L, H_kv, D]``.
    """
    if not context.in_segments:
        return LayerMemory({"keys": keys, "values": values})
    tensors: dict[str, Tensor] = {}
    before = LayerMemory() if context.memory is None else context.memory
    numbers = _numbers(before)
    assert context.layout is None or not context.layout.is_packed
    num_new = min(keys.shape[1], len(context.positions) if context.layout is None else context.layout.seq_len)
    seen = keys.shape[1] - num_new
    for number in reversed(numbers):
        # Blocks stay whole as long as a token of them is still seen.
        if seen <= 0:
            break
        tensors |= {f"{name}.{number}": before.tensors[f"{name}.{number}"] for name in ("keys", "values")}
        seen -= before.tensors[f"keys.{number}"].shape[1]
    number = numbers[-1] + 1 if numbers else 0
    first = keys.shape[1] - num_new
    return LayerMemory(tensors | {f"keys.{number}": keys[:, first:], f"values.{number}": values[:, first:]})


def _numbers(memory: LayerMemory) -> list[int]:
    """Of the blocks, in the order of their tokens."""
    return sorted(int(name.removeprefix("keys.")) for name in memory.tensors if name.startswith("keys."))
