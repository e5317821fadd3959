"""What stands in for methods of mixers that call no function which could be replaced.

Each is bound to the instance that it replaces a method of, in parallelized models alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import longspan.functional as operators
from longspan.attention.shift import token_shift
from longspan.autocast import without_autocast
from longspan.integrations.transformers.cache import RecordingCache
from longspan.integrations.transformers.call import CALL, ParallelCall, running_call
from longspan.integrations.transformers.fla_methods import FLA_METHODS
from longspan.integrations.transformers.functions import convolution
from longspan.integrations.transformers.mixers import LIGHTNING, RECURRENT_UNIT, TOKEN_SHIFT


def lightning_attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`MiniMaxLightningAttention.forward`: the decay is the module's own ``slope_rate``, which is not retention's formula."""
    call: ParallelCall = kwargs[CALL]
    call.take(LIGHTNING)
    rows, tokens, _ = hidden_states.shape
    qkv = self.act_fn(self.qkv_proj(hidden_states)).reshape(rows, tokens, self.num_attention_heads, 3 * self.head_dim)
    query, key, value = torch.split(qkv, self.head_dim, dim=3)
    remembers = past_key_values is not None
    slot = call.slot(LIGHTNING)
    out = operators.retention(
        query,
        key,
        value,
        -self.slope_rate.detach().flatten(),
        scale=1.0,
        initial_state=slot.before,
        output_final_state=remembers or slot.keeps,
        layout=call.layout,
        exchange=call.options.exchange,
    )
    mixed, state = slot.split(out)
    if state is not None and remembers:
        state = state.to(value.dtype)
        past_key_values.set_linear_cache(self.layer_idx, state)
    normed = self.norm(mixed.reshape(rows, tokens, -1))
    return self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * normed), state if remembers else None


def recurrent_unit(
    self: Any,
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: Tensor | None,
    acc_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    """`RecurrentGemmaRglru._rnn_scan`: a decay per head whose heads are channels, with states of one number.

    Its caller keeps the state that is returned, ``[B, C]``, for decoding. Where a document starts the layout cuts; `reset` is not
    needed for that.
    """
    call = running_call(self)
    call.take(RECURRENT_UNIT)
    x = hidden_states.unsqueeze(-1)
    ones = x.new_ones(*x.shape[:2], 1, 1)
    gate = recurrent_gate.clamp(min=torch.finfo(recurrent_gate.dtype).tiny)
    slot = call.slot(RECURRENT_UNIT)
    # There is no matrix product in the recurrence for autocast to round.
    with without_autocast(x):
        out = operators.simple_gla(
            ones,
            ones,
            x,
            gate.log(),
            scale=1.0,
            initial_state=slot.before,
            output_final_state=call.recorder is not None or slot.keeps,
            layout=call.layout,
            exchange=call.options.exchange,
        )
    scanned, state = slot.split(out)
    kept = None if state is None or call.recorder is None else state.flatten(1).to(acc_dtype)
    return scanned.squeeze(-1), kept


def convolution_of_module(self: Any, x: Tensor) -> Tensor:
    """``nn.Conv1d.forward`` of a depthwise convolution that is padded on both sides and cut to its input by its caller."""
    call = running_call(self)
    if isinstance(call.recorder, RecordingCache) and call.mixer is not None:
        call.recorder.keep_on_module(call.mixer, x, self.kernel_size[0] - 1)
    return convolution(call, x, self.weight.squeeze(1), self.bias)


def shift_of_module(self: Any, x: Tensor) -> Tensor:
    """``nn.ZeroPad2d.forward`` as RWKV uses it: the token before each, zero before the first."""
    call = running_call(self)
    call.take(TOKEN_SHIFT)
    slot = call.slot(TOKEN_SHIFT)
    return slot.split(token_shift(x, initial_state=slot.before, output_final_state=slot.keeps, layout=call.layout))[0]


METHODS: Mapping[str, Callable[..., Any]] = {
    "lightning_attention": lightning_attention,
    "recurrent_unit": recurrent_unit,
    "convolution_of_module": convolution_of_module,
    "shift_of_module": shift_of_module,
    **FLA_METHODS,
}
"""By the name in the table of mixers, what stands in for a method."""
