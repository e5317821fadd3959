"""Layouts of stretches: the documents of the whole sequence, cut at both ends, positions that count on, over the same ranks."""

from __future__ import annotations

import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist

import longspan
from longspan.errors import InputError, LayoutError
from longspan.layout import ORDERS, SequenceLayout
from tests.ranks import raised, run_on_ranks

DOCUMENTS = (0, 2, 8, 9, 10, 30, 44)
CUTS = (0, 8, 20, 25, 44)


def test_a_stretch_has_the_documents_that_have_tokens_in_it() -> None:
    whole = SequenceLayout.local(44, DOCUMENTS)
    found = [whole.stretch(*cut) for cut in pairwise(CUTS)]
    assert [layout.documents for layout in found] == [(0, 2, 8), (0, 1, 2, 12), (0, 5), (0, 5, 19)]
    assert [layout.continues for layout in found] == [0, 0, 10, 15]
    assert [layout.num_states for layout in found] == [1, 1, 1, 1]
    assert [layout.has_document_states for layout in (whole, *found)] == [True, *[False] * 4]
    assert SequenceLayout.local(44).stretch(8, 20).documents is None
    assert SequenceLayout.local(44).stretch(8, 20).continues == 8


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_positions_of_stretches_are_those_of_the_whole(order: Any, documents: Any) -> None:
    for rank in range(3):
        for continues in (None, 0, 6):
            options: dict[str, Any] = {"documents": documents, "continues": continues, "weights": [1.0, 2.0, 1.0]}
            whole = SequenceLayout.for_rank(44, 3, rank, order, **options)
            everything = SequenceLayout.local(44, documents, continues=continues).document_positions_on("cpu")
            for start, stop in pairwise(CUTS):
                layout = whole.stretch(start, stop)
                assert (layout.order, layout.rank, layout.num_ranks, layout.weights) == (order, rank, 3, whole.weights)
                assert layout is whole.stretch(start, stop)
                own = layout.document_positions_on("cpu")
                assert torch.equal(own, layout.shard(everything[start:stop], dim=0)), (rank, start, continues)
    assert everything[0] == 6


def test_a_stretch_of_a_stretch_is_one_of_the_whole() -> None:
    whole = SequenceLayout.local(44, DOCUMENTS, continues=3)
    inner, direct = whole.stretch(4, 40).stretch(0, 12), whole.stretch(4, 16)
    assert (inner.documents, inner.continues) == (direct.documents, direct.continues) == ((0, 4, 5, 6, 12), 2)
    assert whole.stretch(0, 2).continues == 3


def test_chunks_of_a_stretch_count_from_the_documents_start() -> None:
    whole = SequenceLayout.local(44, (0, 30, 44))
    expected = whole.chunked(4).document_bounds
    for start, stop in pairwise(CUTS):
        chunked = whole.stretch(start, stop).chunked(4)
        bounds = [bound + start for bound in chunked.document_bounds]
        assert bounds == sorted({start, stop, *(bound for bound in expected if start < bound < stop)})
        before = max(bound for bound in expected if bound <= start)
        assert chunked.continues == start - before


def test_a_stretch_can_be_pickled_and_says_where_it_stands() -> None:
    layout = SequenceLayout.for_rank(44, 2, 1, documents=DOCUMENTS).stretch(20, 25)
    again = pickle.loads(pickle.dumps(layout))
    assert (again.continues, again.documents, again.positions.tolist()) == (10, (0, 5), [3, 4])
    assert "continues=10" in repr(layout)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((0, 0), "ints from 0 to seq_len 44"),
        ((-1, 4), "got -1"),
        ((0, 45), "got 0 .* and 45"),
        ((0.0, 4), "got 0.0"),
        ((True, 4), "got True"),
        ((0, 1), "shorter than the number of ranks 2"),
    ],
)
def test_bounds_that_are_none_are_refused(bounds: tuple[Any, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        SequenceLayout.for_rank(44, 2, 0).stretch(*bounds)


@pytest.mark.parametrize("continues", [-1, 1.5, True, "8", [8]])
def test_a_number_of_tokens_before_that_is_none_is_refused(continues: Any) -> None:
    with pytest.raises(LayoutError, match="continues must be None or an int of at least 0"):
        SequenceLayout.local(8, continues=continues)


def test_what_reads_both_ways_is_refused() -> None:
    layout = SequenceLayout.local(8, continues=0)
    x = torch.full((1, 8, 2, 4), -0.1)
    for call in (
        lambda: longspan.linear_attention(x, x, x, causal=False, layout=layout),
        lambda: longspan.retention(x, x, x, [-0.1, -0.2], causal=False, layout=layout),
        lambda: longspan.softmax_attention(x, x, x, causal=False, layout=layout),
    ):
        with pytest.raises(InputError, match=r"with causal=False a token reads all of its document.*continues=0"):
            call()
    with pytest.raises(LayoutError, match="the mirror of a stretch"):
        _ = layout.mirrored


def ranks_that_disagree() -> str:
    return raised(SequenceLayout(8, continues=dist.get_rank()).verify)[1]


def test_ranks_that_disagree_on_what_came_before_are_told() -> None:
    for message in run_on_ranks(2, ranks_that_disagree):
        assert "continues: rank 0 has 0, rank 1 has 1" in message


def compiled_positions() -> bool:
    def call(x: torch.Tensor) -> torch.Tensor:
        return SequenceLayout.local(8, [0, 3, 8], continues=5).document_positions_on(x.device) + x

    x = torch.zeros(8, dtype=torch.int64)
    return torch.equal(torch.compile(call, backend="eager", fullgraph=True)(x), call(x))


def test_positions_are_found_inside_a_compiled_call() -> None:
    assert compiled_positions()
    torch.compiler.reset()


@pytest.mark.parametrize("continues", [0, 2])
def test_states_without_values_have_the_shapes_of_those_with(continues: int) -> None:
    layout = SequenceLayout.local(8, [0, 3, 8], continues=continues)
    shapes: dict[str, list[Any]] = {}
    for device in ("cpu", "meta"):
        x, state = torch.full((1, 8, 2, 4), -0.1, device=device), torch.ones(1, 2, 4, 4, device=device)
        k, v = (torch.ones(1, 2, 2, 4, device=device) for _ in range(2))
        taps, flat = torch.ones(1, 2, 8, device=device), x.flatten(2)
        options: dict[str, Any] = {"layout": layout, "output_final_state": True}
        weight = torch.ones(8, 3, device=device)
        shapes[device] = [
            [y.shape for y in longspan.linear_attention(x, x, x, initial_state=state, **options)],
            [y.shape for y in longspan.causal_conv1d(flat, weight, initial_state=taps, **options)],
            [y.shape for y in longspan.token_shift(flat, initial_state=taps[:, 0], **options)],
            [y.shape for y in longspan.halo(flat, 2, initial_state=taps, **options)],
            [y.shape for y in longspan.softmax_attention(x, x, x, initial_state=(k, v), **options)[1]],
        ]
    assert shapes["cpu"] == shapes["meta"]
    assert shapes["cpu"][0] == [(1, 8, 2, 4), (1, 2, 4, 4)]
    assert shapes["cpu"][4] == [(1, 5, 2, 4)] * 2
