"""``longspan plan exchange``: rates and times with units, and the table for a cluster given by numbers."""

from __future__ import annotations

import pytest

from longspan.cli import main
from longspan.commands.plan_exchange import PlanExchange
from longspan.commands.units import bytes_per_second, seconds
from longspan.errors import ConfigError
from longspan.exchange import TOPOLOGIES
from longspan.state import ChannelDecay


@pytest.mark.parametrize(
    ("text", "rate"),
    [("1gbit", 125e6), ("100mbit", 12.5e6), ("400Gbit", 50e9), ("45GB", 45e9), ("1.5 MB", 1.5e6), ("2e3kB", 2e6)],
)
def test_a_rate_is_in_bits_or_bytes_a_second(text: str, rate: float) -> None:
    assert bytes_per_second(text) == pytest.approx(rate)


@pytest.mark.parametrize(("text", "time"), [("15us", 15e-6), ("15µs", 15e-6), ("0.2ms", 2e-4), ("1s", 1.0)])
def test_a_time_has_its_unit(text: str, time: float) -> None:
    assert seconds(text) == pytest.approx(time)


def test_a_quantity_without_its_unit_is_refused() -> None:
    with pytest.raises(ConfigError, match="'12' is not a rate such as 1gbit"):
        bytes_per_second("12")
    with pytest.raises(ConfigError, match="'15 apples' is not a time such as 15us"):
        seconds("15 apples")


def test_the_options_make_the_cluster_and_the_layer() -> None:
    options = PlanExchange(ranks=32, ranks_per_node=8, inter_bandwidth="200gbit", links_per_node=2, order="zigzag")
    cluster, problem = options.cluster(), options.problem(ChannelDecay)
    assert (cluster.num_nodes, cluster.inter.bandwidth, cluster.inter.sharing, cluster.rings) == (4, 25e9, 4.0, 2)
    assert (problem.segments_per_rank, problem.state, problem.pair) == (2, 16 * 128 * 128 * 4, 16 * 128 * 129 * 4)
    assert PlanExchange(bfloat16=True).problem(ChannelDecay).state == 16 * 128 * 128 * 2


def test_the_command_prints_a_line_for_each_topology_cheapest_first(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--ranks 512 --ranks-per-node 8 --inter-bandwidth 400gbit --heads 16 --key-size 64 --value-size 128"
    assert main(["plan", "exchange", *arguments.split(), "--operator", "gla", "--compute", "2ms"]) == 0
    printed = capsys.readouterr().out
    options = PlanExchange(ranks=512, key_size=64)
    problem, cluster = options.problem(ChannelDecay), options.cluster()
    lines = printed.splitlines()
    assert "modelled" in lines[0] and "512 ranks on 64 nodes of 8" in lines[1]
    names = [line.split()[0] for line in lines[4:]]
    assert sorted(names) == ["all_gather", "all_to_all", "pipelined", "ring", "two_level"]
    totals = [TOPOLOGIES[name]().cost(problem, cluster).seconds for name in names]
    assert totals == sorted(totals)
    for name, line in zip(names, lines[4:], strict=True):
        cost = TOPOLOGIES[name]().cost(problem, cluster)
        exposed = cost.forward.exposed(2e-3) + cost.backward.exposed(2e-3)
        for figure in (f"{cost.seconds * 1e3:.3f}", f"{exposed * 1e3:.3f}", f"{cost.bytes_sent:,}"):
            assert f" {figure} " in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exchange", "--ranks", "10"], "10 ranks do not make nodes of 8"),
        (["exchange", "--operator", "nothing"], "operator must be one of linear_attention, retention"),
        (["exchange", "--inter-latency", "3"], "'3' is not a time"),
        ([], "plan takes what to look at, which is train or exchange; got nothing"),
        (["layers"], "plan takes what to look at, which is train or exchange; got layers"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("longspan: error: ") and message in printed.err
    assert printed.out == ""
