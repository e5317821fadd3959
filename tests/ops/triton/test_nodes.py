"""Kernels as nodes: their names, and the device that they are launched on."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longspan.ops.triton.dispatch import on_device_of_first
from longspan.ops.triton.norm import gated_norm


def test_a_node_is_named_after_its_operator() -> None:
    x, gate, weight = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3), torch.ones(3)
    y = gated_norm(x, gate, weight, 1e-5, True)
    assert y.grad_fn is not None
    assert y.grad_fn.name() == "GatedNormBackward"


@pytest.mark.parametrize(("device", "expected"), [("cuda:1", 1), ("cuda:0", 0), ("cpu", 0)])
def test_kernels_are_launched_on_the_device_of_the_tensors(
    monkeypatch: pytest.MonkeyPatch, device: str, expected: int
) -> None:
    current = [0]

    @contextmanager
    def switched(to: torch.device) -> Any:
        before, current[0] = current[0], to.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", switched)
    launched = on_device_of_first(lambda x, other: (current[0], other))
    assert launched(SimpleNamespace(device=torch.device(device)), "more") == (expected, "more")
    assert current == [0]
