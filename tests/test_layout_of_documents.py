"""Layouts of packed documents from position ids that restart, and of documents that are cut into chunks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.attention.softmax import softmax_attention
from longspan.errors import InputError, LayoutError
from longspan.layout import ORDERS, SequenceLayout
from tests.attention.softmax_reference import dense_attention, random_inputs
from tests.compare import relative_error, worst
from tests.ranks import run_on_ranks


def positions_of(bounds: list[int]) -> Tensor:
    return torch.cat([torch.arange(stop - start) for start, stop in pairwise(bounds)])


@pytest.mark.parametrize(
    ("position_ids", "documents"),
    [
        (torch.arange(7), None),
        (torch.arange(3, 10), None),
        (positions_of([0, 1, 2, 6, 7]), (0, 1, 2, 6, 7)),
        (positions_of([0, 4, 7])[None], (0, 4, 7)),
        (torch.tensor([5, 6, 3, 4, 4, 5]), (0, 2, 4, 6)),
        (torch.tensor([-1, 0, 1]), (0, 1, 3)),
        # A row starts a document even where its first position follows the last one of the row before.
        (torch.arange(8).view(2, 4), (0, 4, 8)),
        (torch.stack([positions_of([0, 3, 5]), positions_of([0, 5])]), (0, 3, 5, 10)),
        (torch.tensor([[0, 1, 0]], dtype=torch.int32), (0, 2, 3)),
        (torch.zeros(1, 1, dtype=torch.int64), None),
    ],
)
def test_a_document_starts_where_positions_restart(position_ids: Tensor, documents: tuple[int, ...] | None) -> None:
    layout = SequenceLayout.from_positions(position_ids)
    assert layout.seq_len == position_ids.numel()
    assert layout.documents == documents


def of_positions(order: Any) -> tuple[Any, ...]:
    layout = SequenceLayout.from_positions(positions_of([0, 3, 10, 13]), order=order, ranks_per_node=1)
    return layout.order, layout.num_ranks, layout.ranks_per_node, layout.document_positions_on("cpu").tolist()


@pytest.mark.parametrize("order", ORDERS)
def test_positions_over_ranks_are_those_of_each_ranks_tokens(order: Any) -> None:
    positions = positions_of([0, 3, 10, 13])
    for rank, (got, num_ranks, ranks_per_node, own) in enumerate(run_on_ranks(2, of_positions, order)):
        assert (got, num_ranks, ranks_per_node) == (order, 2, 1)
        assert own == positions[SequenceLayout.for_rank(13, 2, rank, order).positions].tolist()


@pytest.mark.parametrize(
    ("position_ids", "message"),
    [
        (torch.zeros(3, 1, 4).long(), r"integer position ids \[B, T\] or \[T\].*M-RoPE, pass those of the text"),
        (torch.zeros(4), r"got a Tensor of torch.float32 and shape \(4,\). Convert them"),
        (torch.zeros(4).bool(), "got a Tensor of torch.bool"),
        (torch.zeros(2, 0).long(), r"at least one token; got position ids of shape \(2, 0\)"),
        (torch.zeros(4, device="meta").long(), "reads the values of position ids; .* which has none"),
    ],
)
def test_position_ids_that_do_not_fit_are_refused(position_ids: Tensor, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        SequenceLayout.from_positions(position_ids)
    with pytest.raises(InputError, match=r"position_ids must be a torch\.Tensor"):
        SequenceLayout.from_positions([0, 1])  # type: ignore[arg-type]


def test_documents_are_cut_at_multiples_from_their_start() -> None:
    assert SequenceLayout.local(10).chunked(4).documents == (0, 4, 8, 10)
    assert SequenceLayout.local(10, [0, 3, 10]).chunked(4).documents == (0, 3, 7, 10)
    assert SequenceLayout.local(4).chunked(1).documents == (0, 1, 2, 3, 4)
    for layout in (SequenceLayout.local(10), SequenceLayout.local(10, [0, 6, 10])):
        assert layout.chunked(10) is layout
        assert layout.chunked(3) is layout.chunked(3)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_chunked_layout_differs_in_its_documents_alone(num_ranks: int, order: Any) -> None:
    for rank in range(num_ranks):
        for documents in (None, [0, 5, 6, 23]):
            layout = SequenceLayout.for_rank(23, num_ranks, rank, order, documents, ranks_per_node=1)
            chunked = layout.chunked(4)
            alike = SequenceLayout.for_rank(23, num_ranks, rank, order, chunked.documents, ranks_per_node=1)
            for one in (chunked, chunked.mirrored.mirrored):
                assert one.all_segments == alike.all_segments
                assert one.pieces == alike.pieces
                assert one.ranks_per_node == 1
            # 23 tokens do not divide evenly: a mirrored layout's segments are not those of its length.
            cut = layout.mirrored.chunked(4)
            assert cut.segments == layout.mirrored.segments
            assert [s.starts_document for s in cut.all_segments] == [
                any(s.start <= bound < s.stop for bound in cut.document_bounds[:-1]) for s in cut.all_segments
            ]


@pytest.mark.parametrize("size", [0, -3, 2.0, True, None])
def test_a_size_that_is_no_count_is_refused(size: Any) -> None:
    with pytest.raises(LayoutError, match="number of tokens of a chunk, an int of at least 1; got"):
        SequenceLayout.local(8).chunked(size)


def chunked_attention(order: Any, documents: Any, method: Any) -> float:
    q, k, v, grad = random_inputs(3, 1, 37, 4, 2, 8)
    layout = SequenceLayout(37, order=order, documents=documents)
    own = [layout.shard(x).clone().requires_grad_() for x in (q, k, v)]
    out = softmax_attention(own[0], own[1], own[2], scale=0.4, layout=layout.chunked(8), method=method)
    grads = torch.autograd.grad(out, own, layout.shard(grad))
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    bounds = [start for a, b in pairwise(layout.document_bounds) for start in range(a, b, 8)]
    want = dense_attention(*whole, causal=True, documents=(*bounds, 37), scale=0.4)
    want_grads = torch.autograd.grad(want, whole, grad)
    pairs = zip((out, *grads), (want, *want_grads), strict=True)
    return worst(relative_error(x, layout.shard(y)) for x, y in pairs)


@pytest.mark.parametrize("documents", [None, [0, 3, 14, 37]])
def test_attention_in_a_chunked_layout_sees_chunks_alone(documents: Any) -> None:
    for order in ORDERS:
        for method in ("all_gather", "ring", "ulysses"):
            assert worst(run_on_ranks(2, chunked_attention, order, documents, method)) <= 1e-11


def compiled_on_ranks() -> float:
    q, k, v, _ = random_inputs(4, 1, 24, 2, 2, 8, torch.float32)
    layout = SequenceLayout(24, order="zigzag")
    own = [layout.shard(x) for x in (q, k, v)]
    positions = positions_of([0, 10, 24])

    def attend(positions: Tensor, *own: Tensor) -> Tensor:
        packed = SequenceLayout.from_positions(positions, order="zigzag")
        return softmax_attention(own[0], own[1], own[2], layout=packed.chunked(8))

    torch._dynamo.reset()
    got = torch.compile(attend, backend="eager")(positions, *own)
    want = dense_attention(q, k, v, causal=True, documents=(0, 8, 10, 18, 24), scale=8**-0.5)
    return relative_error(got, layout.shard(want))


def test_layouts_are_made_inside_a_compiled_call_over_ranks() -> None:
    assert worst(run_on_ranks(2, compiled_on_ranks, timeout=120.0)) <= 1e-5


def test_a_chunked_layout_is_made_inside_a_compiled_call() -> None:
    q, k, v, _ = random_inputs(4, 1, 20, 2, 2, 8, torch.float32)
    layout = SequenceLayout.local(20)

    def attend(x: Tensor) -> Tensor:
        return softmax_attention(x, k, v, layout=layout.chunked(8))

    want = attend(q)
    fresh = SequenceLayout.local(20)

    def attend_compiled(x: Tensor) -> Tensor:
        return softmax_attention(x, k, v, layout=fresh.chunked(8))

    assert torch.equal(torch.compile(attend_compiled, backend="eager")(q), want)
