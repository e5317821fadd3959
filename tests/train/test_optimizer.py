"""Learning rate, decay of matrices alone, and an optimizer's state that survives."""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn

from longspan.train.config import OptimConfig
from longspan.train.optimizer import (
    build_optimizer,
    clip_gradients,
    empty_optimizer_tensors,
    gradient_norm,
    learning_rate,
    optimizer_tensors,
    set_learning_rate,
)

CONFIG = OptimConfig(lr=1.0, warmup_steps=4, final_lr_fraction=0.1)


def test_the_learning_rate_warms_up_and_falls_as_half_a_cosine() -> None:
    rates = [learning_rate(CONFIG, step, 24) for step in range(1, 25)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert math.isclose(rates[13], 0.55)
    assert math.isclose(rates[-1], 0.1)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[3:]))


def test_warm_up_may_be_absent_or_longer_than_the_run() -> None:
    assert learning_rate(OptimConfig(lr=1.0, warmup_steps=0), 1, 1) == 0.1
    assert learning_rate(OptimConfig(lr=1.0, warmup_steps=10), 2, 2) == 0.2


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    for index, parameter in enumerate(net.parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + index))
    optimizer.step()


def test_vectors_do_not_decay() -> None:
    net = model()
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    optimizer = build_optimizer(net, OptimConfig(lr=0.1, weight_decay=0.5))
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in net.named_parameters():
        factor = 0.95 if parameter.dim() == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_an_optimizer_goes_on_bit_for_bit_from_its_saved_state() -> None:
    whole, half = model(), model()
    optimizer = build_optimizer(whole, CONFIG)
    step(whole, optimizer, 10)
    first = build_optimizer(half, CONFIG)
    step(half, first, 10)
    resumed = build_optimizer(half, CONFIG)
    saved = {key: value.clone() for key, value in optimizer_tensors(half, first).items()}
    empty = empty_optimizer_tensors(half, resumed, {key: tuple(value.shape) for key, value in saved.items()})
    for key, value in empty.items():
        value.copy_(saved[key])
    for net, current in ((whole, optimizer), (half, resumed)):
        set_learning_rate(current, 0.3)
        step(net, current, 20)
    for a, b in zip(whole.parameters(), half.parameters(), strict=True):
        assert torch.equal(a, b)


def test_clipping_scales_all_gradients_to_the_norm() -> None:
    net = model()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    norm = gradient_norm(net)
    assert math.isclose(float(norm), math.sqrt(12 + 4 + 4 + 4), rel_tol=1e-6)
    clip_gradients(net, norm, 100.0)
    assert math.isclose(float(gradient_norm(net)), float(norm), rel_tol=1e-6)
    clip_gradients(net, norm, 0.5)
    assert math.isclose(float(gradient_norm(net)), 0.5, rel_tol=1e-5)
