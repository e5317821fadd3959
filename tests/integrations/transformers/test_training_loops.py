"""Loops of one's own over replicas of shared sequences, unchanged: gradients and their norm are those of one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import longspan
from tests.compare import relative_error, worst_of
from tests.integrations.transformers.families import build
from tests.integrations.transformers.reference import Batch, Wide, batch, gradients_of
from tests.integrations.transformers.training import environment, with_adapters
from tests.ranks import run_on_ranks

TOLERANCE = 1e-12
TIMEOUT = 180.0
LARGEST_NORM = 0.5
NUM_STEPS = 3
RATE = 0.1


def batches(replicas: int) -> list[Batch]:
    return [batch(2, 37, seed=3 + replica) for replica in range(replicas)]


@dataclass(frozen=True)
class Steps:
    """Of a few steps: losses, norms before clipping, the last step's clipped gradients, and the weights afterwards, whole.

    gradients, weights: by the names of the model inside.
    """

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]

    def errors(self, want: Steps) -> dict[str, float]:
        """Relative errors of everything beside other steps."""
        errors = {
            f"gradient of {name}": relative_error(self.gradients[name], want.gradients[name]) for name in want.gradients
        }
        errors |= {name: relative_error(self.weights[name], want.weights[name]) for name in want.weights}
        for name in ("losses", "norms"):
            pairs = zip(getattr(self, name), getattr(want, name), strict=True)
            errors |= {f"{name} {step}": abs(got - expected) / expected for step, (got, expected) in enumerate(pairs)}
        return errors


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[float, dict[str, Tensor]]:
    """The norm before clipping, and the clipped gradients, whole; then a step with them."""
    norm: Any = nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
    gradients = _whole_by_name(gradients_of(model))
    optimizer.step()
    optimizer.zero_grad()
    return float(_whole(norm)), gradients


def _whole_by_name(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): _whole(x) for name, x in found.items()}


def _whole(x: Any) -> Tensor:
    whole: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return whole.detach().clone()


def in_one_process(family: str, replicas: int, adapters: bool) -> Steps:
    """Steps with the average over the replicas' batches."""
    model = build(family)
    if adapters:
        with environment():
            model = with_adapters(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses, norms = [], []
    gradients: dict[str, Tensor] = {}
    for _ in range(NUM_STEPS):
        of_step = 0.0
        with Wide():
            for one in batches(replicas):
                loss = model(input_ids=one.ids, labels=one.labels, use_cache=False).loss / replicas
                loss.backward()
                of_step += float(loss.detach())
        norm, gradients = step(model, optimizer)
        losses.append(of_step)
        norms.append(norm)
    return Steps(losses, norms, gradients, _whole_by_name(dict(model.named_parameters())))


def over_ranks(family: str, kind: str, replicas: int) -> Steps:
    mesh = init_device_mesh("cpu", (replicas, dist.get_world_size() // replicas), mesh_dim_names=("dp", "cp"))
    own = batches(replicas)[mesh["dp"].get_local_rank()]
    model = build(family)
    with environment():
        if kind == "adapters, then parallelize":
            model = with_adapters(model)
        if kind == "DDP, then parallelize":
            model = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        longspan.parallelize(model, mesh["cp"])
        if kind == "parallelize, then adapters":
            model = with_adapters(model)
    if kind == "FSDP2":
        from torch.distributed.fsdp import fully_shard

        whole: Any = model
        flat = mesh["dp", "cp"]._flatten("dp_cp")
        for layer in whole.model.layers:
            fully_shard(layer, mesh=flat)
        fully_shard(whole, mesh=flat)
    elif not isinstance(model, nn.parallel.DistributedDataParallel):
        model = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses, norms = [], []
    gradients: dict[str, Tensor] = {}
    for _ in range(NUM_STEPS):
        with Wide():
            with torch.no_grad():
                known = model(input_ids=own.ids, labels=own.labels).loss
            loss = model(input_ids=own.ids, labels=own.labels).loss
            loss.backward()
        averages = torch.stack([loss.detach(), known])
        dist.all_reduce(averages)
        average, of_all = (averages / dist.get_world_size()).tolist()
        assert abs(average - of_all) < TOLERANCE, "without gradients every rank has the loss itself"
        norm, gradients = step(model, optimizer)
        losses.append(average)
        norms.append(norm)
    return Steps(losses, norms, gradients, _whole_by_name(dict(model.named_parameters())))


def check(family: str, kind: str, replicas: int) -> None:
    want = in_one_process(family, replicas, "adapters" in kind)
    assert want.norms[0] > LARGEST_NORM, "nothing would be clipped"
    for rank, found in enumerate(
        run_on_ranks(2 * replicas, over_ranks, family, kind, replicas, timeout=TIMEOUT, checked=False)
    ):
        error, what = worst_of(found.errors(want))
        assert error < TOLERANCE, f"{family}, {kind}, rank {rank}: {what} is off by {error:.1e}"


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^FSDP2$")
@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_an_average_over_two_ranks_is_one_process(kind: str) -> None:
    check("bamba", kind, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
@pytest.mark.parametrize("family", ["bamba", "qwen3_next", "jamba", "minimax"])
def test_an_average_over_replicas_of_shared_sequences_is_one_process(family: str, kind: str) -> None:
    check(family, kind, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapters, then parallelize", "parallelize, then adapters", "DDP, then parallelize"])
@pytest.mark.parametrize("family", ["olmo_hybrid", "jamba"])
def test_what_is_around_a_model_comes_before_or_after(family: str, kind: str) -> None:
    check(family, kind, 1)


def with_accelerate(family: str, cp_size: int, num_steps: int = 4) -> dict[str, Any]:
    """Losses, norms and weights of Accelerate's loop, with accumulation and clipping; 0 is without longspan."""
    from accelerate import Accelerator

    from longspan.integrations.transformers import SequenceParallelConfig

    with environment(), Wide():
        config = SequenceParallelConfig(cp_size=cp_size) if cp_size else None
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, parallelism_config=config)
        model = build(family)
        if cp_size:
            longspan.parallelize(model, accelerator.torch_device_mesh["cp"])
        data: Any = [{"input_ids": row, "labels": row} for one in batches(num_steps) for row in one.ids]
        order = torch.Generator().manual_seed(0)
        loader: Any = torch.utils.data.DataLoader(data, batch_size=2, shuffle=True, generator=order)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        options: dict[str, Any] = {} if cp_size else {"use_cache": False}
        losses, norms = [], []
        for given in loader:
            with accelerator.accumulate(model):
                loss = model(**given, **options).loss
                accelerator.backward(loss)
                losses.append(accelerator.reduce(loss.detach(), "mean"))
                if accelerator.sync_gradients:
                    norms.append(accelerator.clip_grad_norm_(model.parameters(), LARGEST_NORM))
                optimizer.step()
                optimizer.zero_grad()
        weights = {name: p.detach().clone() for name, p in accelerator.unwrap_model(model).named_parameters()}
        return {"losses": torch.stack(losses), "norms": torch.stack(norms), **weights}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_next", "bamba"])
def test_an_accelerate_loop_over_two_ranks_is_one_process(family: str) -> None:
    want = with_accelerate(family, 0)
    for found in run_on_ranks(2, with_accelerate, family, 2, timeout=TIMEOUT, checked=False):
        error, what = worst_of({name: relative_error(found[name], want[name]) for name in want})
        assert error < TOLERANCE, f"{what} is off by {error:.1e}"
