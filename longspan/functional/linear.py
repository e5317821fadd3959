"""Linear attention without a decay.

Shapes: B batch rows, T tokens (this rank's tokens where a layout is given), H heads of v, H_k heads of q and k (H a multiple of
H_k), K key size, V value size.
"""

from __future__ import annotations

from typing import Literal, Unpack, overload

from torch import Tensor

from longspan.attention.by_name import apply_operator
from longspan.attention.options import BidirectionalOptions, takes


@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    output_final_state: Literal[False] = ..., **options: Unpack[BidirectionalOptions],
) -> Tensor: ...  # fmt: skip
@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    output_final_state: Literal[True], **options: Unpack[BidirectionalOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    output_final_state: bool, **options: Unpack[BidirectionalOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@takes(BidirectionalOptions)
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    output_final_state: bool = False, **options: Unpack[BidirectionalOptions],
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
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
    return apply_operator("linear_attention", q, k, v, {}, output_final_state, **options)
