"""two_level: right for any shape of nodes, which come from the layout, a mesh or host names; little travels between nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import longspan
from longspan.comm import hosts
from longspan.errors import LayoutError
from longspan.exchange import TwoLevel, record_traffic
from longspan.layout import SequenceLayout
from longspan.state import ChannelDecay, Dense, Form, HeadDecay, Identity, ScalarDecay
from tests.compare import relative_error, worst
from tests.exchange.scan import errors_of_scan, layouts, random_rates, random_turns
from tests.ranks import raised, run_on_ranks

KINDS: list[Form] = [Identity, HeadDecay, ScalarDecay, ChannelDecay, Dense]


def errors_on_nodes(ranks_per_node: int, batch: int, num_heads: int, order: Any, is_mirrored: bool) -> list[float]:
    errors = []
    for layout in layouts(order, ranks_per_node=ranks_per_node):
        layout = layout.mirrored if is_mirrored else layout
        for kind in [*KINDS, random_rates(num_heads, 4), random_turns(num_heads, 4)]:
            errors += errors_of_scan(TwoLevel(), kind, (batch, num_heads, 4, 5), layout)
    return errors


@pytest.mark.slow_rows(r"8-2-zigzag|4-[14]-zigzag", r"-contiguous$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^8-4-zigzag$")
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(4, 1), (4, 2), (4, 4), (3, 1), (8, 2), (8, 4)])
def test_any_shape_of_nodes_is_the_scan(num_ranks: int, ranks_per_node: int, order: str) -> None:
    for errors in run_on_ranks(num_ranks, errors_on_nodes, ranks_per_node, 2, 5, order, False):
        assert worst(errors) < 1e-12


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^contiguous$")
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_the_mirrored_layout_has_its_runs_in_the_other_order(order: str) -> None:
    for errors in run_on_ranks(4, errors_on_nodes, 2, 2, 5, order, True):
        assert worst(errors) < 1e-12


@pytest.mark.slow_rows(r"1-3-contiguous|1-1-zigzag")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^1-3-zigzag$")
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("batch", "num_heads"), [(1, 1), (1, 3)])
def test_ranks_without_rows_take_part(batch: int, num_heads: int, order: str) -> None:
    for errors in run_on_ranks(8, errors_on_nodes, 4, batch, num_heads, order, False):
        assert worst(errors) < 1e-12


def traffic_of_exchange(ranks_per_node: int, order: Any) -> list[tuple[int, int]]:
    layout = SequenceLayout(64, order=order, ranks_per_node=ranks_per_node)
    with record_traffic() as traffic:
        errors_of_scan(TwoLevel(), ChannelDecay, (1, 16, 4, 5), layout, torch.float32)
    return [(event.bytes_sent, event.num_messages) for event in traffic.events]


# Eight ranks on nodes of four, and four on nodes of two.
@pytest.mark.slow_rows(r"^8-2-")
@pytest.mark.parametrize(("order", "segments"), [("contiguous", 1), ("zigzag", 2)])
@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(4, 2), (8, 2), (8, 4)])
def test_all_ranks_of_a_node_send_out_of_it_no_more_than_one_pair_and_what_comes_back(
    num_ranks: int, ranks_per_node: int, order: str, segments: int
) -> None:
    state, transition = 16 * 4 * 5 * 4, 16 * 4 * 4
    num_nodes = num_ranks // ranks_per_node

    def inside(numbers: int) -> tuple[int, int]:
        return segments * numbers * (ranks_per_node - 1) // ranks_per_node, ranks_per_node - 1

    def between(numbers: int) -> tuple[int, int]:
        return segments * numbers * (num_nodes - 1) // num_ranks, num_nodes - 1

    pair = state + transition
    for events in run_on_ranks(num_ranks, traffic_of_exchange, ranks_per_node, order):
        assert events[:4] == [inside(pair), between(pair), between(state), inside(state)]
        assert events[4:] == [inside(state), between(state), between(state), inside(state)]
        assert ranks_per_node * sum(event[0] for event in events[1:3]) < segments * (2 * state + transition)


def layer_on_mesh(shape: tuple[int, ...], names: tuple[str, ...], part: Any) -> tuple[int | None, list[str], float]:
    mesh: Any = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)
    layout = SequenceLayout(24, mesh[part] if part else mesh)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 24, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    g = -torch.rand(1, 24, 2, generator=generator, dtype=torch.float64)
    expected = longspan.write("simple_gla", k, v, g=g).read(q)
    with record_traffic() as traffic:
        own = [layout.shard(x) for x in (q, k, v, g)]
        o = longspan.write("simple_gla", own[1], own[2], g=own[3], layout=layout, exchange="two_level").read(own[0])
    error = relative_error(layout.gather(o), expected)
    assert SequenceLayout(24, mesh[part] if part else mesh).group is layout.group
    return layout.ranks_per_node, [event.name for event in traffic.events], error


def test_a_mesh_of_nodes_and_ranks_says_what_the_nodes_are() -> None:
    for size, events, error in run_on_ranks(4, layer_on_mesh, (2, 2), ("node", "sp"), None):
        assert (size, len(events)) == (2, 4)
        assert error < 1e-12


def test_a_mesh_of_nodes_and_ranks_may_be_a_part_of_a_larger_one() -> None:
    for size, events, error in run_on_ranks(8, layer_on_mesh, (2, 2, 2), ("dp", "node", "sp"), ("node", "sp")):
        assert (size, len(events)) == (2, 4)
        assert error < 1e-12


def layout_of_mesh(shape: tuple[int, ...], names: tuple[str, ...], ranks_per_node: int | None) -> None:
    SequenceLayout(
        24, dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names), ranks_per_node=ranks_per_node
    )


@pytest.mark.parametrize(
    ("shape", "names", "ranks_per_node", "message"),
    [
        ((2, 2), ("dp", "sp"), None, 'named "node"'),
        ((2, 1, 2), ("node", "x", "sp"), None, 'mesh["node", "sp"]'),
        ((2, 2), ("node", "sp"), 4, "the mesh has 2 ranks in each node"),
    ],
)
def test_a_mesh_of_another_kind_is_refused(
    shape: tuple[int, ...], names: tuple[str, ...], ranks_per_node: int | None, message: str
) -> None:
    for name, text in run_on_ranks(4, raised, layout_of_mesh, shape, names, ranks_per_node):
        assert name == "LayoutError"
        assert message in text


def scan_on_hosts(names: list[str]) -> None:
    group = dist.new_group(list(range(len(names))))
    original = hosts.socket.gethostname
    hosts.socket.gethostname = lambda: names[dist.get_rank()]
    try:
        errors_of_scan(TwoLevel(), Identity, (1, 2, 4, 5), SequenceLayout(64, group))
    finally:
        hosts.socket.gethostname = original


def test_hosts_that_are_no_nodes_are_refused_on_every_rank_with_the_way_out() -> None:
    for name, text in run_on_ranks(3, raised, scan_on_hosts, ["one", "two", "one"]):
        assert name == "LayoutError"
        assert "'two_level'" in text
        assert "one (1), two (1), one (1)" in text
        assert "'all_to_all'" in text


@pytest.mark.parametrize("ranks_per_node", [0, 3, 8, True, 2.0])
def test_nodes_must_have_equally_many_ranks(ranks_per_node: Any) -> None:
    with pytest.raises(LayoutError, match="ranks_per_node"):
        SequenceLayout.for_rank(64, 4, 1, ranks_per_node=ranks_per_node)
