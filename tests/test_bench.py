"""``longspan bench exchange``: right results only, bytes and messages as counted, a table and a file."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.cli import main
from longspan.commands import bench_exchange as bench
from longspan.commands.bench_options import BenchExchange
from longspan.exchange import TOPOLOGIES, Arrived, Carrier, Handle, Pipelined, Ring, Topology
from longspan.layout import SequenceLayout
from longspan.plan import Problem, gpu_cluster
from longspan.state import ChannelDecay, Pair
from tests.ranks import raised, run_on_ranks

TINY = BenchExchange(heads=2, key_size=4, value_size=6, repeats=2, topologies=("ring", "all_to_all", "auto"))


def figures_of(options: BenchExchange) -> Any:
    return bench.measure(options, torch.device("cpu"))


def test_each_topology_is_measured_both_ways_with_what_it_sends() -> None:
    for figures in run_on_ranks(2, figures_of, TINY):
        assert [row.topology for row in figures.rows] == ["ring", "all_to_all", "auto"]
        assert figures.num_ranks == 2 and "2 ranks on 1 node" in figures.cluster
        problem = Problem(num_ranks=2, num_rows=2, key_size=4, value_size=6, transition=ChannelDecay)
        for row in figures.rows:
            assert row.forward_seconds > 0 and row.backward_seconds > 0
            assert row.low_seconds <= row.seconds <= row.high_seconds
            name = figures.choice if row.topology == "auto" else row.topology
            assert row.modelled.topology == name
            topology = Pipelined(None, row.modelled.num_blocks) if name == "pipelined" else TOPOLOGIES[name]()
            expected = topology.cost(problem, gpu_cluster(2))
            assert (row.bytes_sent, row.num_messages) == (expected.bytes_sent, expected.num_messages)


def test_neighbour_is_measured_where_nothing_is_left_of_a_state_and_refused_elsewhere() -> None:
    forgetting = replace(TINY, operator="retention", log_decay=-200.0, topologies=("neighbour", "auto"))
    for figures in run_on_ranks(3, figures_of, forgetting):
        assert [row.num_messages for row in figures.rows][:1] == [2]
    for name, _ in run_on_ranks(3, raised, figures_of, replace(forgetting, log_decay=None)):
        assert name == "LayoutError"


class WrongForward(Ring, Carrier):
    """A ring whose last rank receives a wrong state."""

    def resolve(self, pair: Pair, layout: SequenceLayout) -> Carrier:
        return self

    def start(self, pair: Pair, layout: SequenceLayout) -> Handle:
        true = Ring().resolve(pair, layout).start(pair, layout).wait()
        is_last = layout.rank == layout.num_ranks - 1

        class Received(Handle):
            def wait(self) -> Arrived:
                return replace(true, incoming=true.incoming * 1.5 if is_last else true.incoming)

        return Received()

    def start_reverse(
        self, kind: Any, context: tuple[Tensor, ...], grad_incoming: Tensor, layout: SequenceLayout
    ) -> Any:
        pair = Pair(kind(*context), grad_incoming)
        return Ring().resolve(pair, layout).start_reverse(kind, context, grad_incoming, layout)


class NaNBackward(WrongForward):
    """A ring that loses the gradient on one rank."""

    def start(self, pair: Pair, layout: SequenceLayout) -> Handle:
        return Ring().resolve(pair, layout).start(pair, layout)

    def start_reverse(
        self, kind: Any, context: tuple[Tensor, ...], grad_incoming: Tensor, layout: SequenceLayout
    ) -> Any:
        grads = grad_incoming * torch.nan if layout.rank == 1 else grad_incoming
        return super().start_reverse(kind, context, grads, layout)


def measure_wrong(wrong: type[Topology]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TOPOLOGIES, "ring", wrong)
        bench.measure(replace(TINY, topologies=("ring",)), torch.device("cpu"))


@pytest.mark.parametrize(("wrong", "direction"), [(WrongForward, "forward"), (NaNBackward, "backward")])
def test_a_wrong_result_is_not_timed_and_every_rank_says_so(wrong: type[Topology], direction: str) -> None:
    for name, message in run_on_ranks(3, raised, measure_wrong, wrong):
        assert name == "WrongResultError"
        assert f"ring does not compute the scan {direction}" in message and "no figure is reported" in message


@pytest.mark.slow
def test_the_command_starts_its_ranks_prints_the_table_and_writes_the_figures(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    arguments = "--ranks 2 --operator gated_delta_rule --heads 2 --key-size 4 --value-size 6 --repeats 2 --order zigzag"
    command = [sys.executable, "-m", "longspan", "bench", "exchange", *arguments.split()]
    command += ["--topologies", "all_gather", "pipelined", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("gated_delta_rule, B1 H2 K4 V6, zigzag, 2 ranks on cpu, median of 2")
    assert {line.split()[0] for line in lines[4:6]} == {"all_gather", "pipelined"}
    assert lines[-1].startswith("auto takes ")
    record = json.loads(path.read_text())
    assert record["options"]["operator"] == "gated_delta_rule"
    assert {row["topology"] for row in record["rows"]} == {"all_gather", "pipelined"}
    assert all(row["modelled"]["forward"]["seconds"] > 0 for row in record["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exchange", "--ranks", "1"], "an exchange takes at least 2 ranks; got 1"),
        (["exchange", "--operator", "nothing"], "operator must be one of linear_attention"),
        (["exchange", "--topologies", "telepathy"], "topologies must be among all_gather"),
        (["exchange", "--ranks-per-node", "3"], "ranks_per_node 3 does not divide 4 ranks"),
        (["exchange", "--repeats", "0"], "repeats must be at least 1; got 0"),
        (["all"], "bench takes what to look at, which is exchange; got all"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_rank_starts(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("longspan: error: ") and message in printed.err
    assert printed.out == ""
