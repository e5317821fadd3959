"""A model with labels gives the loss of its logits without holding them, and a feed-forward layer in chunks changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longspan import SequenceLayout, parallelize, sum_gradients
from longspan.errors import InputError
from longspan.models import LinearLlama3
from longspan.parallel import (
    MeshDegrees,
    ParallelMesh,
    compile_blocks,
    compute_in,
    gathered,
    recompute_blocks,
    shard_weights,
)
from tests.compare import relative_error, worst
from tests.models.tiny import random_tokens, tiny_model
from tests.ops.test_chunked_cross_entropy import Seen
from tests.ranks import run_on_ranks
from tests.tracing.test_compile import pytestmark  # noqa: F401

LENGTH = 23


def labelled() -> tuple[Tensor, Tensor]:
    """Tokens, and labels of which some are ignored."""
    tokens = random_tokens(2, LENGTH + 1)
    return tokens[:, :-1], tokens[:, 1:].masked_fill(tokens[:, 1:] % 5 == 0, -100)


def loss_of_logits(model: Any, tokens: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(model(tokens, **options).flatten(0, 1), labels.flatten())


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The loss and what it gives to each parameter."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))}


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    assert got.keys() == want.keys()
    return {name: relative_error(got[name], want[name]) for name in want}


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"feed_forward_chunk": 5}], ids=str)
def test_a_model_with_labels_gives_the_loss_of_its_logits(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    tokens, labels = labelled()
    want = gradients(model, loss_of_logits(model, tokens, labels))
    assert worst(errors(gradients(model, model(tokens, labels=labels)), want)) < 1e-12
    num_valid = int((labels != -100).sum())
    half = gradients(model, model(tokens, labels=labels, num_valid=2 * num_valid))
    assert worst(errors(half, {name: x / 2 for name, x in want.items()})) < 1e-12


def test_where_all_labels_are_ignored_loss_and_gradients_are_zero() -> None:
    model = tiny_model()
    tokens, labels = labelled()
    found = gradients(model, model(tokens, labels=torch.full_like(labels, -100), num_valid=0))
    assert all(torch.equal(x, torch.zeros_like(x)) for x in found.values())


def test_a_loss_comes_with_memory_too() -> None:
    model = tiny_model()
    tokens, labels = labelled()
    num_valid = int((labels != -100).sum())
    first, memory = model(tokens[:, :9], labels=labels[:, :9], num_valid=num_valid, output_memory=True)
    second = model(tokens[:, 9:], memory=memory, labels=labels[:, 9:], num_valid=num_valid)
    want = gradients(model, loss_of_logits(model, tokens, labels))
    assert worst(errors(gradients(model, first + second), want)) < 1e-12


@pytest.mark.parametrize("trains", [True, False])
def test_no_tensor_of_a_model_has_the_logits_of_all_tokens(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspan.ops.chunked.cross_entropy.CHUNK_BYTES", 0)
    monkeypatch.setattr("longspan.ops.chunked.cross_entropy.LEAST_CHUNK", 16)
    model = tiny_model(vocab_size=3000, num_layers=1)
    tokens = torch.arange(1000)[None]
    with torch.set_grad_enabled(trains), Seen() as seen:
        loss = model(tokens, labels=tokens)
        if trains:
            loss.backward()
    assert seen.largest < 1000 * 3000 / 4
    with torch.no_grad(), Seen() as seen:
        model(tokens)
    assert seen.largest == 1000 * 3000


FEED_FORWARD: dict[str, Callable[[LinearLlama3], Any]] = {
    "plain": lambda model: model,
    "recomputed": lambda model: recompute_blocks(model, "layer"),
    "without exchanges": lambda model: recompute_blocks(model, "selective"),
    "whole model recomputed": lambda model: (
        lambda *args, **kwargs: checkpoint(model, *args, use_reentrant=False, **kwargs)
    ),
    "compiled": lambda model: compile_blocks(model, backend="aot_eager"),
    "compiled, recomputed": lambda model: recompute_blocks(compile_blocks(model, backend="aot_eager"), "layer"),
}


@pytest.mark.parametrize(
    ("name", "chunk_size"),
    [
        # Layers of each kind are compiled in `tests/parallel/test_options.py`, too.
        pytest.param(name, size, marks=pytest.mark.slow if "compiled" in name else ())
        for name in FEED_FORWARD
        for size in ((7,) if "compiled" in name else (1, 7, 100))
    ],
)
def test_a_feed_forward_layer_in_chunks_changes_nothing(name: str, chunk_size: int) -> None:
    tokens, labels = labelled()
    alone = tiny_model(num_layers=2, pattern="LN")
    want = gradients(alone, loss_of_logits(alone, tokens, labels))
    model = tiny_model(num_layers=2, pattern="LN", feed_forward_chunk=chunk_size)
    loss = FEED_FORWARD[name](model)(tokens, labels=labels)
    assert worst(errors(gradients(model, loss), want)) < 1e-12


def test_weights_cast_for_a_layer_are_those_of_its_chunks() -> None:
    tokens, labels = labelled()
    found = []
    for changes in ({}, {"feed_forward_chunk": 7}):
        model = compute_in(tiny_model(num_layers=2, pattern="LN", **changes).float(), torch.bfloat16)
        found.append(gradients(model, model(tokens, labels=labels)))
    want, got = found
    assert all(x.dtype == torch.float32 for x in got.values())
    assert worst(errors(got, want)) < 0.05


class Adapted(nn.Module):
    """A linear map with something beside it, as LoRA makes them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.weight = base.weight

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * self.base(x)


