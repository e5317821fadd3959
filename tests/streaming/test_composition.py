"""Segments of time with what else a step is made of: micro batches, experts, recomputation, lower precision, divided weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longspan import SequenceLayout, parallelize, stream, sum_gradients, sum_over_ranks
from longspan.models import LinearLlama3, Routing
from longspan.parallel import (
    MeshDegrees,
    ParallelMesh,
    compile_blocks,
    compute_in,
    gathered,
    recompute_blocks,
    shard_weights,
)
from longspan.parallel.sharded import accumulating
from tests.compare import relative_error, worst
from tests.live_bytes import LiveBytes
from tests.models.tiny import random_tokens, tiny_model
from tests.ranks import run_on_ranks
from tests.streaming.whole import differences, gradients_of, in_one_piece, in_segments, labels_of

HYBRID: dict[str, Any] = {"pattern": "LN", "operator": "mamba2", "num_layers": 2}


def test_micro_batches_add_up() -> None:
    model, tokens = tiny_model(**HYBRID), random_tokens(2, 41)
    want = in_one_piece(model, tokens)
    model.zero_grad(set_to_none=True)
    labels, total = labels_of(tokens), torch.zeros(())
    for row in range(2):
        own = slice(row, row + 1)
        num_valid = int((labels >= 0).sum())
        total = total + stream(model, 9).forward_backward(tokens[own, :-1], labels[own], num_valid=num_valid)
    assert worst(differences({"loss": total, **gradients_of(model)}, want)) < 1e-10


# Over ranks both are.
@pytest.mark.parametrize("what", ["layer", pytest.param("selective", marks=pytest.mark.slow)])
def test_layers_may_be_computed_once_more_inside_of_a_segment(what: Any) -> None:
    tokens = random_tokens(2, 41)
    want = in_one_piece(tiny_model(**HYBRID), tokens)
    model = recompute_blocks(tiny_model(**HYBRID), what)
    assert worst(differences(in_segments(model, tokens, 9), want)) < 1e-10


# PyTorch's own, where it loads inductor, and where it stops a graph: hidden from a user, but not from an error filter.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
def test_layers_may_be_compiled() -> None:
    torch._dynamo.reset()
    tokens, changes = random_tokens(1, 41), {**HYBRID, "window": 11}
    want = in_one_piece(tiny_model(**changes), tokens)
    model = compile_blocks(tiny_model(**changes), backend="aot_eager")
    assert worst(differences(in_segments(model, tokens, 9), want)) < 1e-10
    torch._dynamo.reset()


EXPERTS: dict[str, Any] = {
    **HYBRID,
    "num_experts": 5,
    "experts_per_token": 2,
    "num_shared_experts": 1,
    "balance_loss_weight": 0.3,
    "z_loss_weight": 0.2,
}


def told(routing: Routing) -> dict[str, Tensor]:
    """What a step says of its routers."""
    assert routing.choices is not None
    names = ("cross_entropy", "balance", "z", "entropy", "auxiliary")
    return {"choices": routing.choices, **{name: torch.as_tensor(getattr(routing, name)) for name in names}}


# Each of the two is a term of its own beside the other.
@pytest.mark.slow_rows(r"^weights[12]$")
@pytest.mark.parametrize("weights", [{}, {"balance_loss_weight": 0.0}, {"z_loss_weight": 0.0}])
def test_auxiliary_losses_of_experts_are_those_of_the_whole_sequence(weights: dict[str, float]) -> None:
    model, tokens = tiny_model(**(EXPERTS | weights)), random_tokens(2, 41)
    want = in_one_piece(model, tokens)
    for keep_every in (1, 2):
        assert worst(differences(in_segments(model, tokens, 9, keep_every=keep_every), want)) < 1e-10


def row_by_row(model: Any, tokens: Tensor, segment_tokens: int | None, together: int = 1) -> dict[str, Tensor]:
    """Micro batches, in one piece or in segments, with one routing for all of them.

    together: rows of each, as far apart as those of so many ranks of data.
    """
    labels, routing, total = labels_of(tokens), Routing(tokens[:, 1:].numel()), torch.zeros((), dtype=torch.float64)
    num_valid = int((labels >= 0).sum())
    model.zero_grad(set_to_none=True)
    num_micro_batches = len(tokens) // together
    for number in range(num_micro_batches):
        inputs, targets = (x[number::num_micro_batches] for x in (tokens[:, :-1], labels))
        if segment_tokens is None:
            loss = model(inputs, labels=targets, num_valid=num_valid, routing=routing)
            loss.backward()
        else:
            loss = stream(model, segment_tokens).forward_backward(inputs, targets, num_valid=num_valid, routing=routing)
        total += loss.detach()
    return {"loss": total, **gradients_of(model), **told(routing)}


def test_auxiliary_losses_add_up_over_micro_batches() -> None:
    model, tokens = tiny_model(**EXPERTS), random_tokens(2, 41)
    want, got = (row_by_row(model, tokens, segment_tokens) for segment_tokens in (None, 9))
    assert worst(differences(got, want)) < 1e-10


def test_a_routing_is_told_the_same_of_segments_as_of_one_piece() -> None:
    model, tokens = tiny_model(**EXPERTS), random_tokens(2, 41)
    labels, of_one, of_segments = labels_of(tokens), Routing(80), Routing(80)
    num_valid = int((labels >= 0).sum())
    model(tokens[:, :-1], labels=labels, num_valid=num_valid, routing=of_one).backward()
    want = gradients_of(model)
    model.zero_grad(set_to_none=True)
    stream(model, 9).forward_backward(tokens[:, :-1], labels, routing=of_segments)
    assert worst(differences(gradients_of(model), want)) < 1e-10
    assert worst(differences(told(of_segments), told(of_one))) < 1e-10
    # A call that is whole again counts by itself.
    again = Routing(80)
    again.choices = of_segments.choices
    model(tokens[:, :-1], labels=labels, num_valid=num_valid, routing=of_segments)
    assert torch.equal(told(of_segments)["choices"], 2 * told(of_one)["choices"])


def test_in_eval_mode_routers_add_nothing() -> None:
    model, tokens = tiny_model(**EXPERTS).eval(), random_tokens(2, 41)
    want = in_one_piece_of_eval(model, tokens)
    got = in_segments_of_eval(model, tokens)
    assert worst(differences(got, want)) < 1e-10


def in_one_piece_of_eval(model: LinearLlama3, tokens: Tensor) -> dict[str, Tensor]:
    labels = labels_of(tokens)
    loss = model(tokens[:, :-1], labels=labels)
    loss.backward()
    return {"loss": loss.detach(), **gradients_of(model)}


def in_segments_of_eval(model: LinearLlama3, tokens: Tensor) -> dict[str, Tensor]:
    return in_segments(model, tokens, 9)


def in_bfloat16() -> tuple[Any, Tensor]:
    model = compute_in(tiny_model(**HYBRID).float(), torch.bfloat16)
    return model, random_tokens(1, 257)


def test_in_bfloat16_segments_err_no_more_than_one_piece() -> None:
    model, tokens = in_bfloat16()
    exact = in_one_piece(tiny_model(**HYBRID), tokens)
    errors = {}
    for segment_tokens in (256, 64, 8):
        got = in_segments(model, tokens, segment_tokens)
        errors[segment_tokens] = total_error(got, exact)
    assert 1e-4 < errors[256] < 0.05
    assert errors[64] < 1.5 * errors[256] and errors[8] < 1.5 * errors[256], errors


def total_error(got: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The norm of all gradients' errors, relative to theirs."""
    squares = [(float((got[n].double() - exact[n]).square().sum()), float(exact[n].square().sum())) for n in exact]
    return float((sum(e for e, _ in squares) / sum(s for _, s in squares)) ** 0.5)


