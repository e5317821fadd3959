"""Which ranks share a node: hosts of equally many consecutive ranks, asked once; groups of nodes and rails are made once."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from longspan.comm import hosts
from longspan.comm.groups import kept
from longspan.comm.hosts import nodes_of, ranks_per_host
from longspan.errors import LayoutError
from tests.ranks import raised, run_on_ranks


@pytest.mark.parametrize(
    ("names", "size"), [(["a"], 1), (["a", "a"], 2), (["a", "b"], 1), (["b", "b", "a", "a"], 2), (["a"] * 3, 3)]
)
def test_hosts_with_equally_many_consecutive_ranks_are_nodes(names: list[str], size: int) -> None:
    assert ranks_per_host(names) == size


@pytest.mark.parametrize("names", [["a", "b", "a", "b"], ["a", "a", "b"], ["a", "b", "b", "a"]])
def test_other_hosts_are_refused_with_the_way_out(names: list[str]) -> None:
    with pytest.raises(LayoutError, match=r"a \(\d\), b \(\d\).*pass ranks_per_node"):
        ranks_per_host(names)


def nodes_by_names(names: list[str]) -> Any:
    """The nodes of ranks whose hosts would have these names."""
    asked = []

    def gethostname() -> str:
        asked.append(1)
        return names[dist.get_rank()]

    group = dist.new_group(list(range(len(names))))
    original = hosts.socket.gethostname
    hosts.socket.gethostname = gethostname
    try:
        found = [nodes_of(group) for _ in range(2)]
    finally:
        hosts.socket.gethostname = original
    assert found[0] == found[1]
    return found[0], len(asked)


def test_nodes_are_hosts_unless_the_caller_says_otherwise_and_hosts_are_asked_once() -> None:
    results = run_on_ranks(4, nodes_by_names, ["one", "one", "two", "two"])
    assert [(found.node, found.place, found.num_nodes) for found, _ in results] == [
        (0, 0, 2),
        (0, 1, 2),
        (1, 0, 2),
        (1, 1, 2),
    ]
    assert [asked for _, asked in results] == [1, 1, 1, 1]


def test_hosts_that_are_no_nodes_are_refused_on_every_rank_before_any_exchange() -> None:
    for name, message in run_on_ranks(3, raised, nodes_by_names, ["one", "two", "one"]):
        assert name == "LayoutError"
        assert "one (1), two (1), one (1)" in message


def groups_made() -> list[int]:
    group = dist.new_group(list(range(4)))
    assert isinstance(group, dist.ProcessGroup)
    nodes = hosts.nodes_of(group, ranks_per_node=2)
    made = [hosts.node_group, hosts.rail_group]
    found = [[id(make(group, nodes, "forward")) for make in made] for _ in range(2)]
    assert found[0] == found[1]
    assert kept(group, "host names", list) == []
    return [dist.get_world_size(make(group, nodes, "backward")) for make in made]


def test_groups_of_nodes_and_rails_are_made_once_and_hosts_not_asked_where_the_caller_knows() -> None:
    assert run_on_ranks(4, groups_made) == [[2, 2]] * 4
