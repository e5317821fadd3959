"""What people do to a model after it was parallelized: copy it, average its weights, save it whole, shard it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from longspan import SequenceLayout, parallelize, sum_gradients, write
from longspan.attention.normalized import write_normalized
from longspan.attention.softmax import write_softmax
from longspan.errors import InputError
from longspan.exchange import Pipelined, Ring
from longspan.models import LinearLlama3
from tests.compare import relative_error, worst
from tests.models.tiny import each_linear_mixer, random_tokens, tiny_model
from tests.ranks import raised, run_on_ranks


def saved_and_loaded(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def difference(got: Iterable[Tensor | None], want: Iterable[Tensor | None]) -> float:
    errors = []
    for ours, theirs in zip(got, want, strict=True):
        assert ours is not None and theirs is not None
        errors.append(relative_error(ours, theirs))
    return worst(errors)


def copies_of_a_model(operator: str) -> list[float]:
    """Differences of a deep copy and of averaged weights from the model, and of a loaded model from one process's."""
    tokens = random_tokens(1, 41)
    alone = tiny_model(operator=operator)
    model = parallelize(tiny_model(operator=operator), None, exchange=Ring(), softmax_method="all_gather")
    layout = SequenceLayout(41, order="zigzag")
    own = layout.shard(tokens)
    expected = model(own, layout=layout)
    expected.square().sum().backward()

    copied = copy.deepcopy(model)
    for parameter, original in zip(copied.parameters(), model.parameters(), strict=True):
        assert parameter is not original and parameter.data_ptr() != original.data_ptr()
    assert copied.sequence_parallel == model.sequence_parallel
    assert copy.copy(model).sequence_parallel == model.sequence_parallel
    averaged = AveragedModel(model)
    moving = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for average in (averaged, moving):
        average.update_parameters(model)
    copied.zero_grad()
    logits = copied(own, layout=layout)
    logits.square().sum().backward()
    differences = [difference([logits], [expected])]
    differences.append(difference([p.grad for p in copied.parameters()], [p.grad for p in model.parameters()]))
    differences += [difference([average(own, layout=layout)], [expected]) for average in (averaged, moving)]

    for loaded in (saved_and_loaded(model), pickle.loads(pickle.dumps(model)), saved_and_loaded(averaged).module):
        assert loaded.sequence_parallel is None
        if layout.num_ranks > 1:
            # As every model that was not parallelized says.
            kind, text = raised(call, loaded, own, layout)
            assert kind == "LayoutError" and "Call longspan.parallelize(model, group) first" in text
        with torch.no_grad():
            differences.append(difference([loaded(tokens)], [alone(tokens)]))
            differences.append(difference([parallelize(loaded, None)(own, layout=layout)], [expected]))
    return differences


def call(model: LinearLlama3, tokens: Tensor, layout: SequenceLayout) -> Tensor:
    logits: Tensor = model(tokens, layout=layout)
    return logits


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(2-hgrn2|1-simple_gla)$")
@pytest.mark.parametrize("operator", each_linear_mixer(("simple_gla", "hgrn2")))
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_copies_of_a_parallel_model_are_parallel_and_a_loaded_one_is_a_model(num_ranks: int, operator: str) -> None:
    for differences in run_on_ranks(num_ranks, copies_of_a_model, operator):
        assert worst(differences) < 1e-9


# Layouts, options, memories.


def copies_of_a_layout() -> tuple[bool, list[tuple[str, str]]]:
    layout = SequenceLayout(40, documents=[0, 7, 40], order="zigzag")
    same = copy.deepcopy({"layout": layout})["layout"] is layout and copy.copy(layout) is layout
    return same, [raised(pickle.dumps, layout), raised(saved_and_loaded, {"layout": layout.mirrored})]


def test_a_layout_of_a_group_is_its_own_copy_and_says_why_it_is_not_pickled() -> None:
    for same, refused in run_on_ranks(2, copies_of_a_layout):
        assert same
        for kind, text in refused:
            assert kind == "LayoutError"
            assert "groups belong to their process" in text and "SequenceLayout.for_rank(" in text


def test_a_layout_without_a_group_is_pickled() -> None:
    for layout in (
        SequenceLayout.for_rank(40, 3, 1, "zigzag", [0, 7, 40]),
        SequenceLayout.local(40),
        SequenceLayout.for_rank(40, 3, 1, "zigzag", [0, 7, 40]).mirrored,
    ):
        layout.positions_on("cpu")
        loaded = pickle.loads(pickle.dumps(layout))
        assert repr(loaded) == repr(layout)
        assert loaded.pieces == layout.pieces and loaded.all_segments == layout.all_segments
        assert torch.equal(loaded.positions, layout.positions)


