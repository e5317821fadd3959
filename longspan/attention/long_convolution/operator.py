"""A causal convolution with a kernel as long as the sequence, whose tokens are split over ranks: `long_conv1d`."""

from __future__ import annotations

from typing import Literal, TypedDict, Unpack, overload

from torch import Tensor

from longspan.attention.convolution import check_initial_state, check_tokens
from longspan.attention.long_convolution.kernels import (
    ExponentialKernel,
    Kernel,
    check_kernel,
    num_taps_of,
    taps_for,
)
from longspan.attention.long_convolution.opaque import EXPONENTIALS, LONG_CONVOLUTION, state_dtype
from longspan.attention.long_convolution.recurrence import convolve_exponentials
from longspan.attention.long_convolution.taps import METHODS, Method, chosen, convolve_taps
from longspan.attention.one_state import state_of_last, states_of_documents
from longspan.attention.opaque import bounds_of
from longspan.autocast import as_in_product
from longspan.checks import check_choice, check_flag, check_tensor, described
from longspan.errors import InputError
from longspan.exchange import Exchanger, exchange_named
from longspan.layout import SequenceLayout
from longspan.layout.calls import stops_graphs
from longspan.tracing import has_no_values, outside_graphs


class LongConvOptions(TypedDict, total=False):
    """What `long_conv1d` takes beside x, the kernel and `output_final_state`: for its overloads."""

    initial_state: Tensor | None
    layout: SequenceLayout | None
    method: Method
    exchange: str | Exchanger