def test_under_autocast_every_segment_has_gradients() -> None:
    model, tokens = tiny_model(**HYBRID).float(), random_tokens(1, 65)
    with torch.autocast("cpu", torch.bfloat16):
        want = in_one_piece(model, tokens)
        got = in_segments(model, tokens, 16)
    assert worst(differences(got, want)) < 0.05


def trained_on(
    degrees: MeshDegrees,
    changes: dict[str, Any],
    segment_tokens: int | None = 9,
    dtype: torch.dtype | None = None,
    reduce_each: bool = False,
) -> dict[str, Tensor]:
    """Gradients of micro batches of a row each of every data-parallel rank, and the loss; in one piece for None."""
    mesh = ParallelMesh(degrees)
    made = tiny_model(**changes)
    of_losses: dict[str, Any] = {"loss_ranks": mesh["world"]} if made.config.num_experts else {}
    model: Any = parallelize(made if dtype is None else made.float(), mesh["sp"], **of_losses)
    if degrees.shards_weights:
        model = shard_weights(model, mesh, dtype=dtype)
    told: dict[str, Any] = {"routing": Routing(160)} if model.config.num_experts else {}
    layout = SequenceLayout(40, mesh["sp"], order="zigzag")
    tokens = random_tokens(4, 41)
    labels = labels_of(tokens)
    own = [x.chunk(degrees.data)[mesh.coordinate("data")] for x in (tokens[:, :-1], labels)]
    micro_batches = list(zip(*(x.split(1) for x in own), strict=True))
    num_valid, total = int((labels >= 0).sum()), torch.zeros((), dtype=torch.float64)
    for number, (inputs, targets) in enumerate(micro_batches):
        is_last = number + 1 == len(micro_batches)
        if segment_tokens is None:
            loss = model(layout.shard(inputs), layout, labels=layout.shard(targets), num_valid=num_valid, **told)
            with accumulating(model, is_last):
                loss.backward()
        else:
            streamed = stream(model, segment_tokens, reduce_each=reduce_each)
            loss = streamed.forward_backward(inputs, targets, layout, num_valid=num_valid, is_last=is_last, **told)
        total += loss.detach()
    if not degrees.shards_weights:
        sum_gradients(model)
    gradients = gathered([(name, p.grad) for name, p in model.named_parameters()], True)
    return {"loss": sum_over_ranks(total), **gradients}


