"""A trained model that a command puts to use computes on ranks what it computes in one process, however its training exchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from longspan import SequenceLayout
from longspan.commands.inference import for_ranks
from longspan.data.tokenizer import ByteTokenizer
from longspan.launch import Place
from longspan.parallel import MeshDegrees
from longspan.train.config import from_mapping
from longspan.train.ranks import Ranks
from longspan.train.trained import Trained
from tests.compare import relative_error, worst
from tests.evaluation.shared import byte_model
from tests.models.tiny import random_tokens
from tests.ranks import run_on_ranks

LENGTH = 50


def difference(parallel: dict[str, Any]) -> float:
    """Of this rank's logits, from those of one process."""
    ranks = Ranks(Place(dist.get_rank(), dist.get_world_size()), torch.device("cpu"))
    ranks.arrange(MeshDegrees(sp=ranks.world_size))
    assert ranks.mesh is not None
    trained = Trained(byte_model(), ByteTokenizer(), from_mapping({"parallel": parallel}), "a model")
    model = for_ranks(trained, ranks, None)
    layout, tokens = SequenceLayout(LENGTH, ranks.mesh["sp"], "zigzag"), random_tokens(1, LENGTH)
    with torch.no_grad():
        return relative_error(model(layout.shard(tokens), layout), layout.shard(byte_model()(tokens)))


@pytest.mark.parametrize(
    ("num_ranks", "parallel"),
    [
        (2, {"exchange_dtype": "int8"}),
        (2, {"exchange_dtype": "top_k", "exchange_error_feedback": True}),
        (2, {"exchange": "ring", "exchange_dtype": "bfloat16"}),
        # Which does not divide four heads.
        (3, {"softmax_method": "ulysses"}),
    ],
    ids=str,
)
def test_logits_are_those_of_one_process_however_the_training_exchanged(
    num_ranks: int, parallel: dict[str, Any]
) -> None:
    assert worst(run_on_ranks(num_ranks, difference, parallel)) < 1e-11
