"""The public operators, one a piece of mathematics, and the two-phase form that serves them all.

Shapes: B batch rows, T tokens (this rank's tokens where a layout is given), H heads of v, H_k heads of q and k (H a multiple of
H_k), K key size, V value size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Unpack, overload

from torch import Tensor

from longspan.attention.by_name import BidirectionalOptions, OperatorOptions, Schedule, apply_operator, write
from longspan.attention.hgrn2 import hgrn2
from longspan.attention.mamba2 import mamba2
from longspan.attention.normalized import normalized_linear_attention, write_normalized
from longspan.attention.rwkv7 import rwkv7
from longspan.attention.selective_scan import selective_scan
from longspan.checks import check_flag, check_tensors
from longspan.exchange import Exchanger
from longspan.features import unit_length
from longspan.layout import SequenceLayout

__all__ = [
    "comba",
    "delta_rule",
    "dplr_delta_rule",
    "gated_delta_product",
    "gated_delta_rule",
    "gla",
    "hgrn2",
    "kda",
    "linear_attention",
    "mamba2",
    "normalized_linear_attention",
    "retention",
    "rwkv7",
    "selective_scan",
    "simple_gla",
    "write",
    "write_normalized",
]


@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    output_final_state: Literal[False] = ...,
    **options: Unpack[BidirectionalOptions],
) -> Tensor: ...


@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, output_final_state: Literal[True], **options: Unpack[BidirectionalOptions]
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, output_final_state: bool, **options: Unpack[BidirectionalOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    layout: SequenceLayout | None = None,
    exchange: str | Exchanger = "auto",
    schedule: Schedule = "auto",
    backend: str | None = None,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Basic linear attention: ``S_t = S_{t-1} + k_t v_tᵀ``, ``o_t = scale · S_tᵀ q_t`` (arXiv 2006.16236).

    Args:
        q, k: ``[B, T, H_k, K]``, float64, float32 or bfloat16.
        v: ``[B, T, H, V]``, the same dtype. Under torch.autocast q, k and v are cast as the inputs of a matrix product are; gates
            and states are not.
        scale: a number; None is K^-½.
        causal: False lets every token read all tokens of its document: ``o_t = scale · Σ_s (q_t·k_s) v_s``.
        initial_state: state before the first global token, ``[B, H, K, V]``, or before each document,
            ``[num_documents, H, K, V]`` (one for all where the layout `continues` a sequence); float32 (float64 for float64
            inputs); the same on every rank. Its gradient on a rank is that rank's share: sum it over the ranks, like a parameter's.
        output_final_state: also return the state after the last global token (of each document), on every rank.
        layout: which tokens this rank holds; None is one device. With documents, B is 1.
        exchange: how states travel between ranks: ``"auto"``, the cheapest by a cost model; the name of a topology
            (``"all_gather"``, ``"ring"``, ``"pipelined"``, ``"all_to_all"``, ``"two_level"``, ``"neighbour"``: docs/exchange.md);
            or a topology with options, such as ``longspan.exchange.Ring(state_dtype=torch.bfloat16)``. With ``causal=False``
            the sum of all states is wanted, not a prefix: it is an all-reduce, of states in their own dtype, in any case.
        schedule: what this rank computes while its states travel. ``"fused"``: nothing, and then all that tokens read in one
            pass. ``"overlapped"``: what tokens read inside their chunks (LASP-2's own order, arXiv 2502.07563), and then what they
            read of states, in a second pass over the outputs; the delta rules compute their scores meanwhile, in either order.
            ``"auto"``: overlapped where that is faster by the cost model (`longspan.plan.overlap_pays`), as on slow links with few
            tokens per rank. On one rank all are the fused one. In two phases (`longspan.write`), what stands between them hides
            the exchange, and ``read`` is fused.
        backend: which code computes: ``"torch"``, plain PyTorch operations on any device; ``"triton"``, our kernels, for
            `linear_attention`, `retention`, `simple_gla` and `gla` on NVIDIA GPUs; ``"fla"``, the kernels of
            flash-linear-attention where it is installed, for `delta_rule`, `gated_delta_rule` and `kda` on GPUs. The last two take
            float32 (but not `delta_rule`), bfloat16 and float16. None is ``"triton"`` where the operator has it and it takes the
            inputs, else ``"torch"``.
        chunk_size: tokens computed together inside a device; None picks by dtype.

    Returns:
        o ``[B, T, H, V]`` in the dtype of q; with `output_final_state`, the pair (o, final_state).

    Raises:
        InputError: for shapes, dtypes or options that do not fit, or a backend that cannot run.
        LayoutError: for another number of tokens than the layout's.
    """
    return apply_operator(
        "linear_attention", q, k, v, {}, scale, output_final_state, causal=causal,
        initial_state=initial_state, layout=layout, exchange=exchange, schedule=schedule, backend=backend, chunk_size=chunk_size,
    )  # fmt: skip


