"""Weights divided over ranks: gradients, their clipped norm, and weights after five steps are one process's, in every mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longspan import SequenceLayout, parallelize, sum_gradients
from longspan.degrees import factorings
from longspan.models import MIXERS, LinearLlama3
from longspan.parallel import MeshDegrees, ParallelMesh, gathered, shard_weights
from longspan.parallel.sharded import accumulating, copy_whole, free_gathered
from longspan.train.config import OptimConfig
from longspan.train.optimizer import (
    build_optimizer,
    clip_gradients,
    empty_optimizer_tensors,
    gradient_norm,
    optimizer_tensors,
)
from tests.compare import relative_error, worst
from tests.models.tiny import random_tokens, tiny_model
from tests.ranks import raised, run_on_ranks

LENGTH = 23
# One sequence for each of eight data-parallel ranks, in two micro-batches where ranks have several.
BATCH = 8
OPTIM = OptimConfig(lr=1e-2, clip_norm=0.5)
CHANGES: dict[str, Any] = {"num_layers": 2, "pattern": "LN", "operator": "gla", "tie_embeddings": True}


def model_of(changes: dict[str, Any]) -> LinearLlama3:
    return tiny_model(**{**CHANGES, **changes})


def loss_sum(model: nn.Module, tokens: Tensor, layout: SequenceLayout) -> Tensor:
    """A share of the mean over all tokens; labels of some are missing, on the last rank more than on others."""
    labels = layout.shard_labels(tokens)
    labels = torch.where(labels % 5 == 0, -100, labels)
    num_valid = int((tokens_of_batch()[:, 1:] % 5 != 0).sum())
    logits = model(layout.shard(tokens[:, :-1]), layout=layout)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum") / num_valid


def tokens_of_batch() -> Tensor:
    return random_tokens(BATCH, LENGTH + 1)


def train(
    model: Any,
    layout: SequenceLayout,
    own: Tensor,
    sums: Any,
    num_steps: int = 5,
    loss: Callable[..., Tensor] = loss_sum,
    num_micro_batches: int = 2,
) -> dict[str, Tensor]:
    """Gradients of the first step, norms of all, weights at the end."""
    optimizer = build_optimizer(model, OPTIM)
    found: dict[str, Tensor] = {}
    for step in range(num_steps):
        micro_batches = own.chunk(num_micro_batches)
        for number, tokens in enumerate(micro_batches):
            with accumulating(model, number + 1 == len(micro_batches)):
                loss(model, tokens, layout).backward()
        sums(model)
        norm = gradient_norm(model)
        if step == 0:
            gradients = gathered([(name, p.grad) for name, p in model.named_parameters()], True)
            found |= {f"gradient of {name}": gradient.clone() for name, gradient in gradients.items()}
        found[f"norm {step}"] = norm.detach()
        clip_gradients(model, norm, OPTIM.clip_norm)
        optimizer.step()
        model.zero_grad(set_to_none=True)
    found |= {name: weight.clone() for name, weight in gathered(model.named_parameters(), True).items()}
    state = gathered(optimizer_tensors(model, optimizer).items(), True)
    return found | {f"state of {name}": x.clone() for name, x in state.items()}


def trained_on(degrees: MeshDegrees, changes: dict[str, Any], num_steps: int = 5) -> dict[str, Tensor]:
    mesh = ParallelMesh(degrees)
    model = parallelize(model_of(changes), mesh["sp"])
    layout = SequenceLayout(LENGTH, mesh["sp"], order="zigzag")
    own = tokens_of_batch().chunk(degrees.data)[mesh.coordinate("data")]
    if degrees.shards_weights:
        return train(shard_weights(model, mesh), layout, own, lambda model: None, num_steps)
    return train(model, layout, own, sum_gradients, num_steps)


def trained_alone(changes: dict[str, Any], num_steps: int = 5) -> dict[str, Tensor]:
    return train(model_of(changes), SequenceLayout.local(LENGTH), tokens_of_batch(), lambda model: None, num_steps)


def meshes(num_ranks: int) -> list[MeshDegrees]:
    """Every factoring; with weights divided over the ranks that share a sequence, and without."""
    found = factorings(num_ranks)
    return found + [MeshDegrees(d.dp_replicate, d.dp_shard, d.sp, True) for d in found if d.sp > 1]


def errors_of(
    all_degrees: list[MeshDegrees], changes: dict[str, Any], want: dict[str, Tensor]
) -> list[dict[str, float]]:
    answers = []
    for degrees in all_degrees:
        got = trained_on(degrees, changes)
        assert got.keys() == want.keys()
        answers.append({name: relative_error(got[name], want[name]) for name in want})
    return answers


def assert_equal(num_ranks: int, all_degrees: list[MeshDegrees], changes: dict[str, Any]) -> None:
    want = trained_alone(changes)
    assert want["norm 0"] > OPTIM.clip_norm
    for answers in run_on_ranks(num_ranks, errors_of, all_degrees, changes, want, timeout=120.0):
        for degrees, errors in zip(all_degrees, answers, strict=True):
            assert worst(errors) < 1e-8, (degrees, sorted(errors.items(), key=lambda item: -item[1])[:3])


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_mesh_trains_as_one_process(num_ranks: int) -> None:
    assert_equal(num_ranks, meshes(num_ranks), {})


# The others of four and all of eight ranks are of the same kinds.
FOUR = [MeshDegrees(1, 2, 2), MeshDegrees(2, 1, 2, True), MeshDegrees(1, 2, 2, True)]


@pytest.mark.slow
def test_meshes_of_four_ranks_train_as_one_process() -> None:
    assert_equal(4, FOUR, {})


# A model of one kind of layer runs in make test, above.
@pytest.mark.slow
def test_what_layers_share_and_convolutions_are_divided_too() -> None:
    changes = {"num_layers": 4, "pattern": ("hgrn2", "mamba2", "softmax", "hgrn2"), "operator": "simple_gla"}
    assert_equal(2, [MeshDegrees(dp_shard=2), MeshDegrees(sp=2, shard_over_sp=True)], changes)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_trains_with_divided_weights_as_one_process(mixer: str) -> None:
    changes = {"num_layers": 2, "pattern": (mixer,), "operator": "simple_gla"}
    assert_equal(4, [MeshDegrees(dp_shard=2, sp=2), MeshDegrees(dp_shard=2, sp=2, shard_over_sp=True)], changes)


@pytest.mark.slow
def test_every_mesh_of_four_ranks_trains_as_one_process() -> None:
    assert_equal(4, meshes(4), {"tie_embeddings": False, "operator": "gated_deltanet"})


@pytest.mark.slow
def test_every_mesh_of_eight_ranks_trains_as_one_process() -> None:
    assert_equal(8, meshes(8), {})


def restored() -> tuple[float, float]:
    """Whole weights and states of a run of two steps, given to another mesh, which makes the third."""
    degrees = MeshDegrees(1, 2, 1)
    want = trained_alone({}, num_steps=3)
    before = trained_alone({}, num_steps=2)
    mesh = ParallelMesh(degrees)
    model = shard_weights(parallelize(model_of({}), mesh["sp"]), mesh)
    for name, parameter in model.named_parameters():
        copy_whole(before[name], parameter)
    optimizer = build_optimizer(model, OPTIM)
    states = {name.removeprefix("state of "): x for name, x in before.items() if name.startswith("state of ")}
    empty = empty_optimizer_tensors(model, optimizer, {key: tuple(x.shape) for key, x in states.items()})
    for key, value in empty.items():
        copy_whole(states[key], value)
    layout = SequenceLayout(LENGTH, mesh["sp"], order="zigzag")
    own = tokens_of_batch().chunk(2)[mesh.coordinate("data")]
    with torch.no_grad():
        loss_sum(model, own, layout)
    free_gathered(model)
    loss_sum(model, own, layout).backward()
    norm = gradient_norm(model)
    clip_gradients(model, norm, OPTIM.clip_norm)
    optimizer.step()
    got = gathered(model.named_parameters(), True)
    return relative_error(norm, want["norm 2"]), worst(relative_error(got[name], want[name]) for name in got)


def test_a_mesh_goes_on_with_whole_weights_and_states() -> None:
    assert worst(error for errors in run_on_ranks(2, restored) for error in errors) < 1e-8


def held() -> tuple[int, int, dict[str, int]]:
    mesh = ParallelMesh(MeshDegrees(1, 2, 1))
    model = shard_weights(model_of({}), mesh)
    own = sum(parameter.to_local().numel() for parameter in model.parameters())  # type: ignore[attr-defined]
    keeps = mesh.rank == 0
    return (
        own,
        model_of({}).num_parameters(),
        {n: w.numel() for n, w in gathered(model.named_parameters(), keeps).items()},
    )


def test_ranks_hold_shares_and_one_of_them_gathers_the_whole() -> None:
    (first, total, whole), (second, _, none) = run_on_ranks(2, held)
    assert first + second == total == sum(whole.values()) and abs(first - second) < total / 10
    assert none == {}


def refusals() -> list[tuple[str, str]]:
    mesh = ParallelMesh(MeshDegrees(1, 2, 1))
    scalar = nn.Module()
    scalar.temperature = nn.Parameter(torch.zeros(()))
    wrong: Any = 3
    return [
        raised(shard_weights, wrong, mesh),
        raised(shard_weights, scalar, mesh),
        raised(shard_weights, nn.Linear(2, 2), mesh),
        raised(shard_weights, model_of({}), ParallelMesh(MeshDegrees(2, 1, 1))),
    ]


def test_what_cannot_be_divided_is_refused() -> None:
    texts = (
        "got 3 (int)",
        "temperature has no dimension to divide",
        "Linear has no torch.nn.ModuleList",
        "larger dp_shard",
    )
    for answers in run_on_ranks(2, refusals):
        for (kind, text), expected in zip(answers, texts, strict=True):
            assert kind == "InputError" and expected in text
