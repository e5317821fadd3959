"""Sums over a stretch's tokens equal the recurrence over them, whatever part of them has decayed to nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longspan.layout import SequenceLayout
from longspan.ops.selective_scan.block import BlockInputs, ScanInputs
from longspan.ops.selective_scan.passes import ScanCall, backward_pass, end_states, entering_adjoint, forward_pass
from longspan.ops.selective_scan.sums import SUMMED, DecayedSum, may_leave_out
from tests.compare import relative_error

ROWS, NUMBERS, CHANNELS = 2, 3, 5
LEFT = {
    "all of it": torch.ones(NUMBERS, CHANNELS),
    "some numbers": torch.tensor([1.0, 4000.0, 1.0]).unsqueeze(1).expand(-1, CHANNELS),
    "some channels": torch.tensor([4000.0, 1.0, 1.0, 4000.0, 4000.0]).expand(NUMBERS, -1),
    "some of both": torch.maximum(
        torch.tensor([[1.0], [4000.0], [1.0]]), torch.tensor([4000.0, 1.0, 1.0, 4000.0, 1.0])
    ),
    "nothing": torch.full((NUMBERS, CHANNELS), 4000.0),
}
"""Rates of which so much is left behind a chunk of tokens, in float64 as in float32."""


def tokens(length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    steps = normal(length, ROWS, CHANNELS).abs().mul_(0.1)
    # Of the nearest token there is something left, from either side.
    steps[[0, -1]] = 1e-5
    return steps, normal(length, ROWS, CHANNELS), normal(length, ROWS, NUMBERS)


def summed(rates: Tensor, given: tuple[Tensor, Tensor, Tensor], from_last: bool, chunk: int = 16) -> DecayedSum:
    found = DecayedSum(rates, ROWS, may_leave_out(*given))
    chunks = list(zip(*(x.split(chunk) for x in given), strict=True))
    for steps, x, key in reversed(chunks) if from_last else chunks:
        if found.over:
            break
        if found.channels is not None:
            steps, x = (part[..., found.channels] for part in (steps, x))
        found.add(steps, x, key, from_last)
    return found


def recurrent(rates: Tensor, given: tuple[Tensor, Tensor, Tensor], from_last: bool) -> Tensor:
    """In float64, from the farthest token to the nearest; that of the nearest first one decays by its own step."""
    steps, x, key = (part.double() for part in given)
    total = torch.zeros(ROWS, NUMBERS, CHANNELS, dtype=torch.float64)
    for token in range(len(steps)) if from_last else reversed(range(len(steps))):
        decay = torch.exp(steps[token].unsqueeze(1) * rates.double())
        written = x[token].unsqueeze(1) * key[token].unsqueeze(2)
        total = total * decay + written if from_last else (total + written) * decay
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("from_last", [True, False], ids=["state", "adjoint"])
@pytest.mark.parametrize("left", LEFT)
def test_a_sum_equals_the_recurrence(left: str, from_last: bool, dtype: torch.dtype) -> None:
    rates, given = -LEFT[left].to(dtype), tokens(153, dtype)
    found = summed(rates, given, from_last)
    want = recurrent(rates, given, from_last)
    bound = 1e-12 if dtype == torch.float64 else 2e-6
    for number in range(NUMBERS):
        for channel in range(CHANNELS):
            place = slice(None), number, channel
            assert relative_error(found.total[place], want[place]) < bound
    steps = given[0].double().sum(0)
    if not found.over:
        kept = slice(None) if found.channels is None else found.channels
        assert relative_error(found.distance[:, kept], steps[:, kept]) < bound
    # Of what is left out, no more than nothing arrives from behind.
    nothing = torch.tensor(-600.0 if dtype == torch.float64 else -60.0, dtype=torch.float64).exp().item()
    arrived = found.decayed(torch.ones(ROWS, NUMBERS, CHANNELS, dtype=dtype)).double()
    torch.testing.assert_close(arrived, torch.exp(steps.unsqueeze(1) * rates.double()), rtol=1e-4, atol=nothing)
    assert found.over == (left == "nothing")


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("which", ["steps", "x", "key"])
@pytest.mark.parametrize("from_last", [True, False], ids=["state", "adjoint"])
@pytest.mark.parametrize("left", LEFT)
def test_a_token_that_is_not_finite_is_in_the_sum(left: str, from_last: bool, which: str, value: float) -> None:
    """Where every other token has decayed to nothing, too."""
    rates = -LEFT[left]
    for token in (0, 20, 52):
        given = tokens(53, torch.float32)
        named = dict(zip(("steps", "x", "key"), given, strict=True))
        named[which][token, 1] = value
        if which == "steps" and from_last:
            # What is written is steps times u.
            named["x"][token, 1] = value
        found = summed(rates, given, from_last).total
        want = recurrent(rates, given, from_last)
        assert torch.equal(found.isfinite(), want.isfinite())
        assert want[0].isfinite().all()


def scan_inputs(length: int, step: float) -> ScanInputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rates = -torch.arange(1.0, NUMBERS + 1, dtype=torch.float64).expand(CHANNELS, NUMBERS) * torch.logspace(
        0, 2, CHANNELS, dtype=torch.float64
    ).unsqueeze(1)
    bias = torch.full((CHANNELS,), step, dtype=torch.float64).expm1().log()
    u, z, delta = normal(ROWS, length, CHANNELS), normal(ROWS, length, CHANNELS), normal(ROWS, length, CHANNELS) * 0.3
    key, query = normal(ROWS, length, 1, NUMBERS), normal(ROWS, length, 1, NUMBERS)
    return ScanInputs(u, delta, rates.contiguous(), key, query, normal(CHANNELS), z, bias)


@pytest.mark.parametrize("step", [0.001, 0.1, 10.0])
def test_sums_of_a_call_equal_its_scan(step: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all channels, of some, and where a chunk ends the sum: what follows is not read."""
    length = 4 * SUMMED + 7
    call = ScanCall(SequenceLayout.local(length), chunk_size=32, delta_softplus=True, state_dtype=torch.float64)
    inputs = scan_inputs(length, step)
    read: list[tuple[int, int]] = []
    load = BlockInputs.inputs_at

    def counted(self: BlockInputs, chunk: object, channels: Tensor | None = None) -> object:
        read.append((chunk.start, CHANNELS if channels is None else len(channels)))  # type: ignore[attr-defined]
        return load(self, chunk, channels)  # type: ignore[arg-type]

    grad_out = torch.randn(inputs.u.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    entering = {
        0: torch.randn(ROWS, NUMBERS, CHANNELS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    }
    _, between, final = forward_pass(call, inputs, entering, (0,))
    grads = backward_pass(call, inputs, entering, between, grad_out, {})
    monkeypatch.setattr(BlockInputs, "inputs_at", counted)
    ends, _ = end_states(call, inputs, entering, {0: 0}, 1)
    of_states = list(read)
    adjoint = entering_adjoint(call, inputs, (0,), grad_out, {})[0]
    assert relative_error(ends, final) < 1e-12
    assert relative_error(adjoint, grads.entering[0]) < 1e-12
    if step == 10.0:
        assert read == [(4 * SUMMED, CHANNELS), (3 * SUMMED, 2), (0, CHANNELS)]
    else:
        assert [start for start, _ in of_states] == [SUMMED * number for number in (4, 3, 2, 1, 0)]
        fewest = min(channels for _, channels in read)
        assert fewest == CHANNELS if step == 0.001 else fewest < CHANNELS
