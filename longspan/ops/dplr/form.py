"""The chunk form of a diagonal plus low-rank transition: the delta rule's, with another write phase."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longspan.layout import SequenceLayout
from longspan.ops.delta.call import DeltaCall
from longspan.ops.delta.form import DeltaChunkForm, begin_call
from longspan.ops.delta.write import PhaseLink
from longspan.ops.dplr.write import LowRankWrite
from longspan.ops.gates import LogDecays


def prepare_low_rank(
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decays: LogDecays,
    layout: SequenceLayout,
    chunk_size: int | None,
    writes_apart: bool,
) -> DeltaChunkForm:
    """Begin a call of S_t = (Diag(e^{g_t}) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ; a, b ``[B, T, H, K]``, decays of tokens.

    writes_apart: the form's `write` is given k; otherwise it is not looked at: b is k, and S_t = ... + b_t v_tᵀ.
    """
    g = decays.in_time
    assert g is not None
    num_steps = 2 if writes_apart else 1
    if writes_apart:
        # A token's second row follows its first at once.
        decays = replace(decays, values=torch.stack([g, torch.zeros_like(g)], 2).flatten(1, 2))

    def write(
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        start_states: Tensor | None,
        call: DeltaCall,
        end_pieces: tuple[int, ...],
        link: PhaseLink,
    ) -> tuple[Any, ...]:
        keys = b
        if writes_apart:
            dtype = torch.promote_types(k.dtype, b.dtype)
            repeated = k.repeat_interleave(b.shape[2] // k.shape[2], dim=2)
            keys = torch.stack([b.to(dtype), repeated.to(dtype)], 2).flatten(1, 2)
        written: tuple[Any, ...] = LowRankWrite.apply(keys, v, a, g, start_states, call, end_pieces, link)
        return written

    return DeltaChunkForm(begin_call(b, v, decays, layout, chunk_size, num_steps), decays, write)
