"""Blocks: their pairs are the pairs that see each other, once each, in squares and rectangles that the kernels know."""

from __future__ import annotations

import random
from bisect import bisect_right
from itertools import pairwise

import pytest

from longspan.layout import Order, SequenceLayout
from longspan.layout.visibility import (
    Run,
    Visibility,
    VisibleBlock,
    difference,
    intersection,
    inverse_places,
    located,
    needed_keys,
    plan_blocks,
    union,
)


def positions(runs: list[Run]) -> list[int]:
    return [position for start, stop in runs for position in range(start, stop)]


def sees(visibility: Visibility, query: int, key: int) -> bool:
    same = bisect_right(visibility.documents, query) == bisect_right(visibility.documents, key)
    near = visibility.window is None or abs(query - key) < visibility.window
    return same and near and (key <= query or not visibility.causal)


def pairs_of(block: VisibleBlock) -> list[tuple[int, int]]:
    visible = {
        "full": lambda query, key: True,
        "causal": lambda query, key: key <= query,
        "anticausal": lambda query, key: key >= query,
    }[block.mask]
    return [
        (block.query_start + shift + query, block.key_start + shift + key)
        for shift in range(0, max(1, block.count * block.period), max(1, block.period))
        for query in range(block.num_queries)
        for key in range(block.num_keys)
        if visible(query, key)
    ]


def random_setting(generator: random.Random) -> tuple[Visibility, list[Run], int]:
    """A visibility over a number of tokens, and runs that make them up."""
    tokens = generator.randint(1, 40)
    cuts = {generator.randrange(tokens) for _ in range(generator.choice([0, 0, 1, 3, 6]))} | {0, tokens}
    visibility = Visibility(
        tuple(sorted(cuts)), generator.random() < 0.6, generator.choice([None, None, 1, 2, 3, 5, 8, 20])
    )
    bounds = sorted([0, tokens, *(generator.randint(0, tokens) for _ in range(generator.randint(0, 5)))])
    return visibility, list(pairwise(bounds)), tokens


@pytest.mark.parametrize("seed", range(4))
def test_blocks_hold_every_visible_pair_once(seed: int) -> None:
    generator = random.Random(seed)
    for _ in range(300):
        visibility, runs, _ = random_setting(generator)
        queries = generator.sample(runs, generator.randint(1, min(2, len(runs))))
        own = generator.random() < 0.4
        keys = queries if own else generator.sample(runs, generator.randint(1, len(runs)))
        want = [
            (i, j)
            for i, query in enumerate(positions(queries))
            for j, key in enumerate(positions(keys))
            if sees(visibility, query, key)
        ]
        blocks = plan_blocks(queries, keys, visibility, opening=own)
        assert sorted(pair for block in blocks for pair in pairs_of(block)) == want, (visibility, queries, keys)
        assert sum(block.num_pairs for block in blocks) == len(want)
        assert all(block.mask == "full" or block.num_queries == block.num_keys for block in blocks)
        opened = sorted({query for block in blocks if block.opens for query, _ in pairs_of(block)})
        assert opened == (list(range(len(positions(queries)))) if own else [])
        assert sum(block.count * block.num_queries for block in blocks if block.opens) == len(opened)


def test_needed_keys_are_those_that_some_query_sees() -> None:
    generator = random.Random(5)
    for _ in range(300):
        visibility, runs, tokens = random_setting(generator)
        queries = generator.sample(runs, 1)
        seen = [key for key in range(tokens) if any(sees(visibility, query, key) for query in positions(queries))]
        assert positions(needed_keys(queries, visibility)) == seen
        assert visibility.num_pairs(queries[0]) == sum(
            sees(visibility, query, key) for query in positions(queries) for key in range(tokens)
        )


def test_runs_are_sets_of_positions() -> None:
    generator = random.Random(6)
    for _ in range(200):
        _, left, _ = random_setting(generator)
        _, right, _ = random_setting(generator)
        left, right = (sorted(generator.sample(runs, generator.randint(0, len(runs)))) for runs in (left, right))
        a, b = set(positions(left)), set(positions(right))
        assert set(positions(union([*left, *right]))) == a | b
        assert positions(intersection(left, right)) == sorted(a & b)
        assert positions(difference(left, right)) == sorted(a - b)
        generator.shuffle(right)
        buffer = positions(right)
        found = positions(located(left, right))
        assert [buffer[place] for place in found] == [position for position in positions(left) if position in b]


def test_an_inverse_puts_tokens_where_they_go() -> None:
    places = [(4, 7), (0, 1), (3, 4), (1, 3)]
    sources = positions(inverse_places(places))
    assert [positions(places)[source] for source in sources] == list(range(7))


def shapes(layout: SequenceLayout, keys: list[Run], visibility: Visibility) -> list[tuple[int, int, str, int]]:
    blocks = plan_blocks(layout.segments, keys, visibility)
    return sorted((block.num_queries, block.num_keys, block.mask, block.count) for block in blocks)


def test_a_ranks_own_tokens_are_one_square_in_either_order() -> None:
    orders: tuple[Order, ...] = ("contiguous", "zigzag")
    for order in orders:
        layout = SequenceLayout.for_rank(48, 3, 1, order)
        assert shapes(layout, list(layout.segments), Visibility((0, 48), True, None)) == [(16, 16, "causal", 1)]
        assert shapes(layout, list(layout.segments), Visibility((0, 48), False, None)) == [(16, 16, "full", 1)]


def test_keys_of_other_ranks_that_both_segments_see_are_one_block() -> None:
    layout = SequenceLayout.for_rank(48, 3, 1, "zigzag")
    causal = Visibility((0, 48), True, None)
    # Segments of 8 tokens; rank 1 holds the second and the fifth, and sees the first, third and fourth.
    assert shapes(layout, [(0, 8), (40, 48)], causal) == [(16, 8, "full", 1)]
    assert shapes(layout, [(16, 24), (24, 32)], causal) == [(8, 16, "full", 1)]
    assert shapes(layout, [(40, 48)], causal) == []


def test_a_window_is_two_squares_for_each_window_of_queries_grouped_into_one_call_each() -> None:
    layout = SequenceLayout.local(48)
    blocks = plan_blocks([(0, 48)], [(0, 48)], Visibility((0, 48), True, 8), opening=True)
    assert [(x.num_queries, x.mask, x.count, x.period) for x in blocks] == [
        (8, "causal", 6, 8),
        (7, "anticausal", 5, 8),
    ]
    assert layout.segments == ((0, 48),)


def test_equal_documents_are_one_call() -> None:
    (block,) = plan_blocks([(0, 48)], [(0, 48)], Visibility((0, 16, 32, 48), True, None), opening=True)
    assert (block.num_queries, block.mask, block.count, block.period) == (16, "causal", 3, 16)
