"""The model of a run: built from the config, given to the ranks, copied back for one process."""

from __future__ import annotations

import torch
from torch import nn

from longspan.models import LinearLlama3
from longspan.parallel import parallelize
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
    """Let the model run on the sequences that the ranks share; a single process has nothing to share."""
    if ranks.mesh is None:
        return model
    return parallelize(
        model,
        ranks.mesh["sp"],
        exchange=config.parallel.build_exchange(),
        softmax_method=config.parallel.softmax_method,
    )


@torch.no_grad()
def copy_weights(source: nn.Module, target: LinearLlama3) -> LinearLlama3:
    """Give `target` the weights of `source`, parameter by parameter of the same name; return it."""
    weights = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        parameter.copy_(weights[name])
    return target
