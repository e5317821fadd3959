"""Peak rates of devices, as their makers state them: dense matrix products, in floating-point operations per second."""

from __future__ import annotations

import re

import torch

_T = 1e12

# float32 is that of the plain units: PyTorch computes float32 products without TF32 unless it is told otherwise.
# "H100 PCIe" before "H100", which it is as well.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    # name, bfloat16, float32
    ("GB200", 2500 * _T, 80 * _T),
    ("B200", 2250 * _T, 75 * _T),
    ("B100", 1750 * _T, 60 * _T),
    ("H200", 989 * _T, 67 * _T),
    ("H100 PCIe", 756 * _T, 51 * _T),
    ("H100 NVL", 835 * _T, 60 * _T),
    ("H100", 989 * _T, 67 * _T),
    ("GH200", 989 * _T, 67 * _T),
    ("A100", 312 * _T, 19.5 * _T),
    ("A10G", 70 * _T, 35 * _T),
    ("A10", 125 * _T, 31.2 * _T),
    ("L40S", 362 * _T, 91.6 * _T),
    ("L4", 121 * _T, 30.3 * _T),
    ("MI300X", 1307 * _T, 163.4 * _T),
    ("MI250X", 383 * _T, 47.9 * _T),
)


def stated_peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Operations per second that the maker states for products of `dtype`; None for a device or dtype that is not listed.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it.
        dtype: of the operands, bfloat16 or float32.
    """
    if dtype not in (torch.bfloat16, torch.float32):
        return None
    for name, bfloat16, float32 in _PEAKS:
        # As a word: an L40 is no L4, and an RTX A1000 no A100.
        if re.search(rf"\b{name}\b", device_name):
            return bfloat16 if dtype == torch.bfloat16 else float32
    return None
