"""HGRN2's recurrence over ranks: `hgrn2`."""

from __future__ import annotations

from typing import Literal, Unpack, overload

from torch import Tensor

from longspan.attention.by_name import apply_operator
from longspan.attention.options import LayerOptions, takes
from longspan.autocast import as_in_product
from longspan.checks import check_same_device, check_tensors
from longspan.features import hgrn2_log_decay


@overload
def hgrn2(
    q: Tensor, f: Tensor, i: Tensor, *, lower_bound: Tensor | float = ...,
    output_final_state: Literal[False] = ..., **options: Unpack[LayerOptions],
) -> Tensor: ...  # fmt: skip
@overload
def hgrn2(
    q: Tensor, f: Tensor, i: Tensor, *, lower_bound: Tensor | float = ...,
    output_final_state: Literal[True], **options: Unpack[LayerOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def hgrn2(
    q: Tensor, f: Tensor, i: Tensor, *, lower_bound: Tensor | float = ...,
    output_final_state: bool, **options: Unpack[LayerOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@takes(LayerOptions)
def hgrn2(
    q: Tensor, f: Tensor, i: Tensor, *, lower_bound: Tensor | float = 0.0,
    output_final_state: bool = False, **options: Unpack[LayerOptions],
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """HGRN2's recurrence ``S_t = Diag(f_t) S_{t-1} + (1 − f_t) i_tᵀ``, ``o_t = S_tᵀ q_t`` (arXiv 2404.07904).

    It is `longspan.gla` with k = 1 − f, v = i, g = log f and scale 1.

    Args:
        q: ``[B, T, H, K]``, the paper's output gate; float64, float32 or bfloat16.
        f: logits of the forget gate ``[B, T, H, K]``, in any of these dtypes: f_t = lower_bound + (1 − lower_bound) · σ(f).
        i: values ``[B, T, H, V]`` in the dtype of q.
        lower_bound: a number in [0, 1] or a tensor that broadcasts with f, such as ``[H, K]``, from `hgrn2_lower_bounds`.
        initial_state, output_final_state, layout, exchange, schedule, backend, chunk_size: as in `longspan.gla`.

    Returns:
        o ``[B, T, H, V]`` in the dtype of q; with `output_final_state`, the pair (o, final_state).

    Raises:
        InputError, LayoutError: as in `longspan.gla`.
    """
    check_tensors("hgrn2", q=q, f=f, i=i)
    check_same_device("hgrn2", q=q, f=f, i=i)
    q, i = as_in_product(q), as_in_product(i)
    g, k = hgrn2_log_decay(f, lower_bound)
    return apply_operator("gla", q, k.to(q.dtype), i, {"g": g}, output_final_state, scale=1.0, **options)