def test_options_are_copied_and_pickled() -> None:
    options = Pipelined(torch.bfloat16, 3)
    assert copy.deepcopy(options) == options == pickle.loads(pickle.dumps(options))
    config = tiny_model().config
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_memory_says_that_it_belongs_to_its_step(copied: Any) -> None:
    k, v = torch.rand(1, 5, 2, 4), torch.rand(1, 5, 2, 3)
    memories: list[Any] = [
        write("linear_attention", k, v),
        write("linear_attention", k, v, causal=False),
        write("retention", k, v, log_decay=torch.full((2,), -0.1), causal=False),
        write_softmax(k, torch.rand(1, 5, 2, 4)),
    ]
    if copied is not copy.copy:
        # It holds the operator's own.
        memories.append(write_normalized(k, v))
    for memory in memories:
        with pytest.raises(InputError, match=r"a \w+Memory belongs to the step .* neither copied nor"):
            copied(memory)


# FSDP2 and sparse gradients.


def shard_and_sum(tokens_a_row: int) -> tuple[float, tuple[str, str]]:
    """The difference of the gradients from one process's, and what is said of a group that FSDP2 has reduced over."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    tokens = random_tokens(2, tokens_a_row + 1)
    alone = tiny_model()
    num_valid = tokens[:, 1:].numel()
    (F.cross_entropy(alone(tokens[:, :-1]).mT, tokens[:, 1:], reduction="sum") / num_valid).backward()

    model: Any = parallelize(tiny_model(), mesh["sp"])
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh["dp"]).set_gradient_divide_factor(1.0)
    layout = SequenceLayout(tokens_a_row, mesh["sp"], order="zigzag")
    row = mesh["dp"].get_local_rank()
    own = tokens[row : row + 1]
    logits = model(layout.shard(own[:, :-1]), layout=layout)
    (F.cross_entropy(logits.mT, layout.shard_labels(own), reduction="sum") / num_valid).backward()
    refused = raised(sum_gradients, model)
    sum_gradients(model, mesh["sp"])
    found = [parameter.grad.full_tensor() for parameter in model.parameters()]
    return difference(found, [parameter.grad for parameter in alone.parameters()]), refused


def test_sharded_gradients_are_summed_over_the_other_ranks_alone() -> None:
    for error, (kind, text) in run_on_ranks(4, shard_and_sum, 30):
        assert error < 1e-10
        assert kind == "InputError"
        assert 'sum_gradients(model, mesh["sp"])' in text and "set_gradient_divide_factor(1.0)" in text


def missing_shards() -> list[list[float]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    model: Any = nn.Linear(3, 3)
    fully_shard(model, mesh=mesh["dp"])
    if mesh["sp"].get_local_rank():
        model.weight.grad = torch.ones_like(model.weight)
    sum_gradients([model.weight, model.bias], mesh["sp"])
    return [parameter.grad.full_tensor().unique().tolist() for parameter in model.parameters()]


def test_a_missing_sharded_gradient_is_zero() -> None:
    assert run_on_ranks(4, missing_shards) == [[[1.0], [0.0]]] * 4


def sparse_and_dense(optimizer: type[torch.optim.Optimizer]) -> tuple[bool, float]:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    every = [torch.tensor([[1, 2, 2], [5, 1, 0]][r % 2]) for r in range(num_ranks)]
    tables = [nn.Embedding(9, 4, sparse=sparse, dtype=torch.float64) for sparse in (True, False)]
    upstream = torch.randn(num_ranks, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for table in tables:
        with torch.no_grad():
            table.weight.copy_(torch.arange(36.0).view(9, 4))
    (tables[0](every[rank]) * upstream[rank]).sum().backward()
    for r in range(num_ranks):
        (tables[1](every[r]) * upstream[r]).sum().backward()
    sum_gradients(tables[0])
    grad, expected = tables[0].weight.grad, tables[1].weight.grad
    assert grad is not None and expected is not None
    optimizer(tables[0].parameters(), lr=0.1).step()  # type: ignore[call-arg]
    return grad.is_sparse, difference([grad.to_dense()], [expected])


@pytest.mark.parametrize("optimizer", [torch.optim.SparseAdam, torch.optim.SGD])
def test_sparse_gradients_are_summed_and_stay_sparse(optimizer: type[torch.optim.Optimizer]) -> None:
    for is_sparse, error in run_on_ranks(2, sparse_and_dense, optimizer):
        assert is_sparse
        assert error < 1e-14


def one_sparse_one_missing() -> list[float]:
    table = nn.Embedding(3, 2, sparse=True)
    if dist.get_rank():
        table(torch.tensor([1])).sum().backward()
    sum_gradients(table)
    assert table.weight.grad is not None
    return table.weight.grad.to_dense().sum(1).tolist()


def test_a_missing_sparse_gradient_is_zero() -> None:
    assert run_on_ranks(2, one_sparse_one_missing) == [[0.0, 2.0, 0.0]] * 2
