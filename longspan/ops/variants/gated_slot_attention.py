"""Gated slot attention: M slots of keys and values that decay, and a softmax over the slots (arXiv 2409.07146).

    K̃_t = Diag(e^{g_t}) K̃_{t-1} + s_t k_tᵀ        Ṽ_t = Diag(e^{g_t}) Ṽ_{t-1} + s_t v_tᵀ
    p_t = softmax(scale · K̃_t q_t)                 o_t = Ṽ_tᵀ p_t

The paper's layer has s = 1 − e^g. The state is K̃ and Ṽ beside each other, ``[M, K + V]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.layout import SequenceLayout
from longspan.ops.decay.form import DecayChunkForm
from longspan.ops.gates import DecayKind, Gate, Gates
from longspan.ops.slots.form import SlotChunkForm
from longspan.ops.variants.gla import GLA
from longspan.ops.variants.variant import ChunkForm, Variant


class GatedSlotAttention(Variant):
    """Attention over M slots, each a key and a value that decay together."""

    name = "gated_slot_attention"
    decay = DecayKind.CHANNEL
    gates = (Gate("s", "BTHM"), Gate("g", "BTHM", is_log_decay=True))
    has_slots = True

    def recurrent(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, scale: float, initial_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The definition; gates: s ``[B, T, H, M]``; g ``[B, T, H, M]``, log decays."""
        state, outputs = initial_state, []
        for t in range(q.shape[1]):
            written = gates["s"][:, t, :, :, None] * torch.cat([k[:, t], v[:, t]], dim=-1).unsqueeze(-2)
            state = gates["g"][:, t, :, :, None].exp() * state + written
            keys, values = state.split([k.shape[-1], v.shape[-1]], dim=-1)
            weights = torch.softmax(scale * (keys @ q[:, t, :, :, None]), dim=-2)
            outputs.append((weights.mT @ values).squeeze(-2))
        return torch.stack(outputs, dim=1), state

    def prepare(
        self, k: Tensor, v: Tensor, gates: Gates, layout: SequenceLayout, chunk_size: int | None, backend: str
    ) -> ChunkForm:
        s = gates["s"].to(k.dtype)
        repeats = v.shape[2] // k.shape[2]
        both = torch.cat([k if repeats == 1 else k.repeat_interleave(repeats, dim=2), v], dim=-1)
        of_decay = GLA.prepare(s, both, {"g": gates["g"]}, layout, chunk_size, backend)
        assert isinstance(of_decay, DecayChunkForm)
        return SlotChunkForm(of_decay, s, both)


GATED_SLOT_ATTENTION = GatedSlotAttention()
