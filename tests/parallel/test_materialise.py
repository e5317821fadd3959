"""Weights that are divided before they are made: those of one process, bit for bit, and no rank ever holds all of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from longspan.launch import Place
from longspan.models import MIXERS, LinearLlama3, LinearLlama3Config
from longspan.parallel import MeshDegrees, ParallelMesh, gathered, materialise, shard_weights
from longspan.parallel.sharded import is_divided, on_this_rank
from longspan.train.config import Config, from_mapping
from longspan.train.model import build_model, build_parallel
from longspan.train.ranks import Ranks
from tests.ranks import raised, run_on_ranks

VOCABULARY = 61
# One of each, and HGRN2 twice, whose layers share a parameter.
MIXERS_OF_LAYERS = [*MIXERS, "hgrn2"]
# Heads and widths that no number of ranks divides.
MODEL = {
    "dim": 15,
    "num_heads": 3,
    "num_kv_heads": 1,
    "head_dim": 6,
    "hidden_dim": 23,
    "num_layers": len(MIXERS_OF_LAYERS),
}


def config_of(degrees: MeshDegrees, **values: Any) -> Config:
    parallel = {name: getattr(degrees, name) for name in ("dp_replicate", "dp_shard", "sp", "shard_over_sp")}
    mapping: dict[str, Any] = {
        "model": MODEL | {"pattern": MIXERS_OF_LAYERS},
        "parallel": parallel | {"exchange": "all_gather"},
        "train": {"seed": 3},
    }
    for key, value in values.items():
        section, name = key.split("__")
        mapping[section][name] = value
    return from_mapping(mapping)


def unequal(config: Config, degrees: MeshDegrees, dtype: torch.dtype | None = None) -> list[str]:
    """The weights of the ranks, each of which are divided, that are not those of one process."""
    ranks = Ranks(Place(dist.get_rank(), dist.get_world_size()), torch.device("cpu"))
    ranks.arrange(degrees)
    torch.manual_seed(ranks.rank)
    before = torch.get_rng_state()
    model = build_parallel(config, VOCABULARY, ranks, dtype)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(is_divided(parameter) for parameter in model.parameters())
    alone = dict(build_model(config, VOCABULARY, ranks.device).named_parameters())
    found = gathered(model.named_parameters(), keeps=True)
    assert found.keys() == alone.keys() and (model.head.weight is model.embedding.weight) == config.model.tie_embeddings
    return [name for name, weight in found.items() if not torch.equal(weight, alone[name])]


# Weights are divided over two ranks, with and without others beside them in the slow rows.
@pytest.mark.slow_rows(r"dp_shard=2, sp=2")
@pytest.mark.slow_rows(r"(dp_shard=4, sp=1|dp_replicate=2|shard_over_sp=True)")
@pytest.mark.parametrize(
    "degrees",
    [
        MeshDegrees(dp_shard=2),
        MeshDegrees(sp=2, shard_over_sp=True),
        MeshDegrees(dp_replicate=2, dp_shard=2),
        MeshDegrees(dp_shard=2, sp=2),
        MeshDegrees(dp_shard=2, sp=2, shard_over_sp=True),
        MeshDegrees(dp_shard=4),
    ],
    ids=str,
)
def test_initial_weights_are_those_of_one_process_on_every_mesh(degrees: MeshDegrees) -> None:
    experts = {"model__num_experts": 3, "model__num_shared_experts": 1}
    for values in ({}, {"model__tie_embeddings": True, "train__recompute": "layer", **experts}):
        config = config_of(degrees, **values)
        dtype = torch.bfloat16 if values else None
        assert run_on_ranks(degrees.world_size, unequal, config, degrees, dtype) == [[]] * degrees.world_size


def most_allocated(config: Config, degrees: MeshDegrees) -> tuple[int, int, int, int]:
    """The most bytes of tensors at a time while the model is built; bytes of this rank's shares, of the largest weight, of all."""
    ranks = Ranks(Place(dist.get_rank(), dist.get_world_size()), torch.device("cpu"))
    ranks.arrange(degrees)
    # Once before: groups, and what modules keep from their import on.
    build_parallel(config, VOCABULARY, ranks)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model = build_parallel(config, VOCABULARY, ranks)
    held = most = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    weights = list(model.parameters())
    return (
        most,
        sum(on_this_rank(weight).nbytes for weight in weights),
        max(4 * weight.numel() for weight in weights),
        sum(4 * weight.numel() for weight in weights),
    )


@pytest.mark.slow_rows(r"^4$")
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_no_rank_holds_more_than_its_share_and_one_weight(num_ranks: int) -> None:
    degrees = MeshDegrees(dp_shard=num_ranks)
    sizes = {"model__dim": 128, "model__hidden_dim": 128, "model__num_layers": 20, "model__pattern": "LLLLLN"}
    config = config_of(degrees, **sizes)
    found = run_on_ranks(num_ranks, most_allocated, config, degrees)
    # FSDP2 fills smaller shares up to the size of the others.
    share = max(own for _, own, _, _ in found)
    for most, own, largest, whole in found:
        assert largest < whole / 40 and share < 1.1 * whole / num_ranks
        assert own < most < share + 2 * largest


class Small(nn.Module):
    """A module that knows the initial values of one of its two weights alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([self.linear])

    def init_weights(self, whole: Any) -> None:
        with whole(self.linear):
            nn.init.ones_(self.linear.weight)


def made(model_of: Any, initialise: Any) -> None:
    mesh = ParallelMesh(MeshDegrees(dp_shard=2))
    with torch.device("meta"):
        model = model_of()
    materialise(shard_weights(model, mesh), torch.device("cpu"), partial(initialise, model))


def test_a_weight_that_nothing_sets_is_refused_by_name() -> None:
    for kind, text in run_on_ranks(2, raised, made, Small, Small.init_weights):
        assert kind == "InputError" and "`initialise` has not set linear.bias. Let it" in text


def test_a_model_on_the_meta_device_is_initialised_to_nothing() -> None:
    with torch.device("meta"):
        model = LinearLlama3(LinearLlama3Config(vocab_size=VOCABULARY, **MODEL))  # type: ignore[arg-type]
    assert all(parameter.is_meta for parameter in model.parameters())
