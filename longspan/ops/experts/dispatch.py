"""Which expert takes which token: tokens in order of their experts, and what the experts gave, in order of the tokens.

Shapes: n tokens, k experts of a token, M = n · k rows, E experts, C channels.

A token that k experts take is k rows. Rows are gathered both ways and never scattered: a token's k results are added in the order
of its choices, which is the same on every run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.dtypes import at_least_float32
from longspan.ops.experts.grouped import Groups


@dataclass(frozen=True)
class Dispatch:
    """The rows of some tokens in order of their experts; those of one expert in order of the tokens. No token is left out.

    choice: int64 ``[M]``, of each row which of the ``n · k`` choices it is, a token's k one behind the other. row: int64
    ``[n, k]``, the row of each choice. groups: the rows of each expert.
    """

    choice: Tensor
    row: Tensor
    groups: Groups

    @classmethod
    def of(cls, chosen: Tensor, num_experts: int, in_one_kernel: bool) -> Dispatch:
        """The rows of tokens that have chosen experts ``[n, k]``, int64 from 0 to E - 1."""
        experts, choice = chosen.flatten().sort(stable=True)
        numbers = torch.arange(num_experts, device=chosen.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        row = torch.empty_like(choice)
        row[choice] = torch.arange(len(choice), device=choice.device)
        return cls(choice, row.view_as(chosen), Groups.of(ends, in_one_kernel))

    @property
    def token(self) -> Tensor:
        """int64 ``[M]``, the token of each row."""
        return self.choice // self.row.shape[1]

    def rows_of_tokens(self, x: Tensor) -> Tensor:
        """``[M, C]`` of ``[n, C]``."""
        return x[self.token]

    def sums_of_tokens(self, rows: Tensor) -> Tensor:
        """``[n, C]``: the sum of each token's k rows, of ``[M, C]``, in float32 at least."""
        total = at_least_float32(rows[self.row[:, 0]])
        for number in range(1, self.row.shape[1]):
            total = total.add_(rows[self.row[:, number]])
        return total
