"""Models with experts over ranks: loss, gradients, weights and statistics are one process's, the routers' losses included."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longspan import SequenceLayout, parallelize, record_traffic, sum_gradients, unparallelize
from longspan.models import LinearLlama3, Routing
from longspan.parallel import MeshDegrees, ParallelMesh, compile_blocks, gathered, recompute_blocks, shard_weights
from tests.compare import relative_error, worst
from tests.models.tiny import tiny_model
from tests.parallel.test_sharded import LENGTH, OPTIM, meshes, tokens_of_batch, train
from tests.ranks import raised, run_on_ranks
from tests.tracing.test_compile import pytestmark  # noqa: F401

EXPERTS: dict[str, Any] = {
    "num_layers": 2,
    "pattern": "LN",
    "operator": "gla",
    # Of which four ranks have one or none each.
    "num_experts": 3,
    "num_shared_experts": 1,
    "balance_loss_weight": 0.3,
    "z_loss_weight": 0.07,
}


def labels_of(tokens: Tensor) -> Tensor:
    return tokens[:, 1:].masked_fill(tokens[:, 1:] % 5 == 0, -100)


def loss_of(model: Any, tokens: Tensor, layout: SequenceLayout, routing: Routing | None = None) -> Tensor:
    """A share of the loss; labels of some tokens are missing, and all tokens count for the routers."""
    num_valid = int((labels_of(tokens_of_batch()) != -100).sum())
    labels = layout.shard(labels_of(tokens))
    loss: Tensor = model(
        layout.shard(tokens[:, :-1]), layout=layout, labels=labels, num_valid=num_valid, routing=routing
    )
    return loss


def model_on(mesh: ParallelMesh, **changes: Any) -> LinearLlama3:
    model = tiny_model(**{**EXPERTS, **changes})
    return parallelize(model, mesh["sp"], exchange="all_gather", loss_ranks=mesh["world"])


def trained_on(degrees: MeshDegrees, recompute: Any = None) -> dict[str, Tensor]:
    mesh = ParallelMesh(degrees)
    model: Any = model_on(mesh)
    if recompute is not None:
        recompute_blocks(model, recompute)
    layout = SequenceLayout(LENGTH, mesh["sp"], order="zigzag")
    own = tokens_of_batch().chunk(degrees.data)[mesh.coordinate("data")]
    sums: Any = sum_gradients
    if degrees.shards_weights:
        model, sums = shard_weights(model, mesh), lambda model: None
    return train(model, layout, own, sums, loss=loss_of, num_micro_batches=1)


def trained_alone() -> dict[str, Tensor]:
    layout = SequenceLayout.local(LENGTH)
    return train(
        tiny_model(**EXPERTS), layout, tokens_of_batch(), lambda model: None, loss=loss_of, num_micro_batches=1
    )


def errors_of(all_degrees: list[MeshDegrees], want: dict[str, Tensor]) -> list[dict[str, float]]:
    answers = []
    for number, degrees in enumerate(all_degrees):
        got = trained_on(degrees, (None, "layer", "selective")[number % 3])
        assert got.keys() == want.keys()
        answers.append({name: relative_error(got[name], want[name]) for name in want})
    return answers


def assert_equal(num_ranks: int, all_degrees: list[MeshDegrees]) -> None:
    want = trained_alone()
    assert want["norm 0"] > OPTIM.clip_norm
    for answers in run_on_ranks(num_ranks, errors_of, all_degrees, want, timeout=120.0):
        for degrees, errors in zip(all_degrees, answers, strict=True):
            assert worst(errors) < 1e-8, (degrees, sorted(errors.items(), key=lambda item: -item[1])[:3])


# A loss over meshes runs in make test, below, and a whole run in `tests/train/test_experts.py`.
@pytest.mark.slow
def test_every_mesh_of_two_ranks_trains_as_one_process() -> None:
    assert_equal(2, meshes(2))


FOUR = [MeshDegrees(2, 1, 2), MeshDegrees(1, 2, 2, True)]


@pytest.mark.slow
def test_meshes_of_four_ranks_train_as_one_process() -> None:
    assert_equal(4, FOUR)


@pytest.mark.slow
def test_every_mesh_of_four_ranks_trains_as_one_process() -> None:
    assert_equal(4, meshes(4))


Answer = tuple[dict[str, Tensor], dict[str, float], list[list[int]]]
"""Loss and gradients; a step's statistics, each a sum of the ranks' shares; the choices of all layers' experts."""


def summed(x: Tensor | float) -> float:
    total = torch.as_tensor(x, dtype=torch.float64).clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total)


def computed(model: Any, tokens: Tensor, layout: SequenceLayout, num_micro_batches: int) -> Answer:
    routing = Routing(num_tokens=tokens_of_batch()[:, 1:].numel())
    losses = []
    for rows in tokens.chunk(num_micro_batches):
        losses.append(loss_of(model, rows, layout, routing))
        losses[-1].backward()
    if model.sequence_parallel is not None:
        sum_gradients(model)
    loss = torch.tensor(summed(sum(x.detach() for x in losses)), dtype=torch.float64)
    names = ("cross_entropy", "balance", "z", "entropy", "auxiliary")
    assert routing.choices is not None
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return (
        {"loss": loss, **gradients},
        {name: summed(getattr(routing, name)) for name in names},
        routing.choices.tolist(),
    )