@overload
def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | Sequence[float],
    *,
    output_final_state: Literal[False] = ...,
    **options: Unpack[BidirectionalOptions],
) -> Tensor: ...


@overload
def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | Sequence[float],
    *,
    output_final_state: Literal[True],
    **options: Unpack[BidirectionalOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | Sequence[float],
    *,
    output_final_state: bool,
    **options: Unpack[BidirectionalOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | Sequence[float],
    *,
    scale: float | None = None,
    causal: bool = True,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    layout: SequenceLayout | None = None,
    exchange: str | Exchanger = "auto",
    schedule: Schedule = "auto",
    backend: str | None = None,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
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
    return apply_operator(
        "retention", q, k, v, {"log_decay": log_decay}, scale, output_final_state, causal=causal,
        initial_state=initial_state, layout=layout, exchange=exchange, schedule=schedule, backend=backend, chunk_size=chunk_size,
    )  # fmt: skip


@overload
def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    output_final_state: Literal[False] = ...,
    **options: Unpack[OperatorOptions],
) -> Tensor: ...


@overload
def simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, output_final_state: Literal[True], **options: Unpack[OperatorOptions]
) -> tuple[Tensor, Tensor]: ...


@overload
def simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, output_final_state: bool, **options: Unpack[OperatorOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    layout: SequenceLayout | None = None,
    exchange: str | Exchanger = "auto",
    schedule: Schedule = "auto",
    backend: str | None = None,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
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
    return apply_operator(
        "simple_gla", q, k, v, {"g": g}, scale, output_final_state,
        initial_state=initial_state, layout=layout, exchange=exchange, schedule=schedule, backend=backend, chunk_size=chunk_size,
    )  # fmt: skip


@overload
def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    u: Tensor | None = ...,
    output_final_state: Literal[False] = ...,
    **options: Unpack[OperatorOptions],
) -> Tensor: ...