def errors_on_rank(all_degrees: list[MeshDegrees], reduce_each: bool = False) -> list[float]:
    want = in_one_piece(tiny_model(**HYBRID), random_tokens(4, 41))
    found = (trained_on(degrees, HYBRID, reduce_each=reduce_each) for degrees in all_degrees)
    return [worst(differences(got, want)) for got in found]


# Models of Transformers are so divided in make test, in `tests/integrations/transformers/test_stream_training.py`.
@pytest.mark.slow
def test_over_data_and_sequence_with_divided_weights() -> None:
    for errors in run_on_ranks(2, errors_on_rank, [MeshDegrees(dp_shard=2), MeshDegrees(sp=2, shard_over_sp=True)]):
        assert worst(errors) < 1e-10, errors


@pytest.mark.slow
@pytest.mark.parametrize("reduce_each", [False, True])
def test_over_meshes_of_four_ranks(reduce_each: bool) -> None:
    meshes = [MeshDegrees(2, 1, 2), MeshDegrees(1, 2, 2), MeshDegrees(2, 1, 2, True), MeshDegrees(1, 2, 2, True)]
    for errors in run_on_ranks(4, errors_on_rank, meshes, reduce_each):
        assert worst(errors) < 1e-10, errors


def held_by_divided_weights() -> tuple[int, int, list[float]]:
    """Bytes at most, live at once, of a step that sums gradients once and of one that sums them each time; errors of the latter."""
    mesh = ParallelMesh(MeshDegrees(sp=2, shard_over_sp=True))
    tokens, layout = random_tokens(1, 41), SequenceLayout(40, mesh["sp"], order="zigzag")
    wide = {**HYBRID, "num_layers": 8, "hidden_dim": 240}
    want = in_one_piece(tiny_model(**wide), tokens)
    most: list[int] = []
    errors: list[float] = []
    for reduce_each in (False, True):
        model = shard_weights(parallelize(tiny_model(**wide), mesh["sp"]), mesh)
        with LiveBytes() as live:
            streamed = stream(model, 9, reduce_each=reduce_each)
            loss = streamed.forward_backward(tokens[:, :-1], labels_of(tokens), layout)
        most.append(live.most)
        named: Any = [(name, p.grad) for name, p in model.named_parameters()]
        gradients = gathered(named, True)
        errors.append(worst(differences({"loss": sum_over_ranks(loss), **gradients}, want)))
    return most[0], most[1], errors


