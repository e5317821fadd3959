"""What a long convolution convolves with: taps, a sum of exponentials, or a function of position; and what of it is refused.

Shapes: C channels, K taps, N exponentials of a channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from longspan.checks import check_count, check_not_empty, check_tensor, check_tensors, described
from longspan.dtypes import accumulation_dtype
from longspan.errors import InputError
from longspan.layout import SequenceLayout
from longspan.ops.long_convolution.exponentials import taps_of
from longspan.tracing import has_no_values


@dataclass(frozen=True)
class ExponentialKernel:
    """``h_j = Re Σ_n coefficients_n · e^{j · log_decay_n}`` for every lag j ≥ 0: a linear recurrence with a state of N numbers.

    Args:
        log_decay: ``[C, N]``, at most 0; or complex, with a real part of at most 0: the imaginary part turns, by so many radians
            a token (S4D, arXiv 2206.11893; distilled Hyena filters, arXiv 2310.18780).
        coefficients: ``[C, N]``, real or complex as log_decay is.

    Both are computed with in the dtype of the state, float32 (float64 for float64 inputs), or complex of twice as many bits.
    """

    log_decay: Tensor
    coefficients: Tensor

    def taps(self, num_taps: int) -> Tensor:
        """The first taps, ``[C, num_taps]``, that of the token itself first; differentiable."""
        return taps_of(self.log_decay, self.coefficients, num_taps)


@dataclass(frozen=True)
class FunctionKernel:
    """Taps that a function of position gives, such as a small network's (Hyena, arXiv 2302.10866).

    Args:
        function: called with lags, int64 ``[K]``, 0 for the token itself; and with a `range` of channels. Returns the taps of
            these channels, ``[len(channels), K]``, float32 (float64 for float64 inputs) or in the dtype of x. What it learns
            takes its gradients as anywhere: those on a rank are that rank's share.
        num_taps: K; None is as many as the longest document has tokens.

    A rank asks for the channels that it convolves: all of them by the halo, its share by the all-to-all.
    """

    function: Callable[[Tensor, range], Tensor]
    num_taps: int | None = None


Kernel = Tensor | ExponentialKernel | FunctionKernel


def num_taps_of(kernel: Tensor | FunctionKernel, layout: SequenceLayout) -> int:
    """K."""
    if isinstance(kernel, Tensor):
        return kernel.shape[1]
    if kernel.num_taps is not None:
        return kernel.num_taps
    # A compiled graph would be another one for each number of documents; taps that meet no token are none to the result.
    if not layout.is_packed or torch.compiler.is_compiling():
        return layout.seq_len
    bounds = layout.document_bounds
    return max(stop - start for start, stop in pairwise(bounds))


def taps_for(kernel: Tensor | FunctionKernel, channels: range, num_taps: int, x: Tensor) -> Tensor:
    """The taps ``[len(channels), num_taps]`` of some channels of x ``[B, T, C]``."""
    if isinstance(kernel, Tensor):
        return kernel[channels.start : channels.stop]
    # A rank without channels asks for one and takes none of it, so that the function's parameters have gradients everywhere.
    asked = channels or range(1)
    taps = kernel.function(torch.arange(num_taps, device=x.device), asked)
    check_tensors("long_conv1d", **{"what the kernel's function returns": taps})
    expected = (len(asked), num_taps)
    if tuple(taps.shape) != expected or taps.device != x.device or not _fits(taps, x):
        raise InputError(
            f"long_conv1d: the kernel's function must return taps [channels, lags] = {expected} in {x.dtype} or "
            f"{accumulation_dtype(x.dtype)} on {x.device}; got {tuple(taps.shape)} in {taps.dtype} on {taps.device}. It is called "
            f"with lags [{num_taps}] and {asked}: transpose or convert what it returns"
        )
    return taps[: len(channels)]


def check_kernel(kernel: object, x: Tensor, layout: SequenceLayout, is_continued: bool) -> None:
    """Raise InputError unless `kernel` is one for x ``[B, T, C]``; is_continued: whether an initial state was given."""
    if isinstance(kernel, ExponentialKernel):
        _check_exponentials(kernel, x)
        return
    if isinstance(kernel, FunctionKernel):
        if not callable(kernel.function):
            raise InputError(
                f"long_conv1d: the function of a FunctionKernel must be callable, with lags and a range of channels; got "
                f"{described(kernel.function)}. Pass a function that returns taps [channels, lags]"
            )
        if kernel.num_taps is not None:
            check_count("long_conv1d", "num_taps", kernel.num_taps, "how many lags the function is asked for, or None")
    elif not isinstance(kernel, Tensor):
        raise InputError(
            "long_conv1d takes a kernel that is a tensor of taps [C, K], a longspan.ExponentialKernel or a "
            f"longspan.FunctionKernel; got {described(kernel)}. Wrap a function as longspan.FunctionKernel(function)"
        )
    else:
        _check_taps(kernel, x)
    num_taps = num_taps_of(kernel, layout)
    if not is_continued and num_taps > layout.seq_len:
        cut = "Cut it, kernel[:, :seq_len]"
        if isinstance(kernel, FunctionKernel):
            cut = "Ask the function for no more lags than that, num_taps=seq_len, or leave num_taps out"
        raise InputError(
            f"long_conv1d takes at most as many taps as the sequence has tokens, {layout.seq_len}; got a kernel of {num_taps}: the "
            f"last ones would meet no token. {cut}; or pass the K - 1 tokens before the first one as initial_state, zeros if there "
            "are none"
        )


def _check_taps(taps: Tensor, x: Tensor) -> None:
    check_tensors("long_conv1d", kernel=taps)
    num_channels = x.shape[2]
    if taps.dim() != 2 or taps.shape[0] != num_channels or taps.shape[1] < 1:
        hint = "Pass one row of taps per channel, the token's own first"
        if taps.dim() == 2 and taps.shape[1] == num_channels:
            hint = "It looks like [K, C]: transpose it"
        raise InputError(
            f"long_conv1d takes a kernel [C, K] with C = {num_channels}, as x has, and K at least 1; got "
            f"{tuple(taps.shape)}. {hint}"
        )
    if taps.device != x.device or not _fits(taps, x):
        raise InputError(
            f"long_conv1d takes a kernel in the dtype of x or in {accumulation_dtype(x.dtype)}, on its device; got x {x.dtype} on "
            f"{x.device} and a kernel of {taps.dtype} on {taps.device}. Convert it with kernel.to(x)"
        )


def _fits(taps: Tensor, x: Tensor) -> bool:
    return taps.dtype in (x.dtype, accumulation_dtype(x.dtype))


def _check_exponentials(kernel: ExponentialKernel, x: Tensor) -> None:
    a, c = kernel.log_decay, kernel.coefficients
    for name, z in (("log_decay", a), ("coefficients", c)):
        check_tensor("long_conv1d", name, z)
        is_number = z.is_floating_point() or z.is_complex()
        if not is_number or z.dim() != 2 or z.shape[0] != x.shape[2] or z.device != x.device:
            raise InputError(
                f"long_conv1d: {name} of an ExponentialKernel must be real or complex, [C, N] with C = {x.shape[2]}, on "
                f"{x.device}; got {described(z)} on {z.device}. Expand what is the same for all channels, as with "
                f"{name}.expand({x.shape[2]}, -1)"
            )
        check_not_empty("long_conv1d", name, z, "channel and exponential")
    if a.shape != c.shape or a.is_complex() != c.is_complex():
        raise InputError(
            "long_conv1d: log_decay and coefficients of an ExponentialKernel must have one shape, and both be real or both "
            f"complex; got {described(a)} and {described(c)}. Make a complex one of a real one with torch.complex(x, "
            "torch.zeros_like(x))"
        )
    # On other devices the check would make the host wait; a compiler does not see values.
    if a.device.type == "cpu" and not has_no_values(a):
        largest = (a.detach().real if a.is_complex() else a.detach()).amax()
        if not bool(largest <= 0):
            raise InputError(
                f"long_conv1d: log_decay of an ExponentialKernel must have a real part of at most 0, and not be NaN; its largest "
                f"is {float(largest):g}. Use for example -torch.exp(log_rate)"
            )
