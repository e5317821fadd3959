"""Linear attention whose state is slots, which decay one by one and are read by a softmax.

Shapes: B batch rows, T tokens (this rank's tokens where a layout is given), H heads of v, H_k heads of q and k (H a multiple of
H_k), K key size, V value size, M slots.
"""

from __future__ import annotations

from typing import Literal, Unpack, overload

from torch import Tensor

from longspan.attention.by_name import apply_operator
from longspan.attention.options import OperatorOptions, takes


@overload
def gated_slot_attention(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, *,
    output_final_state: Literal[False] = ..., **options: Unpack[OperatorOptions],
) -> Tensor: ...  # fmt: skip
@overload
def gated_slot_attention(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, *,
    output_final_state: Literal[True], **options: Unpack[OperatorOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def gated_slot_attention(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, *,
    output_final_state: bool, **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@takes(OperatorOptions)
def gated_slot_attention(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, *,
    output_final_state: bool = False, **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Gated slot attention: M slots of a key and a value each, which decay slot by slot, read by a softmax over the slots.

    ``K̃_t = Diag(e^{g_t}) K̃_{t-1} + s_t k_tᵀ``, ``Ṽ_t = Diag(e^{g_t}) Ṽ_{t-1} + s_t v_tᵀ``, and
    ``o_t = Ṽ_tᵀ softmax(scale · K̃_t q_t)`` (arXiv 2409.07146; the paper's s is 1 − e^g).

    Both halves of the state decay alike: they are one state ``[M, K + V]``, K̃ and Ṽ beside each other, and one exchange. Outputs
    and gradients err at most three times as much as token by token in the same dtype, for every g from 0 to −inf.

    Args:
        s: how strongly a token writes into each slot, ``[B, T, H, M]``, in any of the dtypes; it is rounded to that of k.
        g: log decays ``[B, T, H, M]``, at most 0; float32 or float64 (bfloat16 is accepted, at the price of its own rounding).
        initial_state: as in `linear_attention`, of the shape ``[B, H, M, K + V]`` (``[num_documents, H, M, K + V]``); the final
            state has it, too.
        q, k, v and the rest: as in `linear_attention`.

    Returns:
        o ``[B, T, H, V]`` in the dtype of q; with `output_final_state`, the pair (o, final_state).

    Raises:
        InputError, LayoutError: as in `linear_attention`; and InputError for a g above 0 or NaN (looked at on the CPU only).
    """
    return apply_operator("gated_slot_attention", q, k, v, {"s": s, "g": g}, output_final_state, **options)
