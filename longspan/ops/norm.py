"""RMSNorm with an output gate, as linear-attention layers have it behind their operator: `rms_norm_gated`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.checks import check_choice, check_number, check_same_device, check_tensors
from longspan.dtypes import at_least_float32
from longspan.errors import InputError
from longspan.ops.backends import choose_backend, require_gpu, require_package
from longspan.tracing import unseen_by_checkpointing

NORM_BACKENDS = ("torch", "triton")
GATE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}
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
    _check_norm(x, gate, weight, eps, activation)
    return _norm_and_gate(x, gate, weight, eps, activation, backend)


@unseen_by_checkpointing
def _norm_and_gate(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: Activation, backend: str | None
) -> Tensor:
    fits = x.shape[-1] <= MAX_SIZE_OF_KERNELS and not _has_float64(x, gate, weight)
    if choose_backend("rms_norm_gated", NORM_BACKENDS, x, fits, backend) == "triton":
        return _by_kernels(x, gate, weight, eps, activation)
    wide = at_least_float32(x)
    normal = F.rms_norm(wide, weight.shape, weight.to(wide.dtype), eps).to(x.dtype)
    return (normal * GATE_ACTIVATIONS[activation](gate)).to(x.dtype)


def _by_kernels(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: Activation) -> Tensor:
    require_package("triton", "triton", "install it with `pip install 'longspan[triton]'`, or use backend='torch'")
    from longspan.ops.triton.launch import interpreted
    from longspan.ops.triton.norm import gated_norm

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


def _check_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str) -> None:
    check_tensors("rms_norm_gated", x=x, gate=gate, weight=weight)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise InputError(
            f"rms_norm_gated takes x [..., D] with D at least 1; got {tuple(x.shape)}. Leave the call out where there is nothing "
            "to norm"
        )
    if gate.shape != x.shape:
        raise InputError(
            f"rms_norm_gated takes a gate of the shape of x, {tuple(x.shape)}; got {tuple(gate.shape)}. With heads, take "
            "gate.unflatten(-1, (H, D))"
        )
    if tuple(weight.shape) != (x.shape[-1],):
        raise InputError(
            f"rms_norm_gated takes weight [D] = ({x.shape[-1]},); got {tuple(weight.shape)}. One weight serves all heads; scale "
            "heads apart after the call"
        )
    check_same_device("rms_norm_gated", x=x, gate=gate, weight=weight)
    check_number("rms_norm_gated", "eps", eps, at_least=0.0)
    check_choice(
        "rms_norm_gated",
        "activation",
        activation,
        GATE_ACTIVATIONS,
        "For another one, use torch.nn.functional.rms_norm",
    )
