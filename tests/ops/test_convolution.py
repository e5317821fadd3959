"""The passes of a short convolution on one device: tiles of any cut, gradients, and what is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.attention.convolution import causal_conv1d
from longspan.attention.shift import token_shift
from longspan.layout import SequenceLayout
from longspan.ops import convolution
from tests.attention.convolution_reference import (
    NUM_CHANNELS,
    Documents,
    definition,
    inputs,
)
from tests.compare import relative_error


def test_it_is_the_depthwise_convolution_of_torch() -> None:
    given = inputs(20, 4, None, batch=2)
    padded = F.pad(given["x"].transpose(1, 2), (3, 0))
    expected = F.silu(F.conv1d(padded, given["weight"].unsqueeze(1), given["bias"], groups=NUM_CHANNELS)).transpose(
        1, 2
    )
    for activation in ("silu", "swish"):
        got = causal_conv1d(given["x"], given["weight"], given["bias"], activation)
        assert isinstance(got, Tensor)
        assert relative_error(got, expected) < 1e-12


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few rows, as they would be for very many channels."""
    monkeypatch.setattr(convolution, "_TILE_NUMBERS_CPU", 1)


def one_device(
    given: dict[str, Tensor], documents: Documents, initial: bool, activation: str | None = "silu"
) -> tuple[list[Tensor], list[Tensor]]:
    """(y and gradients by causal_conv1d, the same by the definition)."""
    names = ["x", "weight", "bias", *(["initial_state"] if initial else [])]
    both = []
    for side in (0, 1):
        leaves = {name: given[name].clone().requires_grad_() for name in names}
        layout = SequenceLayout.local(given["x"].shape[1], documents)
        state = leaves.get("initial_state")
        x, weight, bias = leaves["x"], leaves["weight"], leaves["bias"]
        if side == 0:
            y = causal_conv1d(x, weight, bias, activation, layout, initial_state=state)
            assert isinstance(y, Tensor)
        else:
            y, _ = definition(x, weight, bias, activation, documents, state)
        both.append([y, *torch.autograd.grad(y, list(leaves.values()), given["grad_y"])])
    return both[0], both[1]


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^None-(1-False|4-False|7-True)$", r"^silu-(2-|7-False)")
@pytest.mark.parametrize(("taps", "initial"), [(1, False), (2, False), (4, False), (7, False), (2, True), (7, True)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_tiles_of_any_cut_give_the_same(small_tiles: None, taps: int, activation: str | None, initial: bool) -> None:
    """Long documents over many tiles, many documents in one tile, and documents that start anywhere in them."""
    generator = torch.Generator().manual_seed(taps)
    for seq_len in (3, 16 * taps, 16 * taps + 1, 300):
        for count in (0, 1, 5, 40, seq_len - 1):
            cuts = torch.randperm(seq_len - 1, generator=generator)[: min(count, seq_len - 1)] + 1
            documents = [0, *sorted(cuts.tolist()), seq_len]
            for got, want in zip(
                *one_device(inputs(seq_len, taps, documents), documents, initial, activation), strict=True
            ):
                assert relative_error(got, want) < 1e-12, (seq_len, documents)


def test_a_batch_is_cut_into_tiles_by_rows_too(small_tiles: None) -> None:
    for got, want in zip(*one_device(inputs(100, 4, None, batch=5), None, True), strict=True):
        assert relative_error(got, want) < 1e-12


def test_many_documents_share_a_tile_and_long_ones_are_not_copied() -> None:
    layout = SequenceLayout.local(4000, [*range(0, 1000, 2), 4000])
    x = torch.zeros(1, 4000, 1 << 9)
    plan = convolution._conv_plan(layout, 3, False, x)
    assert next((tile.start, tile.stop) for tile in plan.tiles if tile.slots is not None) == (0, 52)
    assert all(tile.slots is None for tile in plan.tiles if tile.start >= 1000)
    assert len(plan.tiles) < 40


def test_gradients_are_those_of_finite_differences() -> None:
    for documents in (None, [0, 1, 4, 9]):
        given = inputs(9, 3, documents)
        layout = SequenceLayout.local(9, documents)
        leaves = [given[name].requires_grad_() for name in ("x", "weight", "bias", "initial_state")]

        def convolve(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, layout: SequenceLayout = layout) -> Any:
            return causal_conv1d(x, weight, bias, "silu", layout, initial_state=state, output_final_state=True)

        assert torch.autograd.gradcheck(convolve, leaves)
        assert torch.autograd.gradcheck(lambda x, layout=layout: token_shift(x, layout=layout), leaves[:1])


def test_tensors_need_not_be_contiguous() -> None:
    given = inputs(30, 4, None, batch=2)
    plain, _ = one_device(given, None, True)
    strided = {
        name: torch.stack([x, x], dim=-1)[..., 0] if name in ("weight", "bias") else x.mT.contiguous().mT
        for name, x in given.items()
    }
    for got, want in zip(one_device(strided, None, True)[0], plain, strict=True):
        assert torch.equal(got, want)


def test_backward_keeps_the_inputs_and_nothing_else() -> None:
    given = inputs(64, 4, None)
    leaves = [given[name].requires_grad_() for name in ("x", "weight", "bias")]
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        causal_conv1d(leaves[0], leaves[1], leaves[2], "silu")
    assert sorted(x.data_ptr() for x in kept) == sorted(x.data_ptr() for x in leaves)


def test_a_graph_can_be_walked_twice() -> None:
    given = inputs(20, 4, None)
    x = given["x"].requires_grad_()
    y = causal_conv1d(x, given["weight"])
    assert isinstance(y, Tensor)
    first, second = (torch.autograd.grad(y, x, given["grad_y"], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_document_with_an_infinity_harms_no_other(value: float) -> None:
    documents = [0, 4, 5, 6, 20]
    given = inputs(20, 4, documents)
    given["x"][:, 5] = value
    x = given["x"].requires_grad_()
    layout = SequenceLayout.local(20, documents)
    y = causal_conv1d(x, given["weight"], given["bias"], "silu", layout)
    assert isinstance(y, Tensor)
    y.backward(given["grad_y"])
    assert x.grad is not None
    others = torch.arange(20) != 5
    assert y[:, others].isfinite().all() and x.grad[:, others].isfinite().all()


def test_decoding_token_by_token_equals_one_call() -> None:
    given = inputs(12, 4, None, batch=2)
    weight, bias, state = given["weight"], given["bias"], given["initial_state"]
    whole = causal_conv1d(given["x"], weight, bias, "silu", initial_state=state, output_final_state=True)
    tokens = []
    for token in given["x"].split(1, dim=1):
        y, state = causal_conv1d(token, weight, bias, "silu", initial_state=state, output_final_state=True)
        tokens.append(y)
    assert relative_error(torch.cat(tokens, dim=1), whole[0]) < 1e-12
    assert torch.equal(state, whole[1])
