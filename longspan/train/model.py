"""The model of a run: built from the config, given to the ranks, copied back for one process."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longspan.models import LinearLlama3
from longspan.parallel import parallelize, shard_weights, sum_gradients
from longspan.parallel.sharded import copy_whole
from longspan.train.config import Config
from longspan.train.ranks import Ranks


def build_model(config: Config, vocab_size: int, device: torch.device) -> LinearLlama3:
    """The model with the initial weights of the run's seed, the same on every rank, for a single process."""
    # Layers draw weights when they are made, which `init_weights` then replaces: the run's random state must not
    # notice.
    with torch.random.fork_rng(devices=[]):
        model = LinearLlama3(config.model.build(vocab_size))
    model.init_weights(config.train.seed)
    return model.to(device)


def make_parallel(model: LinearLlama3, config: Config, ranks: Ranks) -> LinearLlama3:
    """Let the model run on the sequences that the ranks share, and divide its weights; a single process has nothing to share."""
    if ranks.mesh is None:
        return model
    model = parallelize(
        model,
        ranks.mesh["sp"],
        exchange=config.parallel.build_exchange(),
        softmax_method=config.parallel.softmax_method,
    )
    return shard_weights(model, ranks.mesh) if ranks.degrees.shards_weights else model


def sum_over_ranks(model: nn.Module, ranks: Ranks) -> None:
    """After backward: gradients are the sums over all ranks. FSDP2 has summed those of weights that are divided."""
    if not ranks.degrees.shards_weights:
        sum_gradients(model)


def copy_weights(weights: dict[str, Tensor], target: LinearLlama3) -> LinearLlama3:
    """Give `target` whole weights by name; return it."""
    for name, parameter in target.named_parameters():
        copy_whole(weights[name], parameter)
    return target
