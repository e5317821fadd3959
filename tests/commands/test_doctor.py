"""``longspan doctor``: each verdict, with its remedy, and the exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longspan.cli import main
from longspan.commands import examination
from longspan.commands.examination import (
    Finding,
    alike,
    backends,
    clocks,
    compute,
    cores,
    kernels,
    lines,
    open_files,
    room,
)
from tests import copied
from tests.commands.test_torchrun import SUBJECTS


def test_findings_are_judged() -> None:
    assert [open_files(limit).verdict for limit in (-1, 1024, 65536)] == ["ok", "warning", "ok"]
    assert "ulimit -n" in open_files(1024).remedy
    assert [cores(2, local, 1).verdict for local in (1, 2, 3)] == ["ok", "ok", "warning"]
    assert [clocks(offset).verdict for offset in (0.001, 5.0)] == ["ok", "warning"]
    assert "NTP" in clocks(5.0).remedy
    assert backends(torch.device("cpu")).verdict == "ok"
    assert backends(torch.device("cuda")).verdict == ("ok" if torch.distributed.is_nccl_available() else "error")
    assert "GFLOP/s in float32" in compute(torch.device("cpu")).found
    assert kernels(torch.device("cpu")).verdict == "ok"


def test_room_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert room("disk", tmp_path, 1, "Make room").verdict == "ok"
    short = room("disk", tmp_path, 2**80, "Make room")
    assert short.verdict == "warning" and short.line().endswith("Make room")
    assert room("disk", tmp_path / "absent", 1, "Make room").verdict == "warning"
    monkeypatch.setattr(examination.os, "access", lambda *arguments: False)
    assert room("disk", tmp_path, 1, "Make room").verdict == "error"


def test_ranks_that_differ_are_an_error_that_names_them() -> None:
    rank = {"host": "a", "versions": "torch 2.13", "device": "cuda"}
    assert alike([rank, rank | {"host": "b"}]).found == "2 ranks on 2 hosts, the same versions everywhere"
    found = alike([rank, rank, rank | {"host": "b", "versions": "torch 2.12"}])
    assert found.verdict == "error"
    assert found.found == "versions differ: rank 0 has torch 2.13; rank 2 on b has torch 2.12"
    assert "device differ" in alike([rank, rank | {"device": "cpu"}]).found


def test_ranks_that_agree_are_one_line_and_the_worst_decides() -> None:
    good, bad = (
        Finding("ok", "open files", "at most 65,536"),
        Finding("warning", "open files", "at most 1,024", "Raise it"),
    )
    text, failed = lines([[good.to_json()], [good.to_json()]])
    assert text == "ok       open files     at most 65,536\n\n0 errors, 0 warnings\n" and not failed
    text, failed = lines([[good.to_json()], [bad.to_json()]])
    assert text.splitlines()[:2] == [
        "ok       open files     rank 0: at most 65,536",
        "warning  open files     rank 1: at most 1,024. Raise it",
    ]
    assert not failed
    _, failed = lines([[good.to_json()], [Finding("error", "open files", "none").to_json()]])
    assert failed


def test_of_what_is_measured_the_rank_with_least_is_shown() -> None:
    ranks = [[Finding("ok", "device", f"{rate} GFLOP/s", amount=rate).to_json()] for rate in (90.0, 40.0, 88.0)]
    assert lines(ranks)[0].splitlines()[0] == "ok       device         rank 1, which has least: 40.0 GFLOP/s"
    assert lines([ranks[1], ranks[1]])[0].splitlines()[0] == "ok       device         40.0 GFLOP/s"
    short = [Finding("warning", "disk", "1.0 GiB free", "Make room", 1.0).to_json()]
    ranks = [[Finding("ok", "disk", "90.0 GiB free", amount=90.0).to_json()], short]
    assert lines(ranks)[0].splitlines()[:2] == [
        "ok       disk           rank 0: 90.0 GiB free",
        "warning  disk           rank 1: 1.0 GiB free. Make room",
    ]


def test_the_command_looks_at_a_group_of_this_machine() -> None:
    done = copied.run(["doctor"])
    assert done.returncode == 0, done.stderr
    printed = done.stdout.decode()
    subjects = [line[9:23].strip() for line in printed.splitlines() if line[:8].strip() in ("ok", "warning", "error")]
    assert subjects == SUBJECTS
    assert "MB/s" in printed and "0 errors" in printed


def test_a_group_of_no_ranks_and_no_time_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--ranks", "0"]) == 2
    assert "ranks must be at least 1" in capsys.readouterr().err
    for seconds in ("0", "-1", "nan", "inf"):
        assert main(["doctor", "--timeout-seconds", seconds]) == 2
        assert "timeout-seconds must be a finite number greater than 0; got" in capsys.readouterr().err
