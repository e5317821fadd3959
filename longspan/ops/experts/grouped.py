"""Runs of rows, each multiplied by a matrix of its own.

Shapes: M rows in order of their groups, E groups, K and N widths.

A loop over the groups has to know on the host where they end. PyTorch's `grouped_mm` reads that on the device where it has a
kernel: in bfloat16 on NVIDIA GPUs of compute capability 9.0 and 10.x. Elsewhere it is a loop itself, which reads the ends back in
every product; there a loop is taken that reads them once for all products of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class Groups:
    """E runs of rows, one behind the other, some of them empty.

    ends: int32 ``[E]``, the row behind each run, on the device of the rows. bounds: the same on the host, with a 0 in front; None
    where `grouped_mm` multiplies, and nothing is read back.
    """

    ends: Tensor
    bounds: tuple[int, ...] | None

    @classmethod
    def of(cls, ends: Tensor, in_one_kernel: bool) -> Groups:
        """The runs that end at `ends`; unless one kernel takes all of them, the host waits here for the ends."""
        return cls(ends, None if in_one_kernel else (0, *ends.tolist()))

    def times(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """``[M, N]``: each run of rows ``[M, K]`` times its matrix, of ``[E, K, N]``."""
        if self.bounds is None:
            return F.grouped_mm(rows, matrices, offs=self.ends)
        out = rows.new_empty(len(rows), matrices.shape[-1])
        for group, run in self._runs(self.bounds):
            torch.mm(rows[run], matrices[group], out=out[run])
        return out

    def gram(self, left: Tensor, right: Tensor) -> Tensor:
        """``[E, K, N]``: leftᵀ right of each run, of ``[M, K]`` and ``[M, N]``, zero for an empty one."""
        if self.bounds is None:
            found = F.grouped_mm(left.t(), right, offs=self.ends)
            # Of an empty run the kernel of some GPUs leaves what was in memory (pytorch/pytorch issue 172439).
            is_empty = torch.diff(self.ends, prepend=self.ends.new_zeros(1)) == 0
            return found.masked_fill_(is_empty[:, None, None], 0.0)
        out = left.new_zeros(len(self.ends), left.shape[1], right.shape[1])
        for group, run in self._runs(self.bounds):
            torch.mm(left[run].t(), right[run], out=out[group])
        return out

    def add_gram(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """total ``[E, K, N]`` += `gram`; total may be wider than left and right are."""
        if self.bounds is None:
            total.add_(self.gram(left, right))
            return
        for group, run in self._runs(self.bounds):
            if total.dtype == left.dtype:
                total[group].addmm_(left[run].t(), right[run])
            else:
                total[group].add_(left[run].t() @ right[run])

    @staticmethod
    def _runs(bounds: tuple[int, ...]) -> Iterator[tuple[int, slice]]:
        """The groups that have rows."""
        for group in range(len(bounds) - 1):
            if bounds[group] < bounds[group + 1]:
                yield group, slice(bounds[group], bounds[group + 1])


def takes_one_kernel(rows: Tensor, *widths: int) -> bool:
    """Whether `grouped_mm` has a kernel for rows like these, and matrices between these widths."""
    if rows.device.type != "cuda" or rows.dtype != torch.bfloat16 or torch.version.hip is not None or not len(rows):
        return False
    if any(width * rows.element_size() % _ALIGNMENT_BYTES for width in widths):
        return False
    major, minor = torch.cuda.get_device_capability(rows.device)
    return (major, minor) == (9, 0) or major == 10
