"""The GPU's benchmark: it runs through, refuses wrong results, and counts bytes and operations right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import gpu
from benchmarks.gpu_sides import Case, Inputs, exact, make_inputs, ours, step

CPU = gpu.Gpu(torch.device("cpu"), 1)


@pytest.fixture(autouse=True)
def one_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "OPERATORS", ("simple_gla",))


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