@pytest.mark.slow
def test_gradients_that_each_segment_sums_are_not_held_whole() -> None:
    num_bytes = 8 * tiny_model(**HYBRID | {"num_layers": 8, "hidden_dim": 240}).num_parameters()
    for once, each, errors in run_on_ranks(2, held_by_divided_weights):
        assert worst(errors) < 1e-10, errors
        # Half of them, and those of one of eight layers, in the place of all.
        assert once - each > 0.3 * num_bytes, (once, each, num_bytes)


def experts_over_a_mesh_on_rank(degrees: MeshDegrees) -> dict[str, float]:
    want = row_by_row(tiny_model(**EXPERTS), random_tokens(4, 41), None, degrees.data)
    got = trained_on(degrees, EXPERTS)
    return differences(got, {name: want[name] for name in got})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "degrees"),
    [
        (2, MeshDegrees(sp=2, shard_over_sp=True)),
        (2, MeshDegrees(dp_shard=2)),
        (2, MeshDegrees(2, 1, 1)),
        (4, MeshDegrees(2, 1, 2)),
        (4, MeshDegrees(1, 2, 2)),
    ],
    ids=str,
)
def test_experts_over_meshes(num_ranks: int, degrees: MeshDegrees) -> None:
    """Choices are counted over all ranks of data and sequence, of which each has segments of its own rows."""
    for errors in run_on_ranks(num_ranks, experts_over_a_mesh_on_rank, degrees):
        assert worst(errors) < 1e-10, errors


def errors_in_mixed_precision() -> list[float]:
    """Of segments, and of one piece."""
    want = in_one_piece(tiny_model(**HYBRID), random_tokens(4, 41))
    degrees = MeshDegrees(sp=2, shard_over_sp=True)
    return [total_error(trained_on(degrees, HYBRID, tokens, torch.bfloat16), want) for tokens in (9, None)]


@pytest.mark.slow
def test_divided_weights_in_mixed_precision_err_no_more_in_segments() -> None:
    for in_segments_err, in_one_piece_err in run_on_ranks(2, errors_in_mixed_precision):
        assert 1e-4 < in_one_piece_err < 0.05 and in_segments_err < 1.5 * in_one_piece_err


def recomputed_on_rank(what: Any) -> dict[str, float]:
    tokens = random_tokens(1, 41)
    want = in_one_piece(tiny_model(**HYBRID, window=11), tokens)
    model = recompute_blocks(parallelize(tiny_model(**HYBRID, window=11), None), what)
    layout = SequenceLayout(40, order="zigzag")
    loss = stream(model, 9).forward_backward(tokens[:, :-1], labels_of(tokens), layout)
    sum_gradients(model)
    return differences({"loss": sum_over_ranks(loss), **gradients_of(model)}, want)


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^layer$")
@pytest.mark.parametrize("what", ["layer", "selective"])
def test_over_ranks_layers_may_be_computed_once_more_inside_of_a_segment(what: Any) -> None:
    for errors in run_on_ranks(2, recomputed_on_rank, what):
        assert worst(errors) < 1e-10, errors


def experts_on_rank() -> dict[str, float]:
    tokens = random_tokens(2, 41)
    want = in_one_piece(tiny_model(**EXPERTS), tokens)
    mesh = ParallelMesh(MeshDegrees(sp=2))
    model = parallelize(tiny_model(**EXPERTS), mesh["sp"], loss_ranks=mesh["world"])
    layout = SequenceLayout(40, mesh["sp"], order="zigzag")
    loss = stream(model, 9).forward_backward(tokens[:, :-1], labels_of(tokens), layout)
    sum_gradients(model)
    return differences({"loss": sum_over_ranks(loss), **gradients_of(model)}, want)


def test_experts_over_ranks() -> None:
    for errors in run_on_ranks(2, experts_on_rank):
        assert worst(errors) < 1e-10, errors


def test_nothing_of_the_model_is_changed() -> None:
    model, tokens = tiny_model(**HYBRID), random_tokens(1, 21)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    stream(model, 5).forward_backward(tokens[:, :-1], labels_of(tokens))
    assert worst({name: relative_error(p, weights[name]) for name, p in model.named_parameters()}) == 0.0
    assert not isinstance(model, nn.ModuleList) and "forward" not in vars(model)
