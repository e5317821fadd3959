"""How states are exchanged: the name of a topology, and its options."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longspan.errors import InputError
from longspan.plan import Cluster


@dataclass(frozen=True)
class Exchange:
    """How linear layers exchange their states over the ranks of a layout: a topology and its options.

    Args:
        topology: ``"auto"``, or the name of a topology in docs/exchange.md.
        state_dtype: ``torch.bfloat16`` rounds states, and gradients of states, for their way between ranks: half the bytes. Sums
            and transitions keep the dtype of the states. None sends states as they are, in float32 (float64 for float64 inputs).
        num_blocks: into how many blocks a state is cut (``"pipelined"``); None takes what the cost model says.
        cluster: figures of the machines for ``"auto"`` (`longspan.plan.Cluster`); None measures them once per process group.

    Raises:
        InputError: for an unknown topology, an option that the topology does not have, or a value out of range.
    """

    topology: str = "auto"
    state_dtype: torch.dtype | None = None
    num_blocks: int | None = None
    cluster: Cluster | None = None

    def __post_init__(self) -> None:
        if self.state_dtype not in (None, torch.bfloat16):
            raise InputError(
                "state_dtype must be None (states travel in their own dtype, float32 or float64) or torch.bfloat16; "
                f"got {self.state_dtype!r}"
            )
        blocks: object = self.num_blocks
        if blocks is not None and (isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1):
            raise InputError(f"num_blocks must be None or an int of at least 1; got {blocks!r}")
        # Here and not when the first layer runs, so that a misspelled name is reported where it was written. The topologies
        # import this module.
        from longspan.exchange import resolve_topology

        resolve_topology(self)
