"""`method="auto"`: the same on every rank, never out of memory's bounds, and the cheapest by the count."""

from __future__ import annotations

import pytest

from longspan.attention.softmax.all_gather import LARGEST_SHARE, gathered_share
from longspan.attention.softmax.attention import write_softmax
from longspan.attention.softmax.choice import METHODS, choose
from longspan.attention.softmax.shapes import Shapes
from longspan.layout import Order, SequenceLayout
from longspan.layout.visibility import Visibility
from longspan.plan import stated_cluster
from tests.attention.softmax_reference import random_inputs
from tests.ranks import run_on_ranks


def chosen(
    num_ranks: int,
    tokens: int,
    heads: tuple[int, int],
    order: Order = "zigzag",
    window: int | None = None,
    device: str = "cuda",
) -> str:
    visibility = Visibility((0, tokens), True, window)
    shapes = Shapes(1, *heads, 128, 2)
    answers = {
        choose(SequenceLayout.for_rank(tokens, num_ranks, rank, order), visibility, shapes, device)
        for rank in range(num_ranks)
    }
    assert len(answers) == 1
    return answers.pop()


def test_every_rank_chooses_the_same() -> None:
    for num_ranks in (2, 3, 8):
        for order in ("contiguous", "zigzag"):
            for device in ("cpu", "cuda"):
                chosen(num_ranks, 1001, (6, 2), order, device=device)


def test_a_window_shorter_than_a_segment_takes_all_gather() -> None:
    assert chosen(8, 65536, (32, 8), window=512) == "all_gather"


def test_ulysses_balances_a_causal_mask_over_contiguous_shards() -> None:
    assert chosen(4, 65536, (32, 8), order="contiguous") == "ulysses"
    assert chosen(4, 65536, (33, 11), order="contiguous") != "ulysses"


def test_keys_that_would_fill_the_memory_are_not_gathered() -> None:
    layout = SequenceLayout.for_rank(65536, 16, 0, "zigzag")
    visibility = Visibility((0, 65536), True, None)
    assert gathered_share(layout, visibility, Shapes(1, 6, 6, 128, 2)) > LARGEST_SHARE
    assert chosen(16, 65536, (6, 6)) == "ring"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("method", METHODS)
def test_costs_grow_with_rows_and_tokens(method: str, device: str) -> None:
    def of(tokens: int, rows: int) -> float:
        layout = SequenceLayout.for_rank(tokens, 4, 0, "zigzag")
        shapes = Shapes(rows, 8, 2, 64, 2)
        cluster = stated_cluster(device, 4, 4)
        return METHODS[method].seconds(layout, Visibility((0, tokens), True, None), shapes, cluster)

    assert of(1024, 1) < of(1024, 4) < of(4096, 4)


def test_a_layer_is_priced_by_the_size_of_its_keys_and_of_its_values() -> None:
    narrow, wide = Shapes(1, 8, 2, 192, 2, 128), Shapes(1, 8, 2, 192, 2)
    assert (narrow.key_bytes, narrow.query_bytes) == (2 * 320 * 2, 8 * 320 * 2)
    assert (wide.key_bytes, wide.query_bytes) == (2 * 384 * 2, 8 * 384 * 2)
    cluster = stated_cluster("cuda", 4, 4)
    # Kernels pad the narrower of the two.
    assert (
        narrow.pair_seconds(cluster) == wide.pair_seconds(cluster) == Shapes(1, 8, 2, 128, 2, 192).pair_seconds(cluster)
    )


def method_of_auto() -> str:
    layout = SequenceLayout(64, order="zigzag")
    _, k, v, _ = (layout.shard(x) for x in random_inputs(0, 1, 64, 4, 2, 8))
    return write_softmax(k, v, layout=layout, num_heads=4).method


def test_auto_says_what_it_has_chosen() -> None:
    layout = SequenceLayout.for_rank(64, 2, 0, "zigzag")
    want = choose(layout, Visibility((0, 64), True, None), Shapes(1, 4, 2, 8, 8), "cpu")
    assert run_on_ranks(2, method_of_auto) == [want, want]