def test_layers_that_are_no_plain_linear_maps_are_refused_where_their_matrices_are_taken() -> None:
    tokens, labels = labelled()
    model: Any = tiny_model(feed_forward_chunk=4)
    model.blocks[0].feed_forward.up_proj = Adapted(model.blocks[0].feed_forward.up_proj)
    with pytest.raises(InputError, match=r"got Adapted. Set feed_forward_chunk to 0"):
        model(tokens)
    model = tiny_model()
    model.head = Adapted(model.head)
    with pytest.raises(InputError, match=r"got Adapted. Compute it from logits: leave labels out"):
        model(tokens, labels=labels)
    assert model(tokens).shape == (2, LENGTH, 29)


def on_ranks(how: str) -> dict[str, float]:
    """Errors of the summed loss and gradients of two ranks that share sequences, or weights, or both."""
    degrees = {
        "sp": MeshDegrees(sp=2),
        "dp_shard": MeshDegrees(dp_shard=2),
        "shard_over_sp": MeshDegrees(sp=2, shard_over_sp=True),
    }[how]
    tokens, labels = labelled()
    changes: dict[str, Any] = {"num_layers": 2, "pattern": "LN", "tie_embeddings": how != "sp"}
    alone = tiny_model(**changes)
    want = gradients(alone, loss_of_logits(alone, tokens, labels))
    mesh = ParallelMesh(degrees)
    model: Any = parallelize(tiny_model(**changes, feed_forward_chunk=4), mesh["sp"])
    if how == "shard_over_sp":
        compile_blocks(model, backend="aot_eager")
    if degrees.shards_weights:
        model = shard_weights(recompute_blocks(model, "layer"), mesh)
    layout = SequenceLayout(LENGTH, mesh["sp"], order="zigzag")
    rows = slice(None) if degrees.data == 1 else slice(mesh.rank, mesh.rank + 1)
    num_valid = int((labels != -100).sum())
    loss = model(layout.shard(tokens[rows]), layout=layout, labels=layout.shard(labels[rows]), num_valid=num_valid)
    loss.backward()
    if not degrees.shards_weights:
        sum_gradients(model)
    total = loss.detach().clone()
    dist.all_reduce(total)
    found = gathered([(name, parameter.grad) for name, parameter in model.named_parameters()], True)
    return errors({"loss": total, **found}, want)


@pytest.mark.parametrize("how", ["sp", "dp_shard", pytest.param("shard_over_sp", marks=pytest.mark.slow)])
def test_ranks_give_the_loss_and_gradients_of_one_process(how: str) -> None:
    for found in run_on_ranks(2, on_ranks, how, timeout=120.0):
        assert worst(found) < 1e-11


def of_no_label(how: str, experts: dict[str, Any]) -> dict[str, Tensor]:
    """Loss and gradients of ranks none of which has a label: for a number of valid tokens as a number, and as a tensor."""
    degrees = {"sp": MeshDegrees(sp=2), "dp_shard": MeshDegrees(dp_shard=2)}[how]
    mesh = ParallelMesh(degrees)
    told: dict[str, Any] = {"loss_ranks": mesh["world"]} if experts else {}
    model: Any = parallelize(tiny_model(num_layers=2, pattern="LN", **experts), mesh["sp"], **told)
    if degrees.shards_weights:
        model = shard_weights(model, mesh)
    layout = SequenceLayout(LENGTH, mesh["sp"], order="zigzag")
    tokens, _ = labelled()
    given = layout.shard(tokens if degrees.data == 1 else tokens[mesh.rank : mesh.rank + 1])
    none = torch.full_like(given, -100)
    losses = []
    for num_valid in (0, torch.tensor(0)):
        loss = model(given, layout=layout, labels=none, num_valid=num_valid)
        loss.backward()
        losses.append(loss.detach())
    if not degrees.shards_weights:
        sum_gradients(model)
    found = gathered([(name, parameter.grad) for name, parameter in model.named_parameters()], True)
    return {"loss": torch.stack(losses), **found}


@pytest.mark.parametrize("experts", [{}, {"num_experts": 3, "balance_loss_weight": 0.3}], ids=["plain", "experts"])
@pytest.mark.parametrize("how", ["sp", "dp_shard"])
def test_where_no_rank_has_a_label_loss_and_gradients_are_zero_on_all(how: str, experts: dict[str, Any]) -> None:
    for found in run_on_ranks(2, of_no_label, how, experts):
        assert len(found) > 10 and all(torch.equal(x, torch.zeros_like(x)) for x in found.values())


def validated_on_divided_weights() -> float:
    """Error of the loss without gradients, where weights are divided."""
    tokens, labels = labelled()
    mesh = ParallelMesh(MeshDegrees(dp_shard=2))
    model: Any = shard_weights(parallelize(tiny_model(num_layers=2), mesh["sp"]), mesh)
    layout = SequenceLayout(LENGTH, mesh["sp"])
    with torch.no_grad():
        loss = model(tokens, layout=layout, labels=labels)
        return relative_error(loss, loss_of_logits(tiny_model(num_layers=2), tokens, labels))


def test_divided_weights_are_gathered_for_a_loss_without_gradients() -> None:
    assert worst(run_on_ranks(2, validated_on_divided_weights)) < 1e-12
