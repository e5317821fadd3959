"""An exchange of random pairs against the scan of all of them on one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from longspan.exchange import Exchanger, Traffic, record_traffic, start_exchange
from longspan.layout import SequenceLayout
from longspan.state import Dense, Form, Identity, LengthRates, Pair, Rates, ScalarDecay, exclusive_scan
from tests.compare import relative_error
from tests.exchange.drain import drain
from tests.unwritten import unwritten_memory_is_nan


def random_rates(num_heads: int, key_size: int, dtype: torch.dtype = torch.float64) -> Rates:
    """The same on every rank."""
    return Rates(-torch.rand(num_heads, key_size, generator=torch.Generator().manual_seed(2), dtype=dtype))


def random_turns(num_heads: int, key_size: int) -> LengthRates:
    """Complex rates of so many channels, of two numbers each, the same on every rank."""
    damping = random_rates(num_heads, key_size).rates
    return LengthRates(torch.complex(*damping.chunk(2, dim=1)))


def random_pair(kind: Form, shape: Sequence[int], layout: SequenceLayout, dtype: torch.dtype) -> Pair:
    """Pairs of all segments, the same on every rank; `shape` is [B, H, K, V]."""
    generator = torch.Generator().manual_seed(0)
    full = (len(layout.all_segments), *shape)
    parameter = -torch.rand(kind.parameter_shape(full), generator=generator, dtype=dtype)
    if isinstance(kind, Rates | LengthRates):
        parameter = -parameter
    if kind is Identity:
        parameter.zero_()
    if kind is Dense:
        # Of norm about 1, so that the products of many neither vanish nor grow.
        parameter = torch.randn(parameter.shape, generator=generator, dtype=dtype) / shape[2] ** 0.5
    cut = kind(parameter).cut([segment.starts_document for segment in layout.all_segments])
    return Pair(cut, torch.randn(full, generator=generator, dtype=dtype))


def own_decays(shape: Sequence[int], layout: SequenceLayout) -> Pair:
    """Float32 pairs of this rank's segments with a decay for each head, of the random ones; `shape` is [B, H, K, V]."""
    pair, own = random_pair(ScalarDecay, shape, layout, torch.float32), list(layout.own_segments)
    return Pair(ScalarDecay(pair.transition.parameter[own]), pair.state[own])


def traffic_both_ways(exchange: Exchanger, shape: Sequence[int], layout: SequenceLayout) -> Traffic:
    """What this rank sends of random states with a decay for each head, forward and backward; `shape` is [B, H, K, V]."""
    pair = own_decays(shape, layout)
    with record_traffic() as traffic:
        entering = start_exchange(exchange, Pair(pair.transition, pair.state.requires_grad_()), layout).wait()
        entering.backward(torch.ones_like(entering))
        drain(layout)
    return traffic


@unwritten_memory_is_nan()
def errors_of_scan(
    exchange: Exchanger,
    kind: Form,
    shape: Sequence[int],
    layout: SequenceLayout,
    dtype: torch.dtype = torch.float64,
) -> list[float]:
    """Largest errors: of S_in, of the gradient of U, and of A's where it is not known."""
    pair = random_pair(kind, shape, layout, dtype)
    grad_in = torch.randn(pair.state.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    exact = (pair.state.double().requires_grad_(), pair.transition.parameter.double().requires_grad_())
    expected = exclusive_scan(Pair(kind(exact[1]), exact[0]))
    expected_grads = torch.autograd.grad((expected * grad_in).sum(), exact)

    own = list(layout.own_segments)
    state, parameter = pair.state[own].requires_grad_(), pair.transition.parameter
    leaves = [state]
    if not kind.is_known:
        parameter = parameter[own].requires_grad_()
        leaves.append(parameter)
    incoming = start_exchange(exchange, Pair(kind(parameter), state), layout).wait()
    assert incoming.dtype == dtype and incoming.shape == state.shape
    # A gradient that is not contiguous, as they come from permuted products.
    grad = grad_in[own].transpose(3, 4).contiguous().transpose(3, 4)
    grads = torch.autograd.grad(incoming, leaves, grad)
    pairs = zip((incoming, *grads), (expected, *expected_grads), strict=False)
    return [relative_error(got, want[own]) for got, want in pairs]


def layouts(order: Any, **options: Any) -> list[SequenceLayout]:
    """One document, ragged and with empty segments (in zigzag order), and packed ones of many lengths."""
    return [
        SequenceLayout(dist.get_world_size() + 1, order=order, **options),
        SequenceLayout(40, order=order, documents=[0, 1, 7, 25, 40], **options),
    ]
