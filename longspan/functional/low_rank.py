"""Delta rules whose reading and writing vectors differ: a transition that is a diagonal plus a matrix of rank 1.

Shapes: B batch rows, T tokens (this rank's tokens where a layout is given), H heads of v, H_k heads of q and k (H a multiple of
H_k), K key size, V value size.
"""

from __future__ import annotations

from typing import Literal, Unpack, overload

from torch import Tensor

from longspan.attention.by_name import apply_operator
from longspan.attention.options import OperatorOptions, takes


@overload
def dplr_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, *,
    output_final_state: Literal[False] = ..., **options: Unpack[OperatorOptions],
) -> Tensor: ...  # fmt: skip
@overload
def dplr_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, *,
    output_final_state: Literal[True], **options: Unpack[OperatorOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def dplr_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, *,
    output_final_state: bool, **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@takes(OperatorOptions)
def dplr_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, *,
    output_final_state: bool = False, **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The delta rule with a diagonal plus low-rank transition: ``S_t = (Diag(e^{g_t}) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ``.

    ``o_t = scale · S_tᵀ q_t``. What a_t reads of the state before the token, b_t writes: the form of RWKV-7 (arXiv 2503.14456),
    which `rwkv7` has in the names of its paper. Where transitions have singular values above 1 the recurrence may grow.

    Inside, all is float32 for float32 and bfloat16 inputs. For a and b as in RWKV-7 errors are at most three times those of the
    recurrence token by token in float32, plus a few units of the last place. What is NaN or infinite reaches no earlier output.

    Args:
        a, b: what reads and what writes, ``[B, T, H, K]``, in any of the dtypes.
        g: log decays ``[B, T, H, K]``, at most 0; float32 or float64 (bfloat16 is accepted, at the price of its own rounding).
        q, k, v and the rest: as in `linear_attention`.

    Returns:
        o ``[B, T, H, V]`` in the dtype of q; with `output_final_state`, the pair (o, final_state).

    Raises:
        InputError, LayoutError: as in `linear_attention`; and InputError for a g above 0 or NaN (looked at on the CPU only).
    """
    return apply_operator("dplr_delta_rule", q, k, v, {"a": a, "b": b, "g": g}, output_final_state, **options)


@overload
def comba(
    q: Tensor, k: Tensor, v: Tensor, p: Tensor, g: Tensor, beta: Tensor, *,
    output_final_state: Literal[False] = ..., **options: Unpack[OperatorOptions],
) -> Tensor: ...  # fmt: skip
@overload
def comba(
    q: Tensor, k: Tensor, v: Tensor, p: Tensor, g: Tensor, beta: Tensor, *,
    output_final_state: Literal[True], **options: Unpack[OperatorOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def comba(
    q: Tensor, k: Tensor, v: Tensor, p: Tensor, g: Tensor, beta: Tensor, *,
    output_final_state: bool, **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@takes(OperatorOptions)
def comba(
    q: Tensor, k: Tensor, v: Tensor, p: Tensor, g: Tensor, beta: Tensor, *,
    output_final_state: bool = False, **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The delta rule with its own feedback: ``S_t = e^{g_t} S_{t-1} + β_t k_t (v_t − S_{t-1}ᵀ p_t)ᵀ``, ``o_t = scale · S_tᵀ q_t``.

    Comba (arXiv 2506.02475), whose transition is a scalar plus a matrix of rank 1. p reads the state before the token's decay.
    Precision as of `dplr_delta_rule`.

    Args:
        p: what reads that which a token takes off, ``[B, T, H, K]``, in any of the dtypes; Comba's is b k, b learned per head.
        g: log decays ``[B, T, H]``, at most 0; float32 or float64 (bfloat16 is accepted, at the price of its own rounding).
        beta: how strongly a token writes, ``[B, T, H]``.
        q, k, v and the rest: as in `linear_attention`; Comba reads with q − d k, d learned.

    Returns:
        o ``[B, T, H, V]`` in the dtype of q; with `output_final_state`, the pair (o, final_state).

    Raises:
        InputError, LayoutError: as in `linear_attention`; and InputError for a g above 0 or NaN (looked at on the CPU only).
    """
    return apply_operator("comba", q, k, v, {"p": p, "g": g, "beta": beta}, output_final_state, **options)
