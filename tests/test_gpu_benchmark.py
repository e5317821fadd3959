"""The GPU's benchmark: it runs through, refuses wrong results, and counts bytes and operations right."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import gpu, host
from benchmarks.gpu_sides import Case, Inputs, exact, make_inputs, ours, step

CPU = gpu.Gpu(torch.device("cpu"), 1)


@pytest.fixture(autouse=True)
def one_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "OPERATORS", ("simple_gla",))


# Tables by PyTorch's kernels are made in make test, below.
@pytest.mark.slow
def test_every_table_is_made_on_the_interpreter_and_none_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--interpreter", "--out", str(out)])
    gpu.main()
    printed = capsys.readouterr().out
    for name in gpu.TABLES:
        assert f"{name}: {'0' if name == 'softmax' else ''}" in printed
    assert "| ms" not in printed
    assert not out.exists()


class Pretended(gpu.Gpu):
    """The CPU, taken for a GPU whose clock ticks evenly."""

    is_real = True

    def wait(self) -> None:
        pass

    def seconds(self, function: Callable[[], object]) -> float:
        function()
        return 0.002


def test_tables_on_a_gpu_have_a_figure_in_every_column(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With kernels by PyTorch, a peer that agrees, and a clock that always says two milliseconds."""
    by_torch = partial(ours, backend="torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(gpu, "measured", lambda _: Pretended(CPU.device, 3, copy_rate=1e9, matmul_rate=1e9))
    monkeypatch.setattr(gpu, "ours", by_torch)
    monkeypatch.setattr(gpu, "fla_side", lambda case: by_torch)
    # float16 is the kernels' alone.
    monkeypatch.setattr(gpu, "TOLERANCE", {torch.float32: 1e-4, torch.bfloat16: 2e-2})
    monkeypatch.setattr(torch, "compile", lambda function: function)
    out = tmp_path / "gpu.json"
    names = [name for name in gpu.TABLES if name != "softmax"]
    monkeypatch.setattr(sys, "argv", ["gpu", "--quick", "--out", str(out), *names])
    gpu.main()
    printed = capsys.readouterr().out
    saved = json.loads(out.read_text())
    assert saved["machine"]["gpu"] == "a GPU"
    assert [table["name"] for table in saved["tables"]] == names
    for table in saved["tables"]:
        assert table["rows"], table["name"]
        for row in table["rows"]:
            assert len(row) == len(table["columns"]), table["name"]
            assert all(row), (table["name"], row)
            assert "| " + " | ".join(row) + " |" in printed
    speed = next(table for table in saved["tables"] if table["name"] == "speed")
    by_pass = {row[1]: row for row in speed["rows"]}
    assert by_pass["forward"][2:5] == ["2.000", "2.000", "1.00 (1.00-1.00)"]


def test_a_peer_that_cannot_or_differs_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(inputs: Inputs) -> Tensor:
        raise NotImplementedError

    by_torch = partial(ours, backend="torch")
    monkeypatch.setattr(gpu, "ours", by_torch)
    for peer, note in (
        (raises, "NotImplementedError"),
        (lambda inputs: 2 * by_torch(inputs), "differs by"),
        (None, "not installed"),
    ):
        monkeypatch.setattr(gpu, "fla_side", lambda case, peer=peer: peer)
        for row in gpu.speed(CPU, quick=True).rows:
            assert row[3].startswith(note)
            assert row[4].startswith(note)


def test_a_wrong_kernel_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(inputs: Inputs) -> Tensor:
        return 1.1 * ours(inputs, backend="torch")

    monkeypatch.setattr(gpu, "ours", wrong)
    monkeypatch.setattr(gpu, "TOLERANCE", {torch.float32: 1e-4})
    with pytest.raises(SystemExit, match=r"simple_gla in torch\.float32: relative error"):
        gpu.correctness(CPU, quick=True)


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        gpu.main()


def test_inputs_are_the_same_for_all_sides_and_the_reference_is_exact() -> None:
    case = Case("gla", 20, 8, heads=1, dtype=torch.float32)
    inputs = make_inputs(case, CPU.device)
    got = step(lambda x: ours(x, backend="torch"), inputs)
    assert gpu.largest_error(got, exact(inputs)) < 1e-5
    assert gpu.largest_error((torch.tensor([float("nan")]),), (torch.ones(1),)) == float("inf")


def test_bytes_and_operations_are_counted_once() -> None:
    case = Case("simple_gla", 1024, 128, heads=2)
    # q, k, v, o in bfloat16 and a float32 gate; backward also reads ∂o and writes four gradients, and reads q, k, v again.
    assert case.ideal_bytes(backward=False) == 2048 * (4 * 256 + 4)
    assert case.ideal_bytes(backward=True) == 2048 * (11 * 256 + 12)
    assert case.operations(backward=False) == 2048 * (4 * 64 * 128 + 6 * 128**2)


def test_the_hosts_time_is_measured_without_launches_which_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "OPERATORS", ("simple_gla",))
    monkeypatch.setattr(host, "fla_side", lambda case: None)
    (row,) = host.kernel_host(quick=True).rows
    # Write, scan, read; ∂q, the states' gradients and their scan, ∂k, ∂v, ∂g.
    assert row[:2] == ["simple_gla", "9"]
    assert float(row[2]) > 0
    assert row[4] == "not installed"
    monkeypatch.setattr(host, "fla_side", lambda case: partial(ours, backend="torch"))
    (row,) = host.kernel_host(quick=True).rows
    assert row[1] == "9"
    assert row[3] == "0"
