"""RMSNorm with an output gate, as linear-attention layers have it behind their operator: `rms_norm_gated`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.errors import InputError
from longspan.ops.backends import choose_backend, require_gpu, require_package

BACKENDS = ("torch", "triton")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}
MAX_SIZE_OF_KERNELS = 8192

Activation = Literal["silu", "sigmoid"]


def rms_norm_gated(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    activation: Activation = "silu",
    *,
    backend: str | None = None,
) -> Tensor:
    """``x / sqrt(mean(x²) + eps) · weight · act(gate)`` over the last dimension (RMSNorm: arXiv 1910.07467).

    Args:
        x: ``[..., D]``, float64, float32, bfloat16 or float16. With heads, ``[B, T, H, D]`` normalises each by itself.
        gate: the shape of x, any floating dtype.
        weight: ``[D]``, any floating dtype. Its gradient on a rank is that rank's share, like any parameter's.
        eps: added to the mean square.
        activation: of the gate: ``"silu"``, or ``"sigmoid"`` (KDA's, arXiv 2510.26692).
        backend: which code computes: ``"torch"``, plain PyTorch operations on any device; ``"triton"``, one kernel each way for
            NVIDIA GPUs, float32, bfloat16 or float16, D at most 8,192. None is ``"triton"`` where it runs and takes the inputs,
            else ``"torch"``.

    Returns:
        The shape and dtype of x. Mean and quotient are computed in float32 (float64 for float64); the kernel rounds once, the
        PyTorch form after the norm and after the gate.

    Raises:
        InputError: for shapes, dtypes, devices or an activation that do not fit, or a backend that cannot run.
    """
    _check(x, gate, weight, activation)
    fits = x.shape[-1] <= MAX_SIZE_OF_KERNELS and not _has_float64(x, gate, weight)
    if choose_backend("rms_norm_gated", BACKENDS, x, fits, backend) == "triton":
        return _by_kernels(x, gate, weight, eps, activation)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normal = F.rms_norm(wide, weight.shape, weight.to(wide.dtype), eps).to(x.dtype)
    return (normal * ACTIVATIONS[activation](gate)).to(x.dtype)


def _by_kernels(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: Activation) -> Tensor:
    require_package("triton", "triton", "install it with `pip install 'longspan[triton]'`, or use backend='torch'")
    from longspan.ops.triton.gated_norm import gated_norm
    from longspan.ops.triton.launch import interpreted

    require_gpu("triton", x.device, interpreted())
    if x.shape[-1] > MAX_SIZE_OF_KERNELS:
        raise InputError(
            f"rms_norm_gated: backend='triton' takes D up to {MAX_SIZE_OF_KERNELS}; got {x.shape[-1]}. Use backend='torch'"
        )
    if _has_float64(x, gate, weight):
        raise InputError("rms_norm_gated: backend='triton' has no float64. Use backend='torch'")
    out: Tensor = gated_norm(x, gate, weight, eps, activation == "silu")
    return out


def _has_float64(*tensors: Tensor) -> bool:
    return any(x.dtype == torch.float64 for x in tensors)


def _check(x: Tensor, gate: Tensor, weight: Tensor, activation: str) -> None:
    if x.dim() < 1 or not x.dtype.is_floating_point or x.shape[-1] == 0:
        raise InputError(
            f"rms_norm_gated takes a floating x [..., D] with D at least 1; got {tuple(x.shape)} in {x.dtype}"
        )
    if gate.shape != x.shape or gate.device != x.device or not gate.dtype.is_floating_point:
        raise InputError(
            f"rms_norm_gated takes a floating gate of the shape of x, {tuple(x.shape)} on {x.device}; got {tuple(gate.shape)} in "
            f"{gate.dtype} on {gate.device}. With heads, take gate.unflatten(-1, (H, D))"
        )
    if tuple(weight.shape) != (x.shape[-1],) or weight.device != x.device or not weight.dtype.is_floating_point:
        raise InputError(
            f"rms_norm_gated takes a floating weight [D] = ({x.shape[-1]},) on {x.device}; got {tuple(weight.shape)} in "
            f"{weight.dtype} on {weight.device}"
        )
    if activation not in ACTIVATIONS:
        raise InputError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}; got {activation!r}")
