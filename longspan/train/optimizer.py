"""AdamW, its learning rate, and the gradient's norm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from longspan.parallel.sharded import is_divided
from longspan.train.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices alone: norms, biases and other vectors are not pulled to zero."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Learning rate of `step`, counted from 1: linear warm-up, then half a cosine down to the last step."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.final_lr_fraction + (1.0 - config.final_lr_fraction) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def gradient_norm(model: nn.Module) -> Tensor:
    """Euclidean norm of all gradients together, float32 or float64 scalar; of all ranks' shares, where gradients are divided."""
    norm: Any = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    whole: Tensor = norm.full_tensor() if is_divided(norm) else norm
    return whole


def clip_gradients(model: nn.Module, norm: Tensor, clip_norm: float) -> None:
    """Scale the gradients, whose norm is `norm`, down to `clip_norm` if they are longer."""
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip_norm, norm)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by ``parameter name/state name``; divided over ranks where the parameter is."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def empty_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Give the optimizer a state to be read into, whatever it had, and return it as `optimizer_tensors` does.

    shapes: of the state that was saved, whole, by ``parameter name/state name``.

    Raises:
        KeyError: for a parameter that the model has not.
        ValueError: for a state of another shape than its parameter's.
    """
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, shape in shapes.items():
        name, state = key.rsplit("/", 1)
        parameter = parameters[name]
        if shape and shape != tuple(parameter.shape):
            raise ValueError(f"{key} has shape {shape}, its parameter {tuple(parameter.shape)}")
        # AdamW counts its steps in a tensor on the CPU, or on the parameter's device where it is fused.
        empty = torch.zeros_like(parameter) if shape else torch.zeros((), device=parameter.device)
        optimizer.state[parameter][state] = empty.detach()
    return optimizer_tensors(model, optimizer)
