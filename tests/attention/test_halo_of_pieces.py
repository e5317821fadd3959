"""`longspan.halo` gives each piece the tokens before it, `longspan.tail` every rank the last ones of the sequence, and
`longspan.sum_over_ranks` the sum, with their gradients."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import longspan
from longspan.errors import InputError, LayoutError
from longspan.layout import ORDERS, SequenceLayout
from tests.compare import relative_error, worst
from tests.ranks import raised, run_on_ranks
from tests.unwritten import unwritten_memory_is_nan

PACKED = (0, 1, 2, 9, 12, 19)


def windows(x: Tensor, before: Tensor, pieces: Any, width: int) -> Tensor:
    """For each token the `width` tokens before it and itself, ``[B, T, width + 1, ...]``."""
    found = []
    for piece, earlier in zip(pieces, before, strict=True):
        tokens = torch.cat([earlier, x[:, piece.start : piece.stop]], dim=1)
        found.append(tokens.unfold(1, width + 1, 1).movedim(-1, 2))
    return torch.cat(found, dim=1)


def expected_windows(x: Tensor, bounds: tuple[int, ...], width: int) -> Tensor:
    rows = []
    for token in range(x.shape[1]):
        start = max(bound for bound in bounds if bound <= token)
        slots = [x[:, t] if t >= start else torch.zeros_like(x[:, 0]) for t in range(token - width, token + 1)]
        rows.append(torch.stack(slots, dim=1))
    return torch.stack(rows, dim=1)


@unwritten_memory_is_nan()
def errors_of_windows(order: Any, documents: Any, width: int, sizes: tuple[int, ...]) -> float:
    layout = SequenceLayout(19, order=order, documents=documents)
    generator = torch.Generator().manual_seed(width)
    batch = 1 if documents else 2
    x = torch.randn(batch, 19, *sizes, generator=generator, dtype=torch.float64, requires_grad=True)
    want = expected_windows(x, layout.document_bounds[:-1], width)
    upstream = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    (want_grad,) = torch.autograd.grad(want, x, upstream)
    own = layout.shard(x.detach()).clone().requires_grad_()
    before = longspan.halo(own, width, layout)
    assert before.shape == (len(layout.pieces), batch, width, *sizes)
    got = windows(own, before, layout.pieces, width)
    (grad,) = torch.autograd.grad(got, own, layout.shard(upstream))
    return worst([relative_error(got, layout.shard(want)), relative_error(grad, layout.shard(want_grad))])


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("order", ORDERS)
def test_a_halo_is_what_stands_before_each_piece(num_ranks: int, order: Any) -> None:
    for documents in (None, PACKED):
        for width, sizes in ((1, ()), (3, (2, 3)), (25, (4,))):
            errors = run_on_ranks(num_ranks, errors_of_windows, order, documents, width, sizes)
            assert worst(errors) <= 1e-15, (documents, width)


def expected_tail(x: Tensor, initial: Tensor | None, bounds: tuple[int, ...], width: int) -> Tensor:
    """Of the last document's end, and of each other's, the `width` tokens before it, ``[B or D, width, ...]``."""
    found = []
    for number, (start, stop) in enumerate(pairwise(bounds)):
        rows = slice(None) if len(bounds) == 2 else slice(number, number + 1)
        earlier = x.new_zeros(x.shape[0], width, *x.shape[2:]) if initial is None else initial[rows]
        found.append(torch.cat([earlier, x[:, start:stop]], dim=1)[:, -width:])
    return torch.cat(found)


@unwritten_memory_is_nan()
def errors_of_tails(order: Any, documents: Any, width: int, sizes: tuple[int, ...], has_initial: bool) -> float:
    layout = SequenceLayout(19, order=order, documents=documents)
    generator = torch.Generator().manual_seed(width)
    batch = 1 if documents else 2
    x = torch.randn(batch, 19, *sizes, generator=generator, dtype=torch.float64, requires_grad=True)
    rows = len(documents) - 1 if documents else batch
    initial = torch.randn(rows, width, *sizes, generator=generator, dtype=torch.float64) if has_initial else None
    leaves = [x] if initial is None else [x, initial.requires_grad_()]
    want = expected_tail(x, initial, layout.document_bounds, width)
    # Every rank weighs what it is given its own way.
    upstream = torch.randn(layout.num_ranks, *want.shape, generator=generator, dtype=torch.float64)
    want_grads = torch.autograd.grad(want, leaves, upstream.sum(0), materialize_grads=True)
    own = layout.shard(x.detach()).clone().requires_grad_()
    taken = None if initial is None else initial.detach().clone().requires_grad_()
    got = longspan.tail(own, width, layout, initial_state=taken)
    assert got.shape == want.shape
    own_leaves = [own] if taken is None else [own, taken]
    grads = torch.autograd.grad(got, own_leaves, upstream[layout.rank], materialize_grads=True)
    found = [relative_error(got, want), relative_error(grads[0], layout.shard(want_grads[0]))]
    if taken is not None:
        found.append(relative_error(longspan.sum_over_ranks(grads[1], layout), want_grads[1]))
    _, final = longspan.halo(own, width, layout, initial_state=taken, output_final_state=True)
    assert torch.equal(final, got), "what a halo ends with"
    return worst(found)


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^contiguous-4$")
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("order", ORDERS)
def test_a_tail_is_the_last_tokens_on_every_rank(num_ranks: int, order: Any) -> None:
    for documents in (None, PACKED):
        for width, sizes, has_initial in ((1, (), False), (3, (2, 3), True), (25, (4,), False), (25, (4,), True)):
            errors = run_on_ranks(num_ranks, errors_of_tails, order, documents, width, sizes, has_initial)
            assert worst(errors) <= 1e-15, (documents, width)


def tails_that_go_on() -> bool:
    """A sequence in stretches: each takes the last tokens of the one before."""
    layout = SequenceLayout(19)
    x = torch.randn(2, 19, 3, generator=torch.Generator().manual_seed(1))
    whole = longspan.tail(layout.shard(x), 6, layout)
    state = None
    for start, stop in ((0, 4), (4, 6), (6, 19)):
        stretch = layout.stretch(start, stop)
        state = longspan.tail(stretch.shard(x[:, start:stop]), 6, stretch, initial_state=state)
    assert state is not None
    return torch.equal(state, whole) and torch.equal(whole, x[:, -6:])


def test_a_tail_is_the_initial_state_of_what_follows() -> None:
    assert run_on_ranks(2, tails_that_go_on) == [True, True]


def halo_of_integers() -> Tensor:
    layout = SequenceLayout(8)
    return longspan.halo(layout.shard(torch.arange(10, 18)[None]), 2, layout)


def test_a_halo_may_be_of_integers() -> None:
    assert [x.tolist() for x in run_on_ranks(2, halo_of_integers)] == [[[[0, 0]]], [[[12, 13]]]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": 3}, InputError, r"halo: x must be a torch\.Tensor; got 3"),
        ({"x": torch.zeros(6)}, InputError, r"halo takes x \[B, T, \.\.\.\]; got shape \(6,\)"),
        ({"width": 0}, InputError, "width must be a positive int, the tokens before each piece; got 0"),
        ({"width": 1.5}, InputError, "width must be a positive int"),
        ({"layout": None}, InputError, "halo: layout must be a SequenceLayout"),
        ({"x": torch.zeros(1, 5, 2)}, LayoutError, "halo takes the 6 tokens"),
        ({"layout": SequenceLayout.local(6, [0, 2, 6]), "x": torch.zeros(2, 6, 1)}, InputError, "B = 1"),
        ({"layout": SequenceLayout.for_rank(12, 2, 0)}, LayoutError, "made by for_rank"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs: dict[str, Any] = {"x": torch.zeros(1, 6, 2), "width": 2, "layout": SequenceLayout.local(6)}
    with pytest.raises(error, match=message):
        longspan.halo(**{**inputs, **change})


def test_a_tail_is_of_integers_too_and_says_what_does_not_fit() -> None:
    layout = SequenceLayout.local(4, [0, 1, 4])
    assert longspan.tail(torch.arange(10, 14)[None], 2, layout).tolist() == [[0, 10], [12, 13]]
    x = torch.zeros(1, 4, 2)
    with pytest.raises(InputError, match="tail: width must be a positive int, the last tokens; got 0"):
        longspan.tail(x, 0, layout)
    with pytest.raises(
        InputError, match=r"tail: initial_state must be the tokens before, \[num_documents, width, \.\.\.\]"
    ):
        longspan.tail(x, 2, layout, initial_state=torch.zeros(1, 2, 2))
    with pytest.raises(LayoutError, match="tail takes the 4 tokens"):
        longspan.tail(torch.zeros(1, 5, 2), 2, layout)
    with pytest.raises(InputError, match=r"tail takes x \[B, T, \.\.\.\]; got shape \(4,\)"):
        longspan.tail(torch.zeros(4), 2, layout)


def test_a_halo_has_a_shape_without_values() -> None:
    layout = SequenceLayout.for_rank(12, 2, 1, documents=[0, 7, 12])
    assert longspan.halo(torch.zeros(1, 6, 3, device="meta"), 2, layout).shape == (2, 1, 2, 3)
    assert longspan.tail(torch.zeros(1, 6, 3, device="meta"), 2, layout).shape == (2, 2, 3)


def sums() -> list[bool]:
    rank = dist.get_rank()
    pair = dist.new_group([0, 1])
    x = torch.tensor([1.0, 2.0], dtype=torch.float64) * (rank + 1)
    x.requires_grad_()
    found = []
    for group in (None, SequenceLayout(8), dist.group.WORLD, dist.device_mesh.init_device_mesh("cpu", (3,))):
        total = longspan.sum_over_ranks(x, group)
        # Every rank weighs the sum its own way.
        (grad,) = torch.autograd.grad((total * (rank + 1)).sum(), x)
        found.append(torch.equal(total.detach(), torch.tensor([6.0, 12.0]).double()))
        found.append(torch.equal(grad, torch.full((2,), 6.0).double()))
    if rank < 2:
        found.append(torch.equal(longspan.sum_over_ranks(torch.tensor([rank + 1]), pair), torch.tensor([3])))
    else:
        found.append("not in the given group" in raised(longspan.sum_over_ranks, x, pair)[1])
    return found


def test_a_sum_is_of_all_ranks_of_a_group_with_their_gradients() -> None:
    assert run_on_ranks(3, sums) == [[True] * 9] * 3


def test_the_sum_of_one_rank_is_its_own() -> None:
    x = torch.randn(3)
    assert longspan.sum_over_ranks(x) is x
    assert longspan.sum_over_ranks(x, SequenceLayout.local(4)) is x
    with pytest.raises(LayoutError, match=r"sum_over_ranks\(\) needs a layout with a process group"):
        longspan.sum_over_ranks(x, SequenceLayout.for_rank(4, 2, 0))
    with pytest.raises(LayoutError, match="group must be a ProcessGroup"):
        longspan.sum_over_ranks(x, "sp")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"sum_over_ranks\(\): x must be a torch\.Tensor; got 1\.0"):
        longspan.sum_over_ranks(1.0)  # type: ignore[arg-type]


def compiled_on_ranks() -> bool:
    layout = SequenceLayout(8)
    x = layout.shard(torch.arange(16.0).view(1, 8, 2)).clone().requires_grad_()

    def compute(x: Tensor) -> Tensor:
        before = longspan.halo(x * 2.0, 2, layout)
        last = longspan.tail(x * 3.0, 2, layout)
        return longspan.sum_over_ranks(before.sum() + x.square().sum() + last.square().sum(), layout)

    want = compute(x)
    got = torch.compile(compute, backend="aot_eager")(x)
    (want_grad,), (grad,) = torch.autograd.grad(want, x), torch.autograd.grad(got, x)
    return torch.equal(got, want) and torch.equal(grad, want_grad)


# PyTorch's own, where it stops a graph: it hides that from a user, but not from an error filter.
# A compiled convolution over ranks runs in make test, in `tests/tracing/test_compile.py`.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_calls_over_ranks_give_the_same() -> None:
    assert run_on_ranks(2, compiled_on_ranks, timeout=120.0) == [True, True]
