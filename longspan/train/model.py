"""The model of a run: built from the config, given to the ranks, copied back for one process."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from longspan.errors import ConfigError
from longspan.models import LinearLlama3
from longspan.parallel import (
    compile_blocks,
    compute_in,
    materialise,
    parallelize,
    recompute_blocks,
    shard_weights,
    sum_gradients,
)
from longspan.parallel.compiled import check_compiler
from longspan.parallel.sharded import copy_whole, on_this_rank
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


def build_parallel(
    config: Config,
    vocab_size: int,
    ranks: Ranks,
    dtype: torch.dtype | None = None,
    weights: torch.dtype = torch.float32,
) -> LinearLlama3:
    """The model of `build_model`, made parallel; where weights are divided over ranks, none of these ever holds all of them.

    dtype: as in `make_parallel`. weights: what the weights are, float32 or float64.
    """
    if not ranks.degrees.shards_weights:
        return make_parallel(build_model(config, vocab_size, ranks.device).to(weights), config, ranks, dtype)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = LinearLlama3(config.model.build(vocab_size)).to(weights)
    make_parallel(model, config, ranks, dtype)
    return materialise(model, ranks.device, partial(model.init_weights, config.train.seed))


def make_parallel(model: LinearLlama3, config: Config, ranks: Ranks, dtype: torch.dtype | None = None) -> LinearLlama3:
    """Let the model run as the config says, on the sequences that the ranks share and with a share of its weights each.

    dtype: what layers compute in, where it is not that of the weights.
    """
    if ranks.mesh is not None:
        parallelize(
            model,
            ranks.mesh["sp"],
            exchange=config.parallel.build_exchange(measure=not config.train.deterministic),
            softmax_method=config.parallel.softmax_method,
            loss_ranks=ranks.mesh["world"] if config.model.num_experts else None,
        )
    if config.train.compile:
        compile_blocks(model)
    if dtype is not None and not ranks.degrees.shards_weights:
        compute_in(model, dtype)
    if config.train.recompute != "none":
        recompute_blocks(model, config.train.recompute)
    if ranks.mesh is not None and ranks.degrees.shards_weights:
        shard_weights(model, ranks.mesh, dtype=dtype)
    return model


def compute_dtype(config: Config) -> torch.dtype | None:
    """What layers compute in, where it is not float32."""
    return torch.bfloat16 if config.train.dtype == "bfloat16" else None


def checked_dtype(config: Config) -> torch.dtype:
    """What ranks and one process are compared in: float32, or float64 for a model with experts.

    The choice of experts jumps where two of them are as likely: in float32 the two sides would choose differently for a token now
    and then, by rounding alone.
    """
    return torch.float64 if config.model.num_experts else torch.float32


def check_device(config: Config, device: torch.device) -> None:
    """Raise ConfigError where the device cannot compute as the config says."""
    if config.run.memory_snapshot_step is not None and device.type != "cuda":
        raise ConfigError(
            f"run.memory_snapshot_step is {config.run.memory_snapshot_step}, and this run is on the {device.type}: PyTorch records "
            "the memory of GPUs alone. Leave it out: metrics.jsonl has the memory of each step, and run.trace_step its allocations"
        )
    if config.train.compile:
        check_compiler(device)
    if config.train.dtype == "bfloat16" and device.type == "cuda" and not computes_in_bfloat16():
        raise ConfigError(
            f"train.dtype is 'bfloat16', which {torch.cuda.get_device_name(device)} does not compute in. Use train.dtype "
            "'float32', or a GPU of compute capability 8.0 or newer"
        )


def computes_in_bfloat16() -> bool:
    """Whether this process's GPU does, and does not merely emulate it."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def sum_over_ranks(model: nn.Module, ranks: Ranks) -> None:
    """After backward: gradients are the sums over all ranks. FSDP2 has summed those of weights that are divided."""
    if not ranks.degrees.shards_weights:
        sum_gradients(model)


def copy_weights(weights: dict[str, Tensor], target: LinearLlama3) -> LinearLlama3:
    """Give `target` whole weights by name; return it."""
    for name, parameter in target.named_parameters():
        copy_whole(weights[name], parameter)
    return target


@torch.no_grad()
def copy_shares(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the weights of `source`, which is the same model on the same mesh: each rank copies what it holds."""
    for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
        on_this_rank(ours).copy_(on_this_rank(theirs))
