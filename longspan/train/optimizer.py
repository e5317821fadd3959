"""AdamW, its learning rate, and the gradient's norm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from longspan.parallel.sharded import divided_like, is_divided
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


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give the optimizer the state that `optimizer_tensors` took, whole; raises KeyError or ValueError for another model's."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, value in tensors.items():
        name, state = key.rsplit("/", 1)
        parameter = parameters[name]
        if value.dim() and value.shape != parameter.shape:
            raise ValueError(f"{key} has shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}")
        # AdamW counts its steps in a tensor on the CPU, or on the parameter's device where it is fused.
        value = value.to(parameter.device)
        optimizer.state[parameter][state] = divided_like(value, parameter) if value.dim() else value
