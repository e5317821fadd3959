"""What the benchmarks share: ranks and their values, tables, times taken in turn."""

from __future__ import annotations

import os
import time

import pytest
import torch.distributed as dist

from benchmarks.harness import BESIDE_ONE_RANK, Table, beside_one_rank, run_ranks


def _large(size: int) -> list[int]:
    # More than a pipe holds, so that a rank can only end while it is read.
    return [dist.get_rank()] * size


def _ends_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    time.sleep(60)


def test_values_come_by_rank() -> None:
    assert run_ranks(2, _large, 10**6) == [[0] * 10**6, [1] * 10**6]


def test_a_rank_that_ends_without_a_value_ends_the_measurement() -> None:
    with pytest.raises(SystemExit, match=r"a rank of _ends_on_rank_1 ended with code 7"):
        run_ranks(2, _ends_on_rank_1)


def test_two_ranks_beside_one_by_medians_and_by_the_least_time_of_each() -> None:
    cells = beside_one_rank(together=[0.1, 0.3, 0.2], alone=[0.3, 0.4, 0.25], busy=[0.5, 0.4, 0.6])
    assert len(cells) == len(BESIDE_ONE_RANK)
    row = dict(zip(BESIDE_ONE_RANK, map(str, cells), strict=True))
    assert row == {
        "ms, two ranks": "200",
        "ms, one rank": "300",
        "times as fast": "1.33 (1.25-3.00)",
        "ms, one rank, other core busy": "500",
        "times as fast, both cores busy": "3.00 (1.33-5.00)",
        "least ms, two ranks": "100",
        "least ms, one rank": "250",
        "times as fast, least": "2.50",
    }


def test_a_row_is_said_when_it_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("named", "A title", "nothing", ["side", "ms"])
    table.add("ours", 3)
    captured = capsys.readouterr()
    assert captured.err == "named: ours | 3\n" and captured.out == ""
    assert table.markdown().endswith("| side | ms |\n|---|---|\n| ours | 3 |\n")
