"""Nothing of earlier exchanges is left in the thread that works beside the main one."""

from __future__ import annotations

import torch

from longspan.comm.background import run_beside
from longspan.layout import SequenceLayout, group_of


def drain(layout: SequenceLayout) -> None:
    """Wait until this rank has started all that it sends: what it need not wait for may still lie before it."""
    run_beside(group_of(layout), torch.device("cpu"), lambda group: torch.zeros(0)).wait()
