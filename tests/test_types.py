"""What a type checker knows of the public operators: this file is checked by mypy, and its calls run, too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_type

import pytest
import torch
from torch import Tensor

import longspan
from longspan.attention.memory import KeyMemory, Memory, StateMemory
from longspan.models import LinearLlama3, LinearLlama3Config, ModelMemory

Pair = tuple[Tensor, Tensor]
KeysAndValues = tuple[Tensor, Tensor]


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.full((1, 3, 2, 4), -0.1)
    return x, x, x


def test_an_output_is_a_tensor_unless_the_final_state_is_asked_for() -> None:
    q, k, v = tensors()
    g, beta, channels = torch.full((1, 3, 2), -0.1), torch.full((1, 3, 2), 0.5), torch.full((1, 3, 2, 4), -0.1)
    assert_type(longspan.linear_attention(q, k, v), Tensor)
    assert_type(longspan.linear_attention(q, k, v, output_final_state=True), Pair)
    assert_type(longspan.retention(q, k, v, [-0.1, -0.2]), Tensor)
    assert_type(longspan.retention(q, k, v, [-0.1, -0.2], output_final_state=True), Pair)
    assert_type(longspan.simple_gla(q, k, v, g), Tensor)
    assert_type(longspan.simple_gla(q, k, v, g, output_final_state=True), Pair)
    assert_type(longspan.gla(q, k, v, channels), Tensor)
    assert_type(longspan.gla(q, k, v, channels, output_final_state=True), Pair)
    assert_type(longspan.delta_rule(q, k, v, beta), Tensor)
    assert_type(longspan.delta_rule(q, k, v, beta, output_final_state=True), Pair)
    assert_type(longspan.gated_delta_rule(q, k, v, g, beta), Tensor)
    assert_type(longspan.gated_delta_rule(q, k, v, g, beta, output_final_state=True), Pair)
    assert_type(longspan.kda(q, k, v, channels, beta), Tensor)
    assert_type(longspan.kda(q, k, v, channels, beta, output_final_state=True), Pair)
    assert_type(longspan.gla(q, k, v, channels, u=torch.ones(2, 4)), Tensor)
    assert_type(longspan.gla(q, k, v, channels, u=torch.ones(2, 4), output_final_state=True), Pair)
    steps = (q, k.unsqueeze(2), v.unsqueeze(2), g, beta.unsqueeze(2))
    assert_type(longspan.gated_delta_product(*steps), Tensor)
    assert_type(longspan.gated_delta_product(*steps, output_final_state=True), Pair)
    assert_type(longspan.dplr_delta_rule(q, k, v, q, k, channels), Tensor)
    assert_type(longspan.dplr_delta_rule(q, k, v, q, k, channels, output_final_state=True), Pair)
    assert_type(longspan.rwkv7(q, channels, k, v, k, k.abs()), Tensor)
    assert_type(longspan.rwkv7(q, channels, k, v, k, k.abs(), output_final_state=True), Pair)
    assert_type(longspan.gated_slot_attention(q, k, v, channels, channels), Tensor)
    assert_type(longspan.gated_slot_attention(q, k, v, channels, channels, output_final_state=True), Pair)
    assert_type(longspan.comba(q, k, v, q, g, beta), Tensor)
    assert_type(longspan.comba(q, k, v, q, g, beta, output_final_state=True), Pair)
    assert_type(longspan.softmax_attention(q, k, v), Tensor)
    assert_type(longspan.softmax_attention(q, k, v, output_final_state=True), tuple[Tensor, KeysAndValues])
    x, weight = torch.ones(1, 3, 4), torch.ones(4, 2)
    assert_type(longspan.causal_conv1d(x, weight), Tensor)
    assert_type(longspan.causal_conv1d(x, weight, output_final_state=True), Pair)
    assert_type(longspan.token_shift(x), Tensor)
    assert_type(longspan.token_shift(x, output_final_state=True), Pair)
    assert_type(longspan.long_conv1d(x, weight), Tensor)
    kernel = longspan.ExponentialKernel(-weight, weight)
    assert_type(longspan.long_conv1d(x, kernel, output_final_state=True), Pair)
    flag = bool(x.numel())
    assert_type(longspan.long_conv1d(x, kernel, output_final_state=flag), Tensor | Pair)
    assert_type(longspan.token_shift(x, output_final_state=flag), Tensor | Pair)
    assert_type(longspan.gla(q, k, v, channels, output_final_state=flag), Tensor | Pair)


def test_what_is_built_on_the_operators_has_the_same_types() -> None:
    q, k, v = tensors()
    g, one_group = torch.full((1, 3, 2), -0.1), torch.ones(1, 3, 1, 4)
    assert_type(longspan.hgrn2(q, k, v), Tensor)
    assert_type(longspan.hgrn2(q, k, v, output_final_state=True), Pair)
    rates = torch.full((2,), -1.0)
    assert_type(longspan.mamba2(v, g.abs(), rates, one_group, one_group), Tensor)
    assert_type(longspan.mamba2(v, g.abs(), rates, one_group, one_group, output_final_state=True), Pair)
    u, b = v.flatten(2), one_group.squeeze(2)
    of_channels = rates.new_full((u.shape[2], b.shape[2]), -1.0)
    assert_type(longspan.selective_scan(u, u.abs(), of_channels, b, b), Tensor)
    assert_type(longspan.selective_scan(u, u, of_channels, b, b, None, u, None, True, output_final_state=True), Pair)
    q, k = q.abs(), k.abs()
    assert_type(longspan.normalized_linear_attention(q, k, v, operator="simple_gla", g=g), Tensor)
    assert_type(longspan.normalized_linear_attention(q, k, v, output_final_state=True), Pair)
    assert_type(longspan.write_normalized(k, v, output_final_state=True).final_state(), Tensor)


def test_a_memory_knows_its_state() -> None:
    _, k, v = tensors()
    linear = longspan.write("linear_attention", k, v, output_final_state=True)
    assert_type(linear, StateMemory)
    assert_type(linear.final_state(), Tensor)
    softmax = longspan.write("softmax", k, v, output_final_state=True)
    assert_type(softmax, KeyMemory)
    assert_type(softmax.final_state(), KeysAndValues)
    assert_type(softmax.read(k), Tensor)
    both: list[Memory[Any]] = [linear, softmax, longspan.write("linear_attention", k, v, causal=False)]
    assert len(both) == 3


def test_a_model_returns_what_it_is_asked_for() -> None:
    model = LinearLlama3(LinearLlama3Config(vocab_size=5, dim=8, num_layers=1, num_heads=2, hidden_dim=8))
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    assert_type(model.forward(tokens), Tensor)
    assert_type(model.forward(tokens, output_memory=True), tuple[Tensor, ModelMemory])


@pytest.mark.parametrize("operator", ["linear_attention", "retention"])
def test_a_memory_of_both_sides_has_no_state(operator: str) -> None:
    q, k, v = tensors()
    gates: Any = {"log_decay": [-0.1, -0.2]} if operator == "retention" else {}
    memory = longspan.write(operator, k, v, causal=False, **gates)
    with pytest.raises(longspan.InputError, match="with causal=False there is no state before or after the sequence"):
        memory.final_state()
    assert torch.equal(memory.read_overlapped(q), memory.read(q))


if TYPE_CHECKING:
    # Each of these lines must be an error: mypy is told to expect one, and complains where there is none.
    _x = torch.zeros(1)
    longspan.write("gla", _x, _x, window=3)  # type: ignore[call-overload]
    longspan.linear_attention(_x, _x, _x, output_final_state="yes")  # type: ignore[call-overload]
