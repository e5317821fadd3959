"""A small model of bytes, given to the ranks that this is called on."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import longspan
from longspan.launch import Place
from longspan.models import LinearLlama3
from longspan.parallel import MeshDegrees
from longspan.train.ranks import Ranks
from tests.models.tiny import tiny_model

ORDERS: tuple[Any, ...] = ("contiguous", "zigzag")
RANKS_AND_ORDERS = [(1, "contiguous"), (2, "contiguous"), (2, "zigzag")]
MORE_RANKS_AND_ORDERS = [(4, "contiguous"), (4, "zigzag")]


def byte_model() -> LinearLlama3:
    """A hybrid in float64 whose tokens are those of `ByteTokenizer`."""
    return tiny_model(vocab_size=257, num_layers=2, pattern="LN")


def given_to_ranks(model: LinearLlama3) -> tuple[LinearLlama3, Ranks]:
    ranks = Ranks(Place(dist.get_rank(), dist.get_world_size()), torch.device("cpu"))
    ranks.arrange(MeshDegrees(sp=ranks.world_size))
    if ranks.mesh is not None:
        longspan.parallelize(model, ranks.mesh["sp"])
    return model, ranks
