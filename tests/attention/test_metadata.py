"""What calls without a layout need to know of their tokens is made once per length and device, in every operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import longspan
from longspan.layout import calls, sequence_layout
from longspan.ops.variants import VARIANTS
from tests.variants import make_inputs

HEADS, SIZE = 2, 4


def x_of(seq_len: int, *sizes: int) -> Tensor:
    return torch.randn(1, seq_len, *sizes, generator=torch.Generator().manual_seed(seq_len)).requires_grad_()


def convolution(seq_len: int) -> Tensor:
    y, state = longspan.causal_conv1d(
        x_of(seq_len, 6), torch.ones(6, 3), initial_state=torch.ones(1, 2, 6), output_final_state=True
    )
    return y.sum() + state.sum()


def shift(seq_len: int) -> Tensor:
    y, state = longspan.token_shift(x_of(seq_len, 6), initial_state=torch.ones(1, 6), output_final_state=True)
    return y.sum() + state.sum()


def softmax(seq_len: int, **options: Any) -> Tensor:
    return longspan.softmax_attention(*(x_of(seq_len, HEADS, SIZE) for _ in range(3)), **options).sum()


def softmax_with_state(seq_len: int) -> Tensor:
    memory = longspan.write("softmax", x_of(seq_len, HEADS, SIZE), x_of(seq_len, HEADS, SIZE), output_final_state=True)
    return memory.read(x_of(seq_len, HEADS, SIZE)).sum() + memory.final_state()[0].sum()


def both_sides(name: str, seq_len: int) -> Tensor:
    gates: Any = {"log_decay": [-0.1] * HEADS} if name == "retention" else {}
    k, v, q = (x_of(seq_len, HEADS, SIZE) for _ in range(3))
    return longspan.write(name, k, v, causal=False, **gates).read(q).sum()


def linear(name: str, seq_len: int, backend: str = "torch") -> Tensor:
    inputs = make_inputs(name, seq_len, heads=HEADS, dtype=torch.float32)
    gates: Any = inputs.gates
    memory = longspan.write(
        name, inputs.k, inputs.v, **gates, initial_state=inputs.initial_state, output_final_state=True, backend=backend
    )
    return memory.read(inputs.q).sum() + memory.final_state().sum()


CALLS: dict[str, Callable[[int], Tensor]] = {
    "causal_conv1d": convolution,
    "token_shift": shift,
    "softmax": softmax,
    "softmax with a window": lambda seq_len: softmax(seq_len, window=5),
    "softmax of both sides": lambda seq_len: softmax(seq_len, causal=False),
    "softmax with a state": softmax_with_state,
    "linear_attention of both sides": lambda seq_len: both_sides("linear_attention", seq_len),
    "retention of both sides": lambda seq_len: both_sides("retention", seq_len),
    "kernels of gla": lambda seq_len: linear("gla", seq_len, "triton"),
    "kernels of retention": lambda seq_len: linear("retention", seq_len, "triton"),
    **{name: lambda seq_len, name=name: linear(name, seq_len) for name in VARIANTS},  # type: ignore[misc]
}


@pytest.mark.slow_rows(r"^kernels of gla")
@pytest.mark.parametrize("name", CALLS)
def test_a_second_call_of_the_same_length_builds_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[str] = []
    make, build = sequence_layout.SequenceLayout._init, sequence_layout.built_for_every_mode

    def counted_layout(*arguments: Any) -> None:
        builds.append("layout")
        make(*arguments)

    def counted(function: Callable[[], Any]) -> Any:
        builds.append(function.__qualname__)
        return build(function)

    monkeypatch.setattr(sequence_layout.SequenceLayout, "_init", counted_layout)
    monkeypatch.setattr(sequence_layout, "built_for_every_mode", counted)
    calls._kept_for_one_device.cache_clear()
    CALLS[name](37).backward()
    assert "layout" in builds and len(builds) > 1
    builds.clear()
    CALLS[name](37).backward()
    assert not builds
    CALLS[name](38).backward()
    assert "layout" in builds
