"""RWKV-7's recurrence over ranks, in the names of its paper: `rwkv7`."""

from __future__ import annotations

from typing import Literal, Unpack, overload

from torch import Tensor

from longspan.attention.by_name import apply_operator
from longspan.attention.options import LayerOptions, OperatorOptions, takes
from longspan.checks import check_same_device, check_tensors
from longspan.errors import InputError


@overload
def rwkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, *,
    output_final_state: Literal[False] = ..., **options: Unpack[OperatorOptions],
) -> Tensor: ...  # fmt: skip
@overload
def rwkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, *,
    output_final_state: Literal[True], **options: Unpack[OperatorOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def rwkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, *,
    output_final_state: bool, **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@takes(LayerOptions)
def rwkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, *,
    scale: float | None = 1.0, output_final_state: bool = False, **options: Unpack[LayerOptions],
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """RWKV-7's recurrence ``S_t = (Diag(e^{w_t}) − (κ_t ⊙ a_t) κ_tᵀ) S_{t-1} + k_t v_tᵀ``, ``o_t = scale · S_tᵀ r_t``.

    The state evolution of arXiv 2503.14456; the paper's state is the transpose of ours. It is `longspan.dplr_delta_rule` with −κ
    for a and κ ⊙ a for b.

    Args:
        r: receptance ``[B, T, H, K]``; float64, float32 or bfloat16.
        w: logarithms of the paper's decays ``[B, T, H, K]``, at most 0: there −e^{−1/2} σ(d). float32 or float64 (bfloat16 is
            accepted, at the price of its own rounding).
        k: replacement keys ``[B, T, H, K]`` in the dtype of r, the paper's k̃.
        v: values ``[B, T, H, V]`` in the dtype of r.
        kappa: removal keys ``[B, T, H, K]``, the paper's κ̂, of length 1: see `longspan.features.unit_length`.
        a: in-context learning rates ``[B, T, H, K]``, in (0, 1).
        scale: a number; None is K^-½. The paper has none.
        initial_state, output_final_state, layout, exchange, schedule, backend, chunk_size: as in `longspan.linear_attention`.

    Returns:
        o ``[B, T, H, V]`` in the dtype of r; with `output_final_state`, the pair (o, final_state).

    Raises:
        InputError, LayoutError: as in `longspan.dplr_delta_rule`.
    """
    check_tensors("rwkv7", r=r, w=w, k=k, v=v, kappa=kappa, a=a)
    check_same_device("rwkv7", r=r, w=w, k=k, v=v, kappa=kappa, a=a)
    if kappa.shape != a.shape:
        raise InputError(
            f"rwkv7: kappa and a must have one shape [B, T, H, K], for each channel a removal key and its rate; got "
            f"{tuple(kappa.shape)} and {tuple(a.shape)}. Expand what is the same for several channels"
        )
    gates = {"a": -kappa, "b": kappa * a, "g": w}
    return apply_operator("dplr_delta_rule", r, k, v, gates, output_final_state, scale=scale, **options)
