"""What stands in for methods of flash-linear-attention's modules that call no function which could be replaced.

Each is bound to the instance that it replaces a method of, in parallelized models alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import longspan.functional as operators
from longspan.dtypes import at_least_float32
from longspan.errors import InputError
from longspan.integrations.transformers.call import ParallelCall, running_call
from longspan.integrations.transformers.fla_functions import last_inputs
from longspan.integrations.transformers.functions import convolution, selective_scan, with_state
from longspan.integrations.transformers.losses import LOSS_CALL
from longspan.integrations.transformers.mixers import MAMBA2, ROTARY

COMPUTE_LOSS = "_compute_logits_and_loss"
"""The method by which heads of flash-linear-attention compute their loss."""


def rotary_of_positions(self: Any, q: Tensor, k: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """`RotaryEmbedding.forward`, which counts the tokens that it is given: here each has its position in its document.

    q, k ``[B, T, H, K]``. The angles are those of the module's tables, of this rank's tokens alone.
    """
    if self.scale is not None:
        raise InputError(
            "the rotary embedding scales by the length of its table (XPos, scale_base), which is not supported over ranks. "
            "Build it with scale_base=None"
        )
    call = running_call(self)
    call.take(ROTARY)
    positions = call.layout.document_positions_on(q.device)
    frequencies: Tensor = self.inv_freq
    if not self.pos_idx_in_fp32:
        positions = positions.to(frequencies.dtype)
    else:
        positions = positions.to(torch.float32)
        if frequencies.dtype != torch.float32:
            frequencies = self._compute_inv_freq(device=q.device)
    angles = torch.outer(positions, frequencies)
    cos, sin = angles.cos().to(q.dtype)[:, None], angles.sin().to(q.dtype)[:, None]
    return _rotated(q, cos, sin, self.interleaved), _rotated(k, cos, sin, self.interleaved)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x ``[B, T, H, K]``, of whose channels the first 2 R turn in pairs by cos and sin ``[T, 1, R]``; the rest stay."""
    wide = at_least_float32(x)
    turned, rest = wide.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    pair = (first * cos - second * sin, first * sin + second * cos)
    mixed = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([mixed, rest], dim=-1).to(x.dtype)


def mamba2_of_fla(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    output_attentions: bool | None = False,
    **_: Any,
) -> tuple[Tensor, None, Any]:
    """`Mamba2.forward`: projections, norm and gate are the layer's own."""
    call = running_call(self)
    rows, tokens, _channels = hidden_states.shape
    inner, groups, state = self.intermediate_size, self.n_groups, self.ssm_state_size
    gate, inputs, dt = self.in_proj(hidden_states).split([inner, self.conv_dim, self.num_heads], dim=-1)
    mixed = _convolved(self, call, inputs.transpose(1, 2)).transpose(1, 2)
    x, B, C = mixed.split([inner, groups * state, groups * state], dim=-1)
    out = operators.mamba2(
        x.view(rows, tokens, self.num_heads, self.head_dim),
        dt,
        -torch.exp(at_least_float32(self.A_log)),
        B.view(rows, tokens, groups, state),
        C.view(rows, tokens, groups, state),
        D=self._get_D(),
        dt_bias=self.dt_bias,
        dt_softplus=True,
        dt_limit=tuple(self.dt_limit),
        output_final_state=past_key_values is not None,
        layout=call.layout,
        exchange=call.options.exchange,
    )
    call.take(MAMBA2)
    y, memory = with_state(out)
    if memory is not None:
        _remember(self, past_key_values, memory.mT, inputs)
    y = y.flatten(2)
    y = self.norm(y, gate) if self.rmsnorm else y * self.act(gate)
    return self.out_proj(y.to(hidden_states.dtype)), None, past_key_values


def mamba_of_fla(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    output_attentions: bool | None = False,
    **_: Any,
) -> tuple[Tensor, None, Any]:
    """`Mamba.forward`: projections and gate are the layer's own."""
    call = running_call(self)
    inputs, gate = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)
    mixed = _convolved(self, call, inputs)
    state = self.ssm_state_size
    steps, B, C = self.x_proj(mixed.transpose(1, 2)).split([self.dt_rank, state, state], dim=-1)
    out = selective_scan(
        call,
        mixed,
        self.dt_proj(steps).transpose(1, 2),
        -torch.exp(at_least_float32(self.A_log)),
        B.transpose(1, 2),
        C.transpose(1, 2),
        D=self.D,
        delta_softplus=True,
        return_last_state=past_key_values is not None,
    )
    y, memory = with_state(out)
    if memory is not None:
        _remember(self, past_key_values, memory, inputs.transpose(1, 2))
    y = (y * self.act(gate)).transpose(1, 2)
    return self.out_proj(y.to(hidden_states.dtype)), None, past_key_values


def _remember(layer: Any, cache: Any, state: Tensor, inputs: Tensor) -> None:
    """Hand the state after the prompt's last token, and the inputs ``[B, T, C]`` of the convolution, to what records them."""
    cache.update(
        recurrent_state=state,
        conv_state=last_inputs(inputs, layer.conv1d.kernel_size[0]),
        layer_idx=layer.layer_idx,
        offset=inputs.shape[1],
    )


def _convolved(layer: Any, call: ParallelCall, x: Tensor) -> Tensor:
    """The convolution of a Mamba layer and its activation, ``[B, C, T]``."""
    fused = layer.activation if layer.activation in ("silu", "swish") else None
    y = convolution(call, x, layer.conv1d.weight.squeeze(1), layer.conv1d.bias, fused)
    return y if fused is not None else layer.act(y)


def loss_of_shifted_labels(
    self: Any,
    hidden_states: Tensor,
    labels: Tensor | None = None,
    logits_to_keep: int | Tensor | None = 0,
    *,
    shift_labels: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor | None, Tensor | None]:
    """`_compute_logits_and_loss` of heads: the labels of a parallelized model's call were shifted before the split."""
    compute = getattr(type(self), COMPUTE_LOSS)
    if LOSS_CALL.get() is not None and shift_labels is None:
        labels, shift_labels = None, labels
    found: tuple[Tensor | None, Tensor | None] = compute(
        self, hidden_states, labels, logits_to_keep, shift_labels=shift_labels, **options
    )
    return found


FLA_METHODS: Mapping[str, Callable[..., Any]] = {
    "rotary_of_positions": rotary_of_positions,
    "mamba_of_fla": mamba_of_fla,
    "mamba2_of_fla": mamba2_of_fla,
}
"""By the name in the table of mixers, what stands in for a method."""
