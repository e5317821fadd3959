"""Softmax attention over a sequence that is split over ranks: the public forms and their checks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from longspan.attention.softmax.all_gather import GatheredMemory
from longspan.errors import InputError, LayoutError
from longspan.layout import SequenceLayout

SoftmaxMethod = Literal["auto", "all_gather"]
SOFTMAX_METHODS: tuple[SoftmaxMethod, ...] = ("auto", "all_gather")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    layout: SequenceLayout | None = None,
    method: SoftmaxMethod = "auto",
) -> Tensor:
    """Exact softmax attention o_i = Σ_j softmax_j(scale · q_i·k_j) v_j of this rank's tokens over the whole sequence.

    Args:
        q: ``[B, T, H, D]``, float64, float32, bfloat16 or float16; T is this rank's number of tokens, or the whole
            length without a layout.
        k, v: ``[B, T, H_kv, D]``, q's dtype; H a multiple of H_kv, query head h uses key head ``h // (H / H_kv)``.
        causal: token i sees tokens up to itself; False: all of its document.
        scale: None is ``D ** -0.5``.
        layout: who holds which tokens, and the documents, which never see each other; None is one device and one
            document.
        method: how the ranks exchange; ``"all_gather"`` (LASP-2, arXiv 2502.07563) gathers keys and values once, and
            ``"auto"`` chooses it.

    Returns:
        ``[B, T, H, D]`` in q's dtype. Every rank must take the same calls in the same order, backward too. Gradients
        are those of the sum over ranks of what each rank backpropagates.

    Raises:
        InputError: for shapes, dtypes, devices or a method that do not fit.
        LayoutError: if T is not the layout's number of local tokens.

    No mask or score tensor is built, and blocks that the causal or document mask removes whole are not computed.
    """
    _check_queries(q, k)
    return write_softmax(k, v, layout=layout, method=method, causal=causal).read(q, scale)


def write_softmax(
    k: Tensor,
    v: Tensor,
    *,
    layout: SequenceLayout | None = None,
    method: SoftmaxMethod = "auto",
    causal: bool = True,
) -> SoftmaxMemory:
    """Start giving every rank the keys and values it needs, without waiting for them.

    Arguments, errors and source as in `softmax_attention`. Whatever runs before ``read`` hides the exchange, and its
    backward hides the backward exchange. One rank exchanges nothing.
    """
    if method not in SOFTMAX_METHODS:
        raise InputError(f"method must be one of {', '.join(SOFTMAX_METHODS)}; got {method!r}")
    _check_keys(k, v)
    if layout is None:
        layout = SequenceLayout.local(k.shape[1])
    layout.check_local_length(k.shape[1], "softmax attention")
    if layout.num_ranks > 1 and layout.group is None:
        raise LayoutError(
            "softmax attention needs a layout with a process group; this one was made by for_rank(), for planning. "
            "Build it as SequenceLayout(seq_len, group)"
        )
    return SoftmaxMemory(k, v, layout, causal)


class SoftmaxMemory:
    """Keys and values on their way to the ranks that need them; `read` attends to them."""

    def __init__(self, k: Tensor, v: Tensor, layout: SequenceLayout, causal: bool) -> None:
        self._k = k
        self._gathered = GatheredMemory(k, v, layout, causal)

    def read(self, q: Tensor, scale: float | None = None) -> Tensor:
        """Attention ``[B, T, H, D]`` of the queries ``[B, T, H, D]`` of this rank's tokens; see `softmax_attention`.

        Raises:
            InputError: if q does not fit the keys that were written.
        """
        _check_queries(q, self._k)
        return self._gathered.attend(q, q.shape[-1] ** -0.5 if scale is None else scale)


def _check_keys(k: Tensor, v: Tensor) -> None:
    if k.dim() != 4 or k.shape != v.shape:
        raise InputError(
            "softmax attention takes k and v of the same shape [B, T, H_kv, D]; "
            f"got k {tuple(k.shape)} and v {tuple(v.shape)}"
        )
    if 0 in k.shape:
        raise InputError(f"softmax attention needs at least one row, token, head and channel; got k {tuple(k.shape)}")
    if k.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise InputError(f"softmax attention takes {names}; got k of {k.dtype}")
    _check_same(k, v, "k", "v")


def _check_queries(q: Tensor, k: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise InputError(
            "softmax attention takes q [B, T, H, D] and k, v [B, T, H_kv, D]; "
            f"got q {tuple(q.shape)} and k {tuple(k.shape)}"
        )
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise InputError(
            "q must have k's batch rows, tokens and head dimension (B, T and D of [B, T, H, D]); "
            f"got q {tuple(q.shape)} and k {tuple(k.shape)}"
        )
    if q.shape[2] == 0 or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise InputError(
            f"the number of query heads must be a multiple of the number of key and value heads; got {q.shape[2]} and "
            f"{k.shape[2]}. Each key head serves an equal number of query heads"
        )
    _check_same(q, k, "q", "k")


def _check_same(x: Tensor, y: Tensor, x_name: str, y_name: str) -> None:
    if x.dtype != y.dtype:
        raise InputError(
            f"q, k and v must have one dtype; got {x_name} of {x.dtype} and {y_name} of {y.dtype}. "
            "Cast them before the call"
        )
    if x.device != y.device:
        raise InputError(f"q, k and v must be on one device; got {x_name} on {x.device} and {y_name} on {y.device}")
