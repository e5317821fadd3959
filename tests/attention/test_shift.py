"""A token shift over ranks gives each token the one before it, with every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from longspan.attention.shift import token_shift
from longspan.errors import InputError, LayoutError
from longspan.layout import Order, SequenceLayout
from tests.attention.convolution_reference import (
    LENGTHS,
    NUM_CHANNELS,
    ORDERS,
    definition,
    documents_of,
    inputs,
)
from tests.compare import relative_error, worst
from tests.ranks import run_on_ranks
from tests.unwritten import unwritten_memory_is_nan


@unwritten_memory_is_nan()
def shift_errors(order: Order, batch: int) -> float:
    errors = []
    for seq_len in LENGTHS:
        for documents in documents_of(seq_len) if batch == 1 else [None]:
            for dtype, with_states in ((torch.float64, False), (torch.float64, True), (torch.bfloat16, False)):
                given = inputs(seq_len, 2, documents, batch=batch, dtype=dtype)
                layout = SequenceLayout(seq_len, order=order, documents=documents)
                whole = [given[name].clone().requires_grad_() for name in ("x", "initial_state")[: 1 + with_states]]
                shift = torch.tensor([1.0, 0.0], dtype=dtype).expand(NUM_CHANNELS, 2)
                expected = definition(whole[0], shift, None, None, documents, whole[1] if with_states else None)
                # Every rank weighs the final state its own way; its gradient is the sum over ranks.
                total = layout.num_ranks * (layout.num_ranks + 1) // 2
                weights = [given["grad_y"], total * given["grad_final"]][: 1 + with_states]
                expected_grads = torch.autograd.grad(expected[: 1 + with_states], whole, weights)

                own = [layout.shard(whole[0].detach()), *(x.detach().squeeze(1) for x in whole[1:])]
                own = [x.clone().requires_grad_() for x in own]
                got = token_shift(
                    own[0],
                    initial_state=own[1] if with_states else None,
                    output_final_state=with_states,
                    layout=layout,
                )
                outputs = list(got) if isinstance(got, tuple) else [got]
                upstream = [layout.shard(given["grad_y"]), (layout.rank + 1) * given["grad_final"].squeeze(1)]
                grads = torch.autograd.grad(outputs, own, upstream[: len(outputs)])
                assert all(x.dtype == dtype for x in (*outputs, *grads))
                errors.append(relative_error(outputs[0], layout.shard(expected[0])))
                errors.append(relative_error(grads[0], layout.shard(expected_grads[0])))
                if with_states:
                    summed = grads[1].clone()
                    dist.all_reduce(summed)
                    errors.append(relative_error(outputs[1], expected[1].squeeze(1)))
                    errors.append(relative_error(summed, expected_grads[1].squeeze(1)))
    return worst(errors)


@pytest.mark.slow_rows(r"^[23]-")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^4-contiguous$")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_a_token_shift_gives_each_token_the_one_before_it(num_ranks: int, order: Order) -> None:
    for batch in (1, 2):
        assert worst(run_on_ranks(num_ranks, shift_errors, order, batch)) < 1e-15


def shift_partly(order: Order, frozen: bool) -> float:
    """The second rank's loss takes y, those of the others the final state."""
    layout = SequenceLayout(7, order=order)
    given = inputs(7, 2, None)
    x = layout.shard(given["x"]).clone().requires_grad_(not (frozen and layout.rank == 0))
    state = given["initial_state"].squeeze(1).clone().requires_grad_()
    y, final = token_shift(x, initial_state=state, output_final_state=True, layout=layout)
    (y.sum() if layout.rank == 1 else final.sum()).backward()
    assert state.grad is not None
    assert (x.grad is None) == (not x.requires_grad)
    dist.all_reduce(state.grad)
    expected = torch.zeros(8, dtype=torch.float64)
    for start, stop in layout.segments_of(1):
        expected[start:stop] += 1
    expected[7] += layout.num_ranks - 1
    errors = [relative_error(state.grad, expected[0].expand_as(state), 1.0)]
    if x.grad is not None:
        errors.append(relative_error(x.grad, layout.shard(expected[1:].view(1, 7, 1)).expand_as(x), 1.0))
    return worst(errors)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_ranks_may_use_either_output_of_a_token_shift(order: Order, frozen: bool) -> None:
    assert run_on_ranks(4, shift_partly, order, frozen) == [0.0] * 4


def test_token_by_token_a_shift_gives_what_one_call_gives() -> None:
    given = inputs(7, 2, None, batch=2)
    x, state = given["x"], given["initial_state"].squeeze(1)
    want, want_final = token_shift(x, initial_state=state, output_final_state=True)
    outputs = []
    for token in x.split(1, dim=1):
        y, state = token_shift(token, initial_state=state, output_final_state=True)
        outputs.append(y)
    assert torch.equal(torch.cat(outputs, dim=1), want)
    assert torch.equal(state, want_final)


def test_a_token_shift_needs_no_layout() -> None:
    x = torch.arange(6.0).view(1, 3, 2)
    assert token_shift(x).tolist() == [[[0.0, 0.0], [0.0, 1.0], [2.0, 3.0]]]


def test_a_token_shift_refuses_what_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"token_shift takes x \[B, T, C\]"):
        token_shift(torch.zeros(3, 4))
    with pytest.raises(InputError, match=r"token_shift: initial_state must be the token before, \[B, C\] = \(1, 2\)"):
        token_shift(torch.zeros(1, 4, 2), initial_state=torch.zeros(1, 1, 2))
    with pytest.raises(LayoutError, match="token_shift takes the 5 tokens"):
        token_shift(torch.zeros(1, 4, 2), layout=SequenceLayout.local(5))
