"""The delta rules: a token replaces what its key reads.

Shapes: B batch rows, T tokens (this rank's tokens where a layout is given), H heads of v, H_k heads of q and k (H a multiple of
H_k), K key size, V value size.
"""

from __future__ import annotations

from typing import Literal, Unpack, overload

from torch import Tensor

from longspan.attention.by_name import apply_operator
from longspan.attention.options import OperatorOptions, takes
from longspan.checks import check_flag, check_tensors
from longspan.features import unit_length


@overload
def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *,
    qk_l2norm: bool = ..., output_final_state: Literal[False] = ..., **options: Unpack[OperatorOptions],
) -> Tensor: ...  # fmt: skip
@overload
def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *,
    qk_l2norm: bool = ..., output_final_state: Literal[True], **options: Unpack[OperatorOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *,
    qk_l2norm: bool = ..., output_final_state: bool, **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@takes(OperatorOptions)
def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *,
    qk_l2norm: bool = False, output_final_state: bool = False, **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The delta rule: ``S_t = (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ``, ``o_t = scale · S_tᵀ q_t``.

    DeltaNet (arXiv 2102.11174, 2406.06484). Keys should have length 1, or the recurrence may grow.

    Inside, all is float32 for float32 and bfloat16 inputs. For keys of length 1 and beta from 0 to 2 errors are at most three times
    those of the recurrence token by token in float32, plus a few units of the last place. What is NaN or
    infinite reaches no earlier output.

    Args:
        beta: how much of what its key reads a token replaces, ``[B, T, H]``; in (0, 1), or up to 2 for keys of length 1.
        qk_l2norm: give the q and k of each head length 1 first, ``x / sqrt(|x|² + 1e-6)``, in float32 and rounded to their dtype,
            as flash-linear-attention's ``use_qk_l2norm_in_kernel``. In two phases, use `longspan.features.unit_length`.
        q, k, v and the rest: as in `linear_attention`.

    Returns:
        o ``[B, T, H, V]`` in the dtype of q; with `output_final_state`, the pair (o, final_state).

    Raises:
        InputError, LayoutError: as in `linear_attention`.
    """
    q, k = _normed("delta_rule", q, k, qk_l2norm)
    return apply_operator("delta_rule", q, k, v, {"beta": beta}, output_final_state, **options)


@overload
def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *,
    qk_l2norm: bool = ..., output_final_state: Literal[False] = ..., **options: Unpack[OperatorOptions],
) -> Tensor: ...  # fmt: skip
@overload
def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *,
    qk_l2norm: bool = ..., output_final_state: Literal[True], **options: Unpack[OperatorOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *,
    qk_l2norm: bool = ..., output_final_state: bool, **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@takes(OperatorOptions)
def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *,
    qk_l2norm: bool = False, output_final_state: bool = False, **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The gated delta rule: ``S_t = e^{g_t} (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ``, ``o_t = scale · S_tᵀ q_t``.

    Gated DeltaNet (arXiv 2412.06464). Keys should have length 1, or the recurrence may grow.

    Inside, all is float32 for float32 and bfloat16 inputs. For keys of length 1 and beta from 0 to 2 errors are at most three times
    those of the recurrence token by token in float32, plus a few units of the last place (fourteen times for the
    gradient of g, 6e-6 of its largest, where keys are nearly equal: what passes a token and what it erases of that nearly cancel).
    What is NaN or infinite reaches no earlier output.

    Args:
        g: log decays ``[B, T, H]``, at most 0; float32 or float64 (bfloat16 is accepted, at the price of its own rounding).
        beta: how much of what its key reads a token replaces, ``[B, T, H]``; in (0, 1), or up to 2 for keys of length 1.
        qk_l2norm: as in `delta_rule`.
        q, k, v and the rest: as in `linear_attention`.

    Returns:
        o ``[B, T, H, V]`` in the dtype of q; with `output_final_state`, the pair (o, final_state).

    Raises:
        InputError, LayoutError: as in `linear_attention`; and InputError for a g above 0 or NaN (looked at on the CPU only).
    """
    q, k = _normed("gated_delta_rule", q, k, qk_l2norm)
    return apply_operator("gated_delta_rule", q, k, v, {"g": g, "beta": beta}, output_final_state, **options)


@overload
def kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *,
    qk_l2norm: bool = ..., output_final_state: Literal[False] = ..., **options: Unpack[OperatorOptions],
) -> Tensor: ...  # fmt: skip
@overload
def kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *,
    qk_l2norm: bool = ..., output_final_state: Literal[True], **options: Unpack[OperatorOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *,
    qk_l2norm: bool = ..., output_final_state: bool, **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@takes(OperatorOptions)
def kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *,
    qk_l2norm: bool = False, output_final_state: bool = False, **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Kimi Delta Attention: ``S_t = (I − β_t k_t k_tᵀ) Diag(e^{g_t}) S_{t-1} + β_t k_t v_tᵀ``, ``o_t = scale · S_tᵀ q_t``.

    arXiv 2510.26692. Keys should have length 1, or the recurrence may grow.

    Inside, all is float32 for float32 and bfloat16 inputs. For keys of length 1 and beta from 0 to 2 errors are at most three times
    those of the recurrence token by token in float32, plus a few units of the last place (nine times for the
    gradient of g, 3e-6 of its largest, where keys are nearly equal: what passes a token and what it erases of that nearly cancel).
    What is NaN or infinite reaches no earlier output.

    Args:
        g: log decays ``[B, T, H, K]``, at most 0; float32 or float64 (bfloat16 is accepted, at the price of its own rounding).
        beta: how much of what its key reads a token replaces, ``[B, T, H]``; in (0, 1), or up to 2 for keys of length 1.
        qk_l2norm: as in `delta_rule`.
        q, k, v and the rest: as in `linear_attention`.

    Returns:
        o ``[B, T, H, V]`` in the dtype of q; with `output_final_state`, the pair (o, final_state).

    Raises:
        InputError, LayoutError: as in `linear_attention`; and InputError for a g above 0 or NaN (looked at on the CPU only).
    """
    q, k = _normed("kda", q, k, qk_l2norm)
    return apply_operator("kda", q, k, v, {"g": g, "beta": beta}, output_final_state, **options)


@overload
def gated_delta_product(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *,
    qk_l2norm: bool = ..., output_final_state: Literal[False] = ..., **options: Unpack[OperatorOptions],
) -> Tensor: ...  # fmt: skip
@overload
def gated_delta_product(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *,
    qk_l2norm: bool = ..., output_final_state: Literal[True], **options: Unpack[OperatorOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def gated_delta_product(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *,
    qk_l2norm: bool = ..., output_final_state: bool, **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@takes(OperatorOptions)
def gated_delta_product(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *,
    qk_l2norm: bool = False, output_final_state: bool = False, **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The gated delta rule with N steps per token: a decay times a product of N generalized Householder matrices.

    ``S_{t,0} = e^{g_t} S_{t-1}``, ``S_{t,n} = (I − β_{t,n} k_{t,n} k_{t,n}ᵀ) S_{t,n-1} + β_{t,n} k_{t,n} v_{t,n}ᵀ``, and after the
    last step ``o_t = scale · S_{t,N}ᵀ q_t``. Gated DeltaProduct (arXiv 2502.10297); DeltaProduct is g = 0, and N = 1 is
    `gated_delta_rule`. Keys should have length 1, or the recurrence may grow; with N of at least 2 and β near 2 a token may rotate
    the state.

    Precision as of `gated_delta_rule`, but for the gradient of an initial state where β is near 2: ten times the error of the
    recurrence token by token, 1e-6 of its largest. The states sent between ranks are as large as there, whatever N is.

    Args:
        q: ``[B, T, H_k, K]``: a query for each token, which reads after its last step.
        k, v: ``[B, T, N, H_k, K]`` and ``[B, T, N, H, V]``: the steps of a token, in order.
        g: log decays of tokens ``[B, T, H]``, at most 0; float32 or float64 (bfloat16 is accepted, with its own rounding).
        beta: how much of what its key reads a step replaces, ``[B, T, N, H]``; in (0, 1), or up to 2 for keys of length 1.
        qk_l2norm: as in `delta_rule`.
        chunk_size: tokens, of N rows each; None is 64 rows.
        scale and the rest: as in `linear_attention`.

    Returns:
        o ``[B, T, H, V]`` in the dtype of q; with `output_final_state`, the pair (o, final_state).

    Raises:
        InputError, LayoutError: as in `linear_attention`; and InputError for a g above 0 or NaN (looked at on the CPU only).
    """
    q, k = _normed("gated_delta_product", q, k, qk_l2norm)
    return apply_operator("gated_delta_product", q, k, v, {"g": g, "beta": beta}, output_final_state, **options)


def _normed(operator: str, q: Tensor, k: Tensor, qk_l2norm: bool) -> tuple[Tensor, Tensor]:
    """q and k, of length 1 where that is asked for."""
    if not check_flag(operator, "qk_l2norm", qk_l2norm):
        return q, k
    check_tensors(operator, q=q, k=k)
    return unit_length(q), unit_length(k)
