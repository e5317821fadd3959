"""What stands in for the kernels of Transformers' modeling files: the same arguments, on this rank's tokens.

Shapes: B rows, T tokens of this rank, H heads, C channels, N the size of a state, P the channels of a head. Convolutions and
selective scans are given ``[B, C, T]``, the others ``[B, T, H, ...]``. Arguments that only a kernel needs are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import longspan.functional as operators
from longspan.attention.convolution import causal_conv1d
from longspan.attention.shift import token_shift
from longspan.autocast import without_autocast
from longspan.errors import InputError
from longspan.exchange.all_reduce import max_over_ranks
from longspan.integrations.transformers.call import ParallelCall
from longspan.integrations.transformers.mixers import CONVOLUTION, GATED_DELTA, KIMI_DELTA, MAMBA2, RWKV, SELECTIVE_SCAN


def convolution(
    call: ParallelCall,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> Tensor:
    """Depthwise causal convolution: ``[B, C, T]``, weight ``[C, W]``."""
    call.take(CONVOLUTION)
    x = hidden_states.transpose(1, 2)
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    slot = call.slot(CONVOLUTION)
    found = causal_conv1d(
        x, weight, bias, activation, call.layout, initial_state=slot.before, output_final_state=slot.keeps
    )
    return slot.split(found)[0].transpose(1, 2)


def gated_delta_rule(call: ParallelCall, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule: q, k ``[B, T, H_k, K]``, v ``[B, T, H, V]``, g and beta ``[B, T, H]``."""
    call.take(GATED_DELTA)
    return _delta_rule(call, GATED_DELTA, operators.gated_delta_rule, *args, **kwargs)


def kimi_delta_attention(call: ParallelCall, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Kimi delta attention: as the gated delta rule, g ``[B, T, H, K]``."""
    call.take(KIMI_DELTA)
    return _delta_rule(call, KIMI_DELTA, operators.kda, *args, **kwargs)


def _delta_rule(
    call: ParallelCall,
    name: str,
    operator: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    slot = call.slot(name)
    out = operator(
        query,
        key,
        value,
        g,
        beta.to(query.dtype),
        qk_l2norm=use_qk_l2norm_in_kernel,
        initial_state=initial_state if slot.before is None else slot.before,
        output_final_state=output_final_state or slot.keeps,
        layout=call.layout,
        exchange=call.options.exchange,
    )
    return slot.split(out)


def mamba2_scan(
    call: ParallelCall,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None = None,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    z: Tensor | None = None,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2's scan: x ``[B, T, H, P]``, dt ``[B, T, H]``, B and C ``[B, T, G, N]``; states ``[B, H, P, N]``, not as ours."""
    call.take(MAMBA2)
    slot = call.slot(MAMBA2)
    before = slot.before
    if before is None and initial_states is not None:
        before = initial_states.transpose(-1, -2)
    out = operators.mamba2(
        hidden_states,
        dt,
        A,
        B.to(hidden_states.dtype),
        C.to(hidden_states.dtype),
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        initial_state=before,
        output_final_state=return_final_states or slot.keeps,
        layout=call.layout,
        exchange=call.options.exchange,
    )
    y, state = slot.split(out)
    return (y, state.transpose(-1, -2)) if return_final_states and state is not None else y


def selective_scan(
    call: ParallelCall,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's selective scan: x, dt, z ``[B, C, T]``, A ``[C, N]``, B and C ``[B, N, T]``; states ``[B, C, N]``."""
    call.take(SELECTIVE_SCAN)
    slot = call.slot(SELECTIVE_SCAN)
    x = hidden_states.transpose(1, 2)
    # There is no matrix product in the recurrence for autocast to round.
    with without_autocast(x):
        out = operators.selective_scan(
            x,
            dt.transpose(1, 2),
            A,
            B.transpose(1, 2).to(x.dtype),
            C.transpose(1, 2).to(x.dtype),
            D,
            None if z is None else z.transpose(1, 2),
            delta_bias,
            delta_softplus,
            initial_state=slot.before,
            output_final_state=return_last_state or slot.keeps,
            layout=call.layout,
            exchange=call.options.exchange,
        )
    y, state = slot.split(out)
    y = y.transpose(1, 2)
    return (y, state) if return_last_state and state is not None else y


def rwkv_linear_attention(
    call: ParallelCall,
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: Sequence[Tensor] | None = None,
    return_state: bool = False,
) -> tuple[Tensor, None]:
    """RWKV-4's attention: key and value ``[B, T, C]``, time_decay and time_first ``[C]``; a mean of values with weights e^key.

    Weighted values and weights are two columns of one state, which decays by e^-e^time_decay in each token and is read before the
    token itself, whose weight is e^(key + time_first). All weights are divided by the largest of their channel, on all ranks and
    in all segments of time so far: the mean is the same. In float64, which holds keys 700 apart.

    Raises:
        InputError: for a state: it would be of a cache.
    """
    if state is not None or return_state:
        raise InputError("RWKV's state is not kept over ranks. Leave use_cache and state out, or decode on one rank")
    call.take(RWKV)
    with without_autocast(key):
        weights, values, first, decay = (t.double() for t in (key, value, time_first, time_decay))
        of_sums, of_largest = call.slot(RWKV), call.slot(RWKV)
        largest = max_over_ranks(weights.detach().amax((0, 1)), call.layout)
        before_first = of_sums.before
        if of_sums.before is not None and of_largest.before is not None:
            so_far = of_largest.before.detach()
            largest = torch.maximum(largest, so_far)
            before_first = of_sums.before * torch.exp(so_far - largest)[:, None, None]
        if of_largest.keep is not None:
            of_largest.keep(largest)
        e = torch.exp(weights - largest)
        ones = e.new_ones(*e.shape[:2], 1, 1)
        out = operators.simple_gla(
            ones,
            ones,
            torch.stack([e * values, e], dim=-1),
            (-torch.exp(decay)).expand_as(e),
            scale=1.0,
            initial_state=before_first,
            output_final_state=of_sums.keeps,
            layout=call.layout,
            exchange=call.options.exchange,
        )
        summed, _ = of_sums.split(out)
        first_shifted = None if before_first is None else before_first.flatten(1)
        before = token_shift(summed.flatten(2), initial_state=first_shifted, layout=call.layout).view_as(summed)
        own = e * torch.exp(first)
        mean = (before[..., 0] + own * values) / (before[..., 1] + own)
    return mean.to(key.dtype), None


def not_fused(call: ParallelCall, *_: Any, **__: Any) -> None:
    """A kernel that does convolution and scan at once: its callers take None for "not here", and call the two themselves."""


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    CONVOLUTION: convolution,
    GATED_DELTA: gated_delta_rule,
    KIMI_DELTA: kimi_delta_attention,
    MAMBA2: mamba2_scan,
    SELECTIVE_SCAN: selective_scan,
    RWKV: rwkv_linear_attention,
    "mamba2_split_conv1d_scan_combined": not_fused,
    "mamba_inner_fn": not_fused,
}
"""By the name of the function in a modeling file, what stands in for it."""


def with_state(out: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """What an operator returned, and the final state or None."""
    return (out, None) if isinstance(out, Tensor) else out
