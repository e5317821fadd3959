"""What every launch of a kernel needs: whether Triton is there, how products are formed, which sizes a tile has.

The kernels run on NVIDIA GPUs, and, slowly, on the CPU where Triton was loaded with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

# Below this the kernels take a log decay for its limit: e^{-128} is zero in float32, and sums of a chunk stay exact to 1e-3.
LOWEST_KERNEL_LOG_DECAY = -128.0


_INTERPRETED = bool(triton.knobs.runtime.interpret)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter on the CPU; decided, as Triton does, when they are first imported."""
    return _INTERPRETED


def precision(dtype: torch.dtype) -> str:
    """How `longspan.ops.triton.product.product` multiplies operands of a dtype.

    float32 on tensor cores in three passes, as exact as float32; the others as they are. The interpreter's product takes bfloat16
    for integers, so that there everything is widened first, which changes nothing: products are summed in float32 either way.
    """
    if interpreted():
        return "widened"
    return "float32" if dtype == torch.float32 else "native"


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own, which kernels may call too, costs the host ten times as much."""
    return -(-a // b)


def power_of_2(size: int) -> int:
    """The smallest power of two that is not below `size`, a positive number."""
    return 1 << (size - 1).bit_length()


def tile_size(size: int) -> int:
    """A dimension of a tile that holds `size` numbers: a power of two, 16 at least."""
    return max(16, power_of_2(size))


def strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, token and head of ``x [B, T, H, ...]``."""
    batch, token, head, *_ = x.stride()
    return batch, token, head


def contiguous_rows(x: Tensor) -> Tensor:
    """``x [B, T, H, D]``, copied if the numbers of a head do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Tuned:
    """Launches of an autotuned kernel that remember its choice: asking the autotuner costs the host more than the launch."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._chosen: dict[tuple[Any, ...], dict[str, Any]] = {}

    def launch(self, grid: tuple[int, ...], args: tuple[Any, ...], **constants: Any) -> None:
        """Launch with the settings that were found best for kernels of these constants on the first argument's dtype and device."""
        key = (args[0].dtype, args[0].device, *constants.values())
        chosen = self._chosen.get(key)
        if chosen is None:
            self._kernel[grid](*args, **constants)
            self._chosen[key] = self._kernel.best_config.all_kwargs()
        else:
            self._kernel.fn[grid](*args, **constants, **chosen)


def configs(*choices: tuple[int, int]) -> list[Any]:
    """Choices of (warps, stages) for the autotuner; one alone in the interpreter, which has neither."""
    listed = [triton.Config({}, num_warps=num_warps, num_stages=num_stages) for num_warps, num_stages in choices]
    return listed[:1] if interpreted() else listed