@overload
def long_conv1d(
    x: Tensor, kernel: Kernel, *, output_final_state: Literal[False] = ..., **options: Unpack[LongConvOptions],
) -> Tensor: ...  # fmt: skip
@overload
def long_conv1d(
    x: Tensor, kernel: Kernel, *, output_final_state: Literal[True], **options: Unpack[LongConvOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def long_conv1d(
    x: Tensor, kernel: Kernel, *, output_final_state: bool, **options: Unpack[LongConvOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def long_conv1d(
    x: Tensor,
    kernel: Kernel,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    layout: SequenceLayout | None = None,
    method: Method = "auto",
    exchange: str | Exchanger = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution ``y_t = Σ_j h_j · x_{t-j}`` over the tokens of t's document, with h of any length.

    The global convolution of Hyena (arXiv 2302.10866), of StripedHyena, and of CHELA (arXiv 2406.08128).

    Args:
        x: ``[B, T, C]``, float64, float32 or bfloat16; T is this rank's number of tokens, or the whole length without a layout.
            Under torch.autocast it is cast as the input of a matrix product is, and a kernel is not.
        kernel: h, the same on every rank. Its gradient on a rank is that rank's share: sum it over the ranks, like any
            parameter's.

            - taps ``[C, K]``, the token's own **first** (the weight of `causal_conv1d` is ``kernel.flip(1)``), K at most the
              length of the sequence; in the dtype of x, or float32 (float64 for float64);
            - `longspan.ExponentialKernel`: a sum of exponentials, of any length, computed as the linear recurrence that it is;
            - `longspan.FunctionKernel`: a function of position, called for the channels that a rank convolves.
        initial_state: what stands before the first global token, or before each document (one for all where the layout
            `continues` a sequence); the same on every rank, its gradient a
            rank's share; None is zeros. Of taps and functions the K − 1 tokens before, ``[B, K-1, C]`` or ``[D, K-1, C]``, the
            oldest first, in the dtype of x; a kernel may then be longer than the sequence. Of exponentials their state, ``[B, C,
            N]`` or ``[D, C, N]``, S_t,n = Σ_j e^{j · log_decay_n} x_{t-j}, float32 (float64 for float64), complex if they are. A
            function without num_taps has no initial state: its K is another for every length.
        output_final_state: also return that of what follows, on every rank.
        layout: which tokens this rank holds, and the documents, which never see each other; None is one device and one document.
            With documents, B is 1.
        method: of taps and functions, how ranks share the work. ``"halo"``: each convolves its own tokens, and is sent the K − 1
            before each of its segments. ``"all_to_all"``: each convolves all tokens of C / P channels (C need not be divisible).
            ``"auto"``: what sends less.
        exchange: of exponentials, how states travel: as in `longspan.linear_attention`.

    Returns:
        y ``[B, T, C]`` in the dtype of x, computed in float32 (float64); with `output_final_state`, the pair (y, final_state),
        shaped like `initial_state`. Its gradient is the sum of what every rank sends back. Ranks may let y, the final state or
        both enter their losses.

    Up to 32 taps are multiplied one after another, more by Fourier transforms: errors are then of the size of the largest y
    of the document, a later token may change how an earlier one is rounded, and a NaN or infinity reaches all tokens of its
    document and channel. A recurrence and a few taps have no such reach.

    Every rank must take the same calls in the same order, backward too; x must take a gradient on all ranks or on none.

    Raises:
        InputError: for shapes, dtypes, devices or options that do not fit, a kernel longer than the sequence, or exponents above
        0. LayoutError: if T is not the layout's number of local tokens, or the layout has ranks but no process group.
    """
    if stops_graphs(layout):
        return _convolve_outside_graphs(
            x, kernel, initial_state=initial_state, output_final_state=output_final_state, layout=layout, method=method,
            exchange=exchange,
        )  # fmt: skip
    check_tensor("long_conv1d", "x", x)
    x = as_in_product(x)
    layout = check_tokens(x, layout, "long_conv1d")
    check_flag("long_conv1d", "output_final_state", output_final_state)
    check_kernel(kernel, x, layout, initial_state is not None or bool(layout.continues))
    check_choice("long_conv1d", "method", method, METHODS, "Leave it out for 'auto'")
    exchanger = exchange_named(exchange)
    if isinstance(kernel, ExponentialKernel):
        if method != "auto":
            raise InputError(
                f"long_conv1d: method is for taps and functions; got method={method!r} with an ExponentialKernel, whose state "
                "travels by `exchange`. Leave method out, or pass kernel.taps(num_taps)"
            )
        _check_state(initial_state, x, kernel, layout)
        initial_state = states_of_documents(initial_state, layout)
        if has_no_values(x):
            bounds = bounds_of(layout, x)
            y, state = EXPONENTIALS(x, kernel.log_decay, kernel.coefficients, initial_state, bounds, output_final_state)
            return (y, state_of_last(state, layout)) if output_final_state else y
        return convolve_exponentials(x, kernel, initial_state, layout, exchanger, output_final_state)
    if exchange != "auto":
        raise InputError(
            f"long_conv1d: exchange is for exponentials, whose state travels; got exchange={exchange!r} with taps. Say how ranks "
            "share the work with method='halo' or method='all_to_all'"
        )
    num_taps = num_taps_of(kernel, layout)
    if not isinstance(kernel, Tensor) and kernel.num_taps is None and (initial_state is not None or output_final_state):
        raise InputError(
            "long_conv1d: a FunctionKernel without num_taps has as many taps as the longest document, and no state that would fit "
            "another call; got an initial_state, or output_final_state=True. Give it num_taps"
        )
    initial_state = as_in_product(initial_state)
    check_initial_state("long_conv1d", initial_state, x, (num_taps - 1,), "the K - 1 tokens before", layout, "K-1")
    initial_state = states_of_documents(initial_state, layout)
    if has_no_values(x):
        taps = taps_for(kernel, range(x.shape[2]), num_taps, x)
        y, state = LONG_CONVOLUTION(x, taps, initial_state, bounds_of(layout, x), output_final_state)
        return (y, state_of_last(state, layout)) if output_final_state else y
    method = chosen(method, layout, num_taps)
    return convolve_taps(x, kernel, num_taps, initial_state, layout, method, output_final_state)


_convolve_outside_graphs = outside_graphs(long_conv1d)


def _check_state(initial_state: Tensor | None, x: Tensor, kernel: ExponentialKernel, layout: SequenceLayout) -> None:
    if initial_state is None:
        return
    check_tensor("long_conv1d", "initial_state", initial_state)
    rows, first = (layout.num_documents, "num_documents") if layout.has_document_states else (x.shape[0], "B")
    expected, dtype = (rows, *kernel.log_decay.shape), state_dtype(x, kernel.log_decay)
    fits = initial_state.dtype == dtype and initial_state.device == x.device
    if tuple(initial_state.shape) != expected or not fits:
        raise InputError(
            f"long_conv1d: initial_state of an ExponentialKernel must be its state, [{first}, C, N] = {expected} in {dtype} on "
            f"{x.device}; got {described(initial_state)} on {initial_state.device}. It is what output_final_state=True returns"
        )