@overload
def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    u: Tensor | None = ...,
    output_final_state: Literal[True],
    **options: Unpack[OperatorOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    u: Tensor | None = ...,
    output_final_state: bool,
    **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    u: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    layout: SequenceLayout | None = None,
    exchange: str | Exchanger = "auto",
    schedule: Schedule = "auto",
    backend: str | None = None,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Gated linear attention: ``S_t = Diag(e^{g_t}) S_{t-1} + k_t v_tᵀ``, ``o_t = scale · S_tᵀ q_t`` (arXiv 2312.06635).

    Precision as of `simple_gla`; the kernels' ∂g in float32 has an error of 4e-5 where all g are near −6.

    Args:
        g: log decays ``[B, T, H, K]``, at most 0; float32 or float64 (bfloat16 is accepted, at the price of its own rounding).
        u: RWKV-6's bonus (arXiv 2404.05892, section 4), ``[H, K]``, a parameter that all ranks hold alike; its gradient on a rank
            is that rank's share. A token then reads what was before it, which its own decay has not reached, and itself with this
            weight: ``o_t = scale · (S_{t-1} + Diag(u) k_t v_tᵀ)ᵀ q_t``. In two phases: ``write("gla_with_bonus", ...)``.
        q, k, v and the rest: as in `linear_attention`.

    Returns:
        o ``[B, T, H, V]`` in the dtype of q; with `output_final_state`, the pair (o, final_state).

    Raises:
        InputError, LayoutError: as in `linear_attention`; and InputError for a g above 0 or NaN (looked at on the CPU only).
    """
    operator, gates = ("gla", {"g": g}) if u is None else ("gla_with_bonus", {"g": g, "u": u})
    return apply_operator(
        operator, q, k, v, gates, scale, output_final_state,
        initial_state=initial_state, layout=layout, exchange=exchange, schedule=schedule, backend=backend, chunk_size=chunk_size,
    )  # fmt: skip


@overload
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    qk_l2norm: bool = ...,
    output_final_state: Literal[False] = ...,
    **options: Unpack[OperatorOptions],
) -> Tensor: ...


@overload
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    qk_l2norm: bool = ...,
    output_final_state: Literal[True],
    **options: Unpack[OperatorOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    qk_l2norm: bool = ...,
    output_final_state: bool,
    **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    qk_l2norm: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    layout: SequenceLayout | None = None,
    exchange: str | Exchanger = "auto",
    schedule: Schedule = "auto",
    backend: str | None = None,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
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
    return apply_operator(
        "delta_rule", q, k, v, {"beta": beta}, scale, output_final_state,
        initial_state=initial_state, layout=layout, exchange=exchange, schedule=schedule, backend=backend, chunk_size=chunk_size,
    )  # fmt: skip


@overload
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    qk_l2norm: bool = ...,
    output_final_state: Literal[False] = ...,
    **options: Unpack[OperatorOptions],
) -> Tensor: ...


@overload
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    qk_l2norm: bool = ...,
    output_final_state: Literal[True],
    **options: Unpack[OperatorOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    qk_l2norm: bool = ...,
    output_final_state: bool,
    **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    qk_l2norm: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    layout: SequenceLayout | None = None,
    exchange: str | Exchanger = "auto",
    schedule: Schedule = "auto",
    backend: str | None = None,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
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
    return apply_operator(
        "gated_delta_rule", q, k, v, {"g": g, "beta": beta}, scale, output_final_state,
        initial_state=initial_state, layout=layout, exchange=exchange, schedule=schedule, backend=backend, chunk_size=chunk_size,
    )  # fmt: skip


@overload
def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    qk_l2norm: bool = ...,
    output_final_state: Literal[False] = ...,
    **options: Unpack[OperatorOptions],
) -> Tensor: ...


@overload
def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    qk_l2norm: bool = ...,
    output_final_state: Literal[True],
    **options: Unpack[OperatorOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    qk_l2norm: bool = ...,
    output_final_state: bool,
    **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    qk_l2norm: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    layout: SequenceLayout | None = None,
    exchange: str | Exchanger = "auto",
    schedule: Schedule = "auto",
    backend: str | None = None,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
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
    return apply_operator(
        "kda", q, k, v, {"g": g, "beta": beta}, scale, output_final_state,
        initial_state=initial_state, layout=layout, exchange=exchange, schedule=schedule, backend=backend, chunk_size=chunk_size,
    )  # fmt: skip


@overload
def gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    qk_l2norm: bool = ...,
    output_final_state: Literal[False] = ...,
    **options: Unpack[OperatorOptions],
) -> Tensor: ...


@overload
def gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    qk_l2norm: bool = ...,
    output_final_state: Literal[True],
    **options: Unpack[OperatorOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    qk_l2norm: bool = ...,
    output_final_state: bool,
    **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...


def gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    qk_l2norm: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    layout: SequenceLayout | None = None,
    exchange: str | Exchanger = "auto",
    schedule: Schedule = "auto",
    backend: str | None = None,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The gated delta rule with N steps per token: a decay times a product of N generalized Householder matrices.

    ``S_{t,0} = e^{g_t} S_{t-1}``, ``S_{t,n} = (I − β_{t,n} k_{t,n} k_{t,n}ᵀ) S_{t,n-1} + β_{t,n} k_{t,n} v_{t,n}ᵀ``, and after the
    last step ``o_t = scale · S_{t,N}ᵀ q_t``. Gated DeltaProduct (arXiv 2502.10297, section 3); DeltaProduct is g = 0, and N = 1 is
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
    return apply_operator(
        "gated_delta_product", q, k, v, {"g": g, "beta": beta}, scale, output_final_state,
        initial_state=initial_state, layout=layout, exchange=exchange, schedule=schedule, backend=backend, chunk_size=chunk_size,
    )  # fmt: skip


@overload
def dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    *,
    output_final_state: Literal[False] = ...,
    **options: Unpack[OperatorOptions],
) -> Tensor: ...


@overload
def dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    *,
    output_final_state: Literal[True],
    **options: Unpack[OperatorOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    *,
    output_final_state: bool,
    **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...


def dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    layout: SequenceLayout | None = None,
    exchange: str | Exchanger = "auto",
    schedule: Schedule = "auto",
    backend: str | None = None,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
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
    return apply_operator(
        "dplr_delta_rule", q, k, v, {"a": a, "b": b, "g": g}, scale, output_final_state,
        initial_state=initial_state, layout=layout, exchange=exchange, schedule=schedule, backend=backend, chunk_size=chunk_size,
    )  # fmt: skip


@overload
def comba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    output_final_state: Literal[False] = ...,
    **options: Unpack[OperatorOptions],
) -> Tensor: ...


@overload
def comba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    output_final_state: Literal[True],
    **options: Unpack[OperatorOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def comba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    output_final_state: bool,
    **options: Unpack[OperatorOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...


def comba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    layout: SequenceLayout | None = None,
    exchange: str | Exchanger = "auto",
    schedule: Schedule = "auto",
    backend: str | None = None,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The delta rule with its own feedback: ``S_t = e^{g_t} S_{t-1} + β_t k_t (v_t − S_{t-1}ᵀ p_t)ᵀ``, ``o_t = scale · S_tᵀ q_t``.

    Comba (arXiv 2506.02475), whose transition is a scalar plus a matrix of rank 1. p reads the state before the token's decay.
    Precision as of `dplr_delta_rule`.

    Args:
        p: what reads that which a token takes off, ``[B, T, H, K]``, in any of the dtypes; Comba's is b ⊙ k with b learned.
        g: log decays ``[B, T, H]``, at most 0; float32 or float64 (bfloat16 is accepted, at the price of its own rounding).
        beta: how strongly a token writes, ``[B, T, H]``.
        q, k, v and the rest: as in `linear_attention`; Comba reads with q − d k, d learned.

    Returns:
        o ``[B, T, H, V]`` in the dtype of q; with `output_final_state`, the pair (o, final_state).

    Raises:
        InputError, LayoutError: as in `linear_attention`; and InputError for a g above 0 or NaN (looked at on the CPU only).
    """
    return apply_operator(
        "comba", q, k, v, {"p": p, "g": g, "beta": beta}, scale, output_final_state,
        initial_state=initial_state, layout=layout, exchange=exchange, schedule=schedule, backend=backend, chunk_size=chunk_size,
    )  # fmt: skip


def _normed(operator: str, q: Tensor, k: Tensor, qk_l2norm: bool) -> tuple[Tensor, Tensor]:
    """q and k, of length 1 where that is asked for."""
    if not check_flag(operator, "qk_l2norm", qk_l2norm):
        return q, k
    check_tensors(operator, q=q, k=k)
    return unit_length(q), unit_length(k)
