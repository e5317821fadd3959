"""Which code computes an operator: what each backend takes, and which one a call gets that names none.

    torch    plain PyTorch operations; any device, float64 included
    triton   our kernels; NVIDIA GPUs, or Triton's interpreter on the CPU
    fla      the kernels of flash-linear-attention (for the delta rule), if it is installed; NVIDIA GPUs

Nothing heavy is imported here.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from longspan.checks import check_choice
from longspan.errors import InputError

BACKENDS = ("torch", "triton", "fla")

DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "torch": (torch.float64, torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "fla": (torch.float32, torch.bfloat16, torch.float16),
}
MAX_HEAD_SIZE = 256
"""Of the triton and fla backends."""

TRITON_CHUNK_SIZES = (16, 32, 64, 128)


def resolve_backend(
    name: str, backends: tuple[str, ...], k: Tensor, v: Tensor, backend: str | None, chunk_size: int | None
) -> str:
    """The backend of a call of the variant `name`, which has `backends`; k ``[B, T, ..., H_k, K]``, v ``[B, T, ..., H, V]``.

    None is our kernels on an NVIDIA GPU where they take the inputs and Triton is installed, and plain PyTorch elsewhere.

    Raises:
        InputError: for a backend that the variant does not have, or one that does not take the inputs' dtype.
    """
    fits = max(k.shape[-1], v.shape[-1]) <= MAX_HEAD_SIZE and (chunk_size is None or chunk_size in TRITON_CHUNK_SIZES)
    backend = choose_backend(name, backends, k, fits, backend)
    if k.dtype != v.dtype or k.dtype not in DTYPES[backend]:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES[backend])
        with_backend = "" if backend == "torch" else f" with backend={backend!r}"
        raise InputError(
            f"{name} takes q, k and v of one dtype out of {names}{with_backend}; got k {k.dtype} and v {v.dtype}. "
            "Convert them before the call"
        )
    return backend


def choose_backend(name: str, backends: tuple[str, ...], x: Tensor, fits: bool, backend: str | None) -> str:
    """The backend of a call of the operator `name`, which has `backends`, on tensors like x.

    None is our kernels on an NVIDIA GPU where they take x and whatever else there is (`fits`), and Triton is installed; and plain
    PyTorch elsewhere.

    Raises:
        InputError: for a backend that the operator does not have.
    """
    if backend is None:
        takes = "triton" in backends and fits and x.device.type == "cuda" and torch.version.hip is None
        backend = "triton" if takes and x.dtype in DTYPES["triton"] and find_spec("triton") is not None else "torch"
    check_choice(name, "backend", backend, backends, "Leave it out for the fastest that takes the inputs", or_none=True)
    return backend


def require_gpu(backend: str, device: torch.device, interpreted: bool) -> None:
    """Raise InputError unless kernels run on `device`: a GPU, or the CPU where Triton is `interpreted`."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        raise InputError(
            f"backend={backend!r} runs on NVIDIA GPUs; the tensors are on {device}. Use backend='torch' there, or set "
            "TRITON_INTERPRET=1 before Python starts to try the kernels on the CPU, slowly"
        )


def require_package(backend: str, package: str, remedy: str) -> None:
    """Raise InputError unless `package` is installed."""
    if find_spec(package) is None:
        raise InputError(f"backend={backend!r} needs the package {package!r}, which is not installed: {remedy}")
