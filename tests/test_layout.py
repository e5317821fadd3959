"""The layout: who holds what, in any order, length and packing; what it refuses and how it says so."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist

import longspan
from longspan.errors import LayoutError
from longspan.layout import ORDERS, SequenceLayout
from tests.ranks import raised, run_on_ranks

GRID = list(itertools.product((1, 2, 3, 4, 8), (8, 9, 15, 16, 31, 100), ORDERS))


@pytest.mark.parametrize(("num_ranks", "seq_len", "order"), GRID)
def test_every_token_has_one_owner_and_shards_differ_by_little(num_ranks: int, seq_len: int, order: Any) -> None:
    layouts = [SequenceLayout.for_rank(seq_len, num_ranks, rank, order) for rank in range(num_ranks)]
    positions = torch.cat([layout.positions for layout in layouts])
    assert sorted(positions.tolist()) == list(range(seq_len))
    sizes = [layout.num_local_tokens for layout in layouts]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= layouts[0].num_segments
    assert sizes == list(layouts[0].tokens_of)


def test_zigzag_gives_rank_r_the_segments_r_and_2p_minus_1_minus_r() -> None:
    assert SequenceLayout.for_rank(16, 4, 1, "zigzag").segments == ((2, 4), (12, 14))
    assert SequenceLayout.for_rank(16, 4, 1, "contiguous").segments == ((4, 8),)


@pytest.mark.parametrize(("num_ranks", "seq_len", "order"), GRID)
def test_pieces_cover_the_local_tokens_and_cross_no_boundary(num_ranks: int, seq_len: int, order: Any) -> None:
    documents = [0, 1, 2, 5, seq_len - 1, seq_len]
    for rank in range(num_ranks):
        layout = SequenceLayout.for_rank(seq_len, num_ranks, rank, order, documents)
        local = 0
        for piece in layout.pieces:
            assert piece.start == local < piece.stop
            local = piece.stop
            start, stop = piece.global_start, piece.global_start + piece.num_tokens
            assert layout.positions[piece.start : piece.stop].tolist() == list(range(start, stop))
            left, right = documents[piece.document : piece.document + 2]
            assert left <= start < stop <= right
            assert piece.starts_document == (start == left)
            assert piece.ends_document == (stop == right)
        assert local == layout.num_local_tokens
        in_document = torch.tensor([p - max(d for d in documents if d <= p) for p in layout.positions.tolist()])
        assert torch.equal(layout.document_positions_on("cpu"), in_document)
        assert layout.document_ends_on("cpu").tolist() == [stop - 1 for stop in layout.document_bounds[1:]]


def test_segments_say_where_documents_start() -> None:
    layout = SequenceLayout.for_rank(12, 3, 0, documents=[0, 4, 10, 12])
    assert [segment.starts_document for segment in layout.all_segments] == [True, True, True]
    layout = SequenceLayout.for_rank(12, 3, 0, documents=[0, 9, 12])
    assert [segment.starts_document for segment in layout.all_segments] == [True, False, True]


def shard_and_gather(seq_len: int, order: Any, weights: list[float] | None = None) -> dict[str, Any]:
    layout = SequenceLayout(seq_len, order=order, weights=weights)
    x = torch.arange(seq_len * 3, dtype=torch.float64).view(1, seq_len, 3).requires_grad_()
    local = layout.shard(x)
    assert torch.equal(local[0, :, 0] / 3, layout.positions.double())
    gathered = layout.gather(local)
    assert torch.equal(gathered, x)
    # Every rank weighs the gathered tokens its own way: the gradient of a shard is the sum over ranks.
    weight = torch.randn(seq_len, 3, generator=torch.Generator().manual_seed(dist.get_rank()), dtype=torch.float64)
    (grad,) = torch.autograd.grad((gathered * weight).sum(), x)
    dist.all_reduce(weight)
    dist.all_reduce(grad)
    assert torch.allclose(grad[0], weight)
    heads_first = layout.gather(local.transpose(1, 2), dim=2)
    assert torch.equal(heads_first, x.transpose(1, 2))
    return {"tokens": layout.num_local_tokens}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("num_ranks", "seq_len"), [(1, 5), (2, 2), (2, 9), (3, 10), (4, 4), (4, 37)])
def test_gather_inverts_shard_with_gradients_summed_over_ranks(num_ranks: int, seq_len: int, order: Any) -> None:
    results = run_on_ranks(num_ranks, shard_and_gather, seq_len, order)
    assert sum(result["tokens"] for result in results) == seq_len


@pytest.mark.parametrize("order", ORDERS)
def test_gather_inverts_shard_of_uneven_shares(order: Any) -> None:
    results = run_on_ranks(3, shard_and_gather, 20, order, [1.0, 0.0, 4.0])
    assert [result["tokens"] for result in results] == [4, 1, 15]


@pytest.mark.parametrize("order", ORDERS)
def test_labels_are_shifted_before_the_split(order: Any) -> None:
    tokens = torch.arange(100, 113).view(1, 13)
    for rank in range(3):
        layout = SequenceLayout.for_rank(12, 3, rank, order)
        assert torch.equal(layout.shard_labels(tokens)[0], layout.positions + 101)
        last = layout.shard_labels(tokens[:, :12])[0]
        expected = torch.where(layout.positions == 11, -100, layout.positions + 101)
        assert torch.equal(last, expected)
        packed = SequenceLayout.for_rank(12, 3, rank, order, documents=[0, 5, 12]).shard_labels(tokens, -1)[0]
        expected = torch.where((layout.positions == 4) | (layout.positions == 11), -1, layout.positions + 101)
        assert torch.equal(packed, expected)


WEIGHTS: list[list[float]] = [[2, 1, 1], [1, 0, 0], [0.3, 0.7, 1e-9], [3, 3, 1.5], [1e300, 1, 1e-300]]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("seq_len", "order"), list(itertools.product((3, 4, 16, 101), ORDERS)))
def test_a_weight_is_a_share_of_the_tokens_rounded_to_whole_ones(
    seq_len: int, order: Any, weights: list[float]
) -> None:
    layouts = [SequenceLayout.for_rank(seq_len, 3, rank, order, weights=weights) for rank in range(3)]
    positions = torch.cat([layout.positions for layout in layouts])
    assert sorted(positions.tolist()) == list(range(seq_len))
    sizes = [layout.num_local_tokens for layout in layouts]
    assert sizes == list(layouts[0].tokens_of)
    for size, weight, layout in zip(sizes, weights, layouts, strict=True):
        share = seq_len * weight / sum(weights)
        assert size >= 1
        # A rank with too small a share takes a token from the one with most.
        assert (
            abs(size - share) < 1 if min(seq_len * w / sum(weights) for w in weights) >= 1 else abs(size - share) <= 2
        )
        lengths = [stop - start for start, stop in layout.segments]
        assert max(lengths) - min(lengths) <= 1
        assert layout.mirrored.num_local_tokens == layout.chunked(2).num_local_tokens == size
        assert layout.mirrored.mirrored.segments == layout.segments


@pytest.mark.parametrize(
    ("seq_len", "weights", "counts"),
    [
        # 2.5, 1.25, 1.25: the largest rest is the first's.
        (5, [2, 1, 1], (3, 1, 1)),
        # 3.5 and 3.5 of 10, and 3: of equal rests the lower rank's.
        (10, [3.5, 3.5, 3], (4, 3, 3)),
        (7, [0, 0, 5], (1, 1, 5)),
        # In floating point, a third of 2^53 + 2 would be rounded.
        (2**53 + 2, [1, 1.5, 0.5], (3002399751580331, 4503599627370497, 1501199875790166)),
    ],
)
def test_shares_are_rounded_alike_everywhere(seq_len: int, weights: list[float], counts: tuple[int, ...]) -> None:
    layout = SequenceLayout.for_rank(seq_len, 3, 1, weights=weights)
    assert layout.tokens_of == counts
    assert (
        SequenceLayout.for_rank(seq_len, 3, 1, weights=torch.tensor(weights, dtype=torch.float64)).tokens_of == counts
    )
    assert SequenceLayout.for_rank(seq_len, 3, 1, weights=[8 * weight for weight in weights]).tokens_of == counts


@pytest.mark.parametrize("order", ORDERS)
def test_equal_weights_are_none(order: Any) -> None:
    for seq_len in (3, 7, 100):
        layout = SequenceLayout.for_rank(seq_len, 3, 2, order, weights=[0.1, 0.1, 0.1])
        assert layout.weights is None
        assert layout.all_segments == SequenceLayout.for_rank(seq_len, 3, 2, order).all_segments


def differ_in_weights() -> tuple[str, str]:
    return raised(SequenceLayout(16, weights=[1.0, 2.0 + dist.get_rank()]).verify)


def test_ranks_with_other_weights_are_found() -> None:
    for kind, message in run_on_ranks(2, differ_in_weights):
        assert kind == "LayoutError"
        assert "weights: rank 0 has (1.0, 2.0), rank 1 has (1.0, 3.0)" in message


def refused_weights(weights: Any) -> tuple[str, str]:
    return raised(lambda: SequenceLayout(16, weights=weights))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -0.5, 2.0], "weights must be finite numbers of at least 0; got -0.5 (float) for rank 1. Give the speed"),
        ([1.0, float("nan"), 2.0], "got nan (float) for rank 1"),
        ([1.0, "2", 2.0], "got '2' (str) for rank 1"),
        ([0.0, 0, 0], "weights are zero for all 3 ranks, and then nobody holds the tokens. Give at least one rank"),
        ([1.0, 2.0], "one number for each of the 3 ranks; got 2: [1.0, 2.0]. Give each rank's speed, in the order"),
        (2.0, "a list of 3 numbers, one for each rank; got 2.0 (float)"),
        (torch.ones(3, 1), "got a Tensor of torch.float32 and shape (3, 1). Pass weights.tolist()"),
    ],
)
def test_weights_that_are_none_are_refused_on_every_rank_alike(weights: Any, message: str) -> None:
    for kind, said in run_on_ranks(3, refused_weights, weights):
        assert kind == "LayoutError" and message in said, said


def test_documents_are_copied_and_may_be_a_tensor() -> None:
    documents = torch.tensor([0, 3, 8])
    layout = SequenceLayout.local(8, documents)
    documents[1] = 5
    assert layout.documents == (0, 3, 8)
    assert layout.num_documents == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_len": 3}, "shorter than the number of ranks 4"),
        ({"seq_len": 8.0}, "must be an int"),
        ({"order": "diagonal"}, "contiguous, zigzag"),
        ({"documents": [1, 16]}, r"\[0, ..., 16\]"),
        ({"documents": [0, 9, 4, 16]}, "entry 2 is 4 after 9"),
        ({"documents": [0, 4, 4, 16]}, "leave out documents of no tokens"),
        ({"documents": [0, 2, 4]}, "look like one rank's local cu_seqlens"),
        ({"documents": [0, 2, 15]}, "must end at seq_len 16"),
        ({"documents": torch.tensor([0.0, 16.0])}, "integer tensor"),
        ({"rank": 4}, "rank 4 is not one of 4 ranks"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        SequenceLayout.for_rank(**{"seq_len": 16, "num_ranks": 4, "rank": 1, **arguments})


def test_a_sequence_that_is_sharded_already_is_not_split_twice() -> None:
    layout = SequenceLayout.for_rank(16, 4, 1)
    with pytest.raises(LayoutError, match="sharded already"):
        layout.shard(torch.zeros(1, 4))
    with pytest.raises(LayoutError, match=r"take layout.shard\(x\) first"):
        layout.gather(torch.zeros(1, 16))
    with pytest.raises(LayoutError, match="shifted before the split"):
        layout.shard_labels(torch.zeros(1, 4, dtype=torch.int64))


def messages_of_wrong_groups() -> list[str]:
    pair = dist.new_group([0, 1])
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, 3), mesh_dim_names=("dp", "sp"))
    messages = []
    group: Any
    for group in (pair if dist.get_rank() == 2 else mesh, "sp"):
        try:
            SequenceLayout(16, group)
        except LayoutError as error:
            messages.append(str(error))
    sub = SequenceLayout(16, mesh["sp"])
    messages.append(f"{sub.rank} of {sub.num_ranks}")
    return messages


def test_groups_and_meshes() -> None:
    results = run_on_ranks(3, messages_of_wrong_groups)
    assert "not in the given group" in results[2][0]
    assert "one-dimensional DeviceMesh" in results[0][0]
    assert "got str" in results[0][1]
    assert [result[2] for result in results] == ["0 of 3", "1 of 3", "2 of 3"]


def disagreeing_layouts() -> str:
    rank = dist.get_rank()
    try:
        SequenceLayout(16, documents=[0, 8 + rank, 16]).verify()
    except LayoutError as error:
        return str(error)
    return ""


def test_ranks_that_disagree_are_told_apart_on_all_ranks() -> None:
    results = run_on_ranks(2, disagreeing_layouts)
    assert results[0] == results[1]
    assert "documents: rank 0 has (0, 8, 16), rank 1 has (0, 9, 16)" in results[0]


def test_without_a_process_group_a_layout_has_one_rank() -> None:
    layout = longspan.SequenceLayout(10, order="zigzag")
    assert (layout.num_ranks, layout.segments) == (1, ((0, 10),))
    x = torch.randn(1, 10)
    assert layout.shard(x) is x
    assert layout.gather(x) is x
