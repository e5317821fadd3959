"""Linear attention with a decay: a constant, or a gate for each head or each channel.

Shapes: B batch rows, T tokens (this rank's tokens where a layout is given), H heads of v, H_k heads of q and k (H a multiple of
H_k), K key size, V value size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Unpack, overload

from torch import Tensor

from longspan.attention.by_name import apply_operator
from longspan.attention.options import BidirectionalOptions, OperatorOptions, takes


@overload
def retention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | Sequence[float], *,
    output_final_state: Literal[False] = ..., **options: Unpack[BidirectionalOptions],
) -> Tensor: ...  # fmt: skip
@overload
def retention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | Sequence[float], *,
    output_final_state: Literal[True], **options: Unpack[BidirectionalOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def retention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | Sequence[float], *,
    output_final_state: bool, **options: Unpack[BidirectionalOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@takes(BidirectionalOptions)
def retention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | Sequence[float], *,
    output_final_state: bool = False, **options: Unpack[BidirectionalOptions],
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Retention: ``S_t = e^{log_decay_h} S_{t-1} + k_t v_tᵀ``, ``o_t = scale · S_tᵀ q_t`` (arXiv 2307.08621, 2401.04658).

    Args:
        log_decay: H numbers, each at most 0: a constant, which takes no gradient. A list, or a tensor ``[H]`` on any device. Give
            ranks on GPUs a list or a tensor on the CPU: `auto` then knows whether states outlive a segment (see `neighbour`), and
            the host never waits to learn it.
        causal: False lets every token read all tokens of its document: ``o_t = scale · Σ_s e^{|t−s| log_decay} (q_t·k_s) v_s``.
        q, k, v and the rest: as in `linear_attention`.

    Returns:
        o ``[B, T, H, V]`` in the dtype of q; with `output_final_state`, the pair (o, final_state).

    Raises:
        InputError, LayoutError: as in `linear_attention`; and InputError for a log_decay above 0, or one that requires a gradient.
    """
    return apply_operator("retention", q, k, v, {"log_decay": log_decay}, output_final_state, **options)


@overload
def simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *,
    output_final_state: Literal[False] = ..., **options: Unpack[OperatorOptions],
) -> Tensor: ...  # fmt: skip
@overload
def simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *,
    output_final_state: Literal[True], **options: Unpack[OperatorOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *,
    output_final_state: bool, **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@takes(OperatorOptions)
def simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *,
    output_final_state: bool = False, **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Simple gated linear attention: ``S_t = e^{g_t} S_{t-1} + k_t v_tᵀ``, ``o_t = scale · S_tᵀ q_t``.

    It is Mamba-2's SSD (arXiv 2405.21060). Computed by PyTorch, outputs and gradients err at most three times as much as token by
    token in the same dtype, for every g from 0 to −inf. Kernels keep to that in bfloat16. In float32 their ∂g has an error of 7e-5
    of its largest value where all g are near −6: they sum it over a whole run of tokens, as a difference of larger numbers;
    where decays leave nothing of a state (g of −1000) ∂g is next to nothing, and has no digits left (relative error up to 0.35).

    Args:
        g: log decays ``[B, T, H]``, at most 0; float32 or float64 (bfloat16 is accepted, at the price of its own rounding).
        q, k, v and the rest: as in `linear_attention`.

    Returns:
        o ``[B, T, H, V]`` in the dtype of q; with `output_final_state`, the pair (o, final_state).

    Raises:
        InputError, LayoutError: as in `linear_attention`; and InputError for a g above 0 or NaN (looked at on the CPU only).
    """
    return apply_operator("simple_gla", q, k, v, {"g": g}, output_final_state, **options)


@overload
def gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *,
    u: Tensor | None = ..., output_final_state: Literal[False] = ..., **options: Unpack[OperatorOptions],
) -> Tensor: ...  # fmt: skip
@overload
def gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *,
    u: Tensor | None = ..., output_final_state: Literal[True], **options: Unpack[OperatorOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *,
    u: Tensor | None = ..., output_final_state: bool, **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@takes(OperatorOptions)
def gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *,
    u: Tensor | None = None, output_final_state: bool = False, **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Gated linear attention: ``S_t = Diag(e^{g_t}) S_{t-1} + k_t v_tᵀ``, ``o_t = scale · S_tᵀ q_t`` (arXiv 2312.06635).

    Precision as of `simple_gla`; the kernels' ∂g in float32 has an error of 4e-5 where all g are near −6.

    Args:
        g: log decays ``[B, T, H, K]``, at most 0; float32 or float64 (bfloat16 is accepted, at the price of its own rounding).
        u: RWKV-6's bonus (arXiv 2404.05892), ``[H, K]``, a parameter that all ranks hold alike; its gradient on a rank
            is that rank's share. A token then reads what was before it, which its own decay has not reached, and itself with this
            weight: ``o_t = scale · (S_{t-1} + Diag(u) k_t v_tᵀ)ᵀ q_t``. In two phases: ``write("gla_with_bonus", ...)``.
        q, k, v and the rest: as in `linear_attention`.

    Returns:
        o ``[B, T, H, V]`` in the dtype of q; with `output_final_state`, the pair (o, final_state).

    Raises:
        InputError, LayoutError: as in `linear_attention`; and InputError for a g above 0 or NaN (looked at on the CPU only).
    """
    operator, gates = ("gla", {"g": g}) if u is None else ("gla_with_bonus", {"g": g, "u": u})
    return apply_operator(operator, q, k, v, gates, output_final_state, **options)
