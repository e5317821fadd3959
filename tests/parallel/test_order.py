"""Every rank launches the operations of torch.distributed in one order, forward, backward and after it: what NCCL needs."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from longspan import SequenceLayout, parallelize, sum_gradients
from longspan.parallel import MeshDegrees, ParallelMesh, recompute_blocks, shard_weights
from longspan.parallel.sharded import accumulating
from longspan.train.optimizer import clip_gradients, gradient_norm
from tests.models.tiny import random_tokens, tiny_model
from tests.ranks import run_on_ranks

LENGTH = 24


class Operations(TorchDispatchMode):
    """Notes the operations of torch.distributed that this thread launches: name, size of the group, shape and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[str, int, tuple[int, ...], str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            *_, x = (leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, Tensor))
            # Of an all-to-all ranks may send more or fewer rows.
            shape = tuple(x.shape[1:] if "alltoall" in name else x.shape)
            self.noted.append((name, _group_size(args), shape, str(x.dtype)))
        return func(*args, **(kwargs or {}))

    def of_norm(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The sum of a DTensor's shares, which no mode sees."""
        self.noted.append(("functional all_reduce", 0, tuple(x.shape), str(x.dtype)))
        return mock.DEFAULT


def _group_size(args: tuple[Any, ...]) -> int:
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return dist.ProcessGroup.unbox(argument).size()
    return 0


def operations_of_steps(degrees: MeshDegrees, method: Any) -> list[list[tuple[str, int, tuple[int, ...], str]]]:
    """The operations of the second and of the third step, in order: the first makes groups and caches."""
    mesh = ParallelMesh(degrees)
    model = parallelize(
        tiny_model(num_layers=3, pattern="LN"), mesh["sp"], exchange="all_gather", softmax_method=method
    )
    recompute_blocks(model, "selective")
    if degrees.shards_weights:
        shard_weights(model, mesh)
    layout = SequenceLayout(LENGTH, mesh["sp"], order="zigzag")
    own = random_tokens(4, LENGTH + 1).chunk(degrees.data)[mesh.coordinate("data")]
    steps = []
    for _ in range(3):
        operations = Operations()
        real = functional_collectives.all_reduce
        with (
            operations,
            mock.patch.object(functional_collectives, "all_reduce", wraps=real, side_effect=operations.of_norm),
        ):
            for number, tokens in enumerate(own.chunk(2)):
                with accumulating(model, number == 1):
                    logits = model(layout.shard(tokens[:, :-1]), layout=layout)
                    F.cross_entropy(logits.mT, layout.shard_labels(tokens), reduction="sum").backward()
            if not degrees.shards_weights:
                sum_gradients(model)
            clip_gradients(model, gradient_norm(model), 1.0)
            model.zero_grad(set_to_none=True)
        steps.append(operations.noted)
    return steps[1:]


@pytest.mark.slow_rows(r"degrees1")
@pytest.mark.parametrize("method", ["all_gather", pytest.param("ulysses", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "degrees",
    [
        MeshDegrees(1, 2, 2),
        MeshDegrees(2, 1, 2, shard_over_sp=True),
        pytest.param(MeshDegrees(2, 1, 2), marks=pytest.mark.slow),
    ],
)
def test_every_rank_launches_the_same_operations_in_the_same_order(degrees: MeshDegrees, method: str) -> None:
    first, *others = run_on_ranks(4, operations_of_steps, degrees, method)
    assert first[0] == first[1]
    assert all(other == first for other in others)
    names = [name for name, *_ in first[0]]
    if degrees.shards_weights:
        # Weights are gathered for each block and the model, forward and backward but for the model itself, twice a step; gradients
        # are scattered with the last micro-batch alone.
        assert sum("reduce_scatter" in name for name in names) == 4
        assert names[-1] == "functional all_reduce"
    assert len(names) > 10