def on_mesh(degrees: MeshDegrees, order: Any, num_micro_batches: int, compiled: bool) -> Answer:
    mesh = ParallelMesh(degrees)
    model = model_on(mesh)
    if compiled:
        torch._dynamo.reset()
        compile_blocks(model, backend="aot_eager")
    layout = SequenceLayout(LENGTH, mesh["sp"], order=order)
    # Rows that one micro batch of all ranks takes are next to each other, as one process takes them.
    parts = tokens_of_batch().chunk(num_micro_batches)
    own = torch.cat([part.chunk(degrees.data)[mesh.coordinate("data")] for part in parts])
    return computed(model, own, layout, num_micro_batches)


CASES: list[Any] = [
    (2, MeshDegrees(sp=2), "contiguous", 1, False),
    (2, MeshDegrees(dp_replicate=2), "contiguous", 2, False),
    (4, MeshDegrees(dp_replicate=2, sp=2), "zigzag", 2, False),
    pytest.param(2, MeshDegrees(sp=2), "zigzag", 1, True, marks=pytest.mark.slow),
    pytest.param(4, MeshDegrees(sp=4), "zigzag", 4, False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("num_ranks", "degrees", "order", "num_micro_batches", "compiled"), CASES)
def test_loss_gradients_and_statistics_are_those_of_one_process(
    num_ranks: int, degrees: MeshDegrees, order: str, num_micro_batches: int, compiled: bool
) -> None:
    alone = tiny_model(**EXPERTS)
    want, statistics, choices = computed(alone, tokens_of_batch(), SequenceLayout.local(LENGTH), num_micro_batches)
    assert abs(float(want["loss"]) - statistics["cross_entropy"] - statistics["auxiliary"]) < 1e-12
    answers = run_on_ranks(num_ranks, on_mesh, degrees, order, num_micro_batches, compiled, timeout=120.0)
    for got, found, chosen in answers:
        assert worst(relative_error(got[name], want[name]) for name in want) < 1e-12
        assert found == pytest.approx(statistics, rel=1e-12) and chosen == choices


def collectives() -> list[int]:
    """All-reduces of a step that are not gradients': forward and backward with recomputation, and of calls that train nothing."""
    mesh = ParallelMesh(MeshDegrees(sp=2))
    layout = SequenceLayout(LENGTH, mesh["sp"])
    found = []
    for weights in ({}, {"balance_loss_weight": 0.0, "z_loss_weight": 0.0}):
        model: Any = recompute_blocks(model_on(mesh, pattern="L", **weights), "selective")
        with record_traffic() as traffic:
            loss_of(model, tokens_of_batch(), layout).backward()
        exchanges = 2 * len(model.blocks)
        found.append(traffic.num_collectives - exchanges)
    with torch.no_grad(), record_traffic() as traffic:
        loss_of(model, tokens_of_batch(), layout)
    found.append(traffic.num_collectives - len(model.blocks))
    local = SequenceLayout.local(LENGTH)
    with record_traffic() as traffic:
        loss_of(model, tokens_of_batch(), local).backward()
    return [*found, traffic.num_collectives]


def test_a_step_takes_one_all_reduce_for_all_routers_and_validation_none() -> None:
    assert run_on_ranks(2, collectives) == [[1, 0, 0, 0]] * 2


def validated() -> float:
    """Error of the loss without gradients beside the cross-entropy of one process."""
    mesh = ParallelMesh(MeshDegrees(sp=2))
    layout = SequenceLayout(LENGTH, mesh["sp"])
    with torch.no_grad():
        share = loss_of(model_on(mesh), tokens_of_batch(), layout)
        alone = loss_of(tiny_model(**EXPERTS), tokens_of_batch(), SequenceLayout.local(LENGTH))
    return abs(summed(share) - float(alone)) / float(alone)


def test_a_loss_without_gradients_has_no_auxiliary_losses() -> None:
    assert worst(run_on_ranks(2, validated)) < 1e-12


def held() -> list[int]:
    """Numbers of the experts' matrices that this rank holds."""
    mesh = ParallelMesh(MeshDegrees(dp_shard=2))
    model: Any = shard_weights(model_on(mesh, num_experts=4), mesh)
    experts = model.blocks[0].feed_forward.experts
    gathered_all = gathered(experts.named_parameters(), keeps=True)
    return [experts.gate_proj.to_local().shape[0], *(x.shape[0] for x in gathered_all.values())]


def test_ranks_that_share_weights_hold_some_of_the_experts() -> None:
    assert run_on_ranks(2, held) == [[2, 4, 4, 4]] * 2


def refusals() -> list[tuple[str, str]]:
    mesh = ParallelMesh(MeshDegrees(dp_replicate=2))
    model = tiny_model(**EXPERTS)
    found = [
        raised(parallelize, model, mesh["sp"]),
        raised(partial(parallelize, tiny_model(), mesh["sp"], loss_ranks=mesh["world"])),
    ]
    assert model.loss_ranks is None
    model = parallelize(tiny_model(**EXPERTS), mesh["sp"], loss_ranks=mesh["sp"])
    assert model.loss_ranks is not None
    unparallelize(model)
    left: list[object] = [model.loss_ranks, model.sequence_parallel]
    assert left == [None, None]
    return found


def test_who_shares_a_loss_must_be_said_where_it_does_not_follow() -> None:
    texts = (
        "a group of 1 of the 2 ranks, and no loss_ranks. Say over which",
        "got LinearLlama3, which is none. Leave it out",
    )
    for answers in run_on_ranks(2, refusals):
        for (kind, text), expected in zip(answers, texts, strict=True):
            assert kind == "InputError" and expected in text
