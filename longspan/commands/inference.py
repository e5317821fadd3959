"""What commands have in common that put the model of a run to use: on which ranks, in which dtype."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from longspan.errors import ConfigError
from longspan.launch import num_cores

if TYPE_CHECKING:
    import torch

    from longspan.launch import Place
    from longspan.models import LinearLlama3
    from longspan.train.config import Config
    from longspan.train.ranks import Ranks
    from longspan.train.trained import Trained


@dataclass(frozen=True)
class InferenceParallel:
    """On how many ranks a sequence is read, and on which."""

    sp: int | None = None
    """Ranks that share a sequence; None is 1, or under torchrun all of them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes GPUs if there is one for each local rank."""
    threads: int | None = None
    """CPU threads of a rank; None divides the cores between the local ranks."""
    timeout_seconds: float = 600.0
    """Give up when a collective has waited this long for another rank."""

    def check(self) -> None:
        """Raise ConfigError for values out of their range."""
        from longspan.train.config_checks import YEAR

        for name, value in (("parallel.sp", self.sp), ("parallel.threads", self.threads)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if not 0 < self.timeout_seconds <= YEAR:
            raise ConfigError(
                f"parallel.timeout_seconds is {self.timeout_seconds}; it must be a number greater than 0, at most {YEAR}, a year"
            )

    def local_threads(self, num_ranks: int) -> int:
        """Threads of each of so many ranks of this machine."""
        return self.threads or max(1, num_cores() // num_ranks)

    def start(self, place: Place) -> Ranks:
        """Meet the other ranks, all of which share each sequence.

        Raises:
            ConfigError: if there are not as many as are asked for, or not the GPUs.
        """
        import torch

        from longspan.parallel import MeshDegrees
        from longspan.train.ranks import Ranks

        torch.set_num_threads(self.local_threads(place.local_world_size))
        ranks = Ranks.start(place, self.device, self.timeout_seconds)
        degrees = MeshDegrees(sp=self.sp or ranks.world_size)
        degrees.check_world(ranks.world_size, "parallel.")
        ranks.arrange(degrees)
        return ranks


def compute_dtype_of(
    asked: Literal["auto", "float32", "bfloat16"], config: Config, device: torch.device
) -> torch.dtype | None:
    """What layers compute in, where it is not float32; raises ConfigError where the device cannot.

    asked: a dtype, or ``"auto"`` for that of the training.
    """
    from longspan.train.model import check_device, compute_dtype

    dtype = config.train.dtype if asked == "auto" else asked
    train = dataclasses.replace(config.train, dtype=dtype, compile=False)
    wanted = dataclasses.replace(config, train=train, run=dataclasses.replace(config.run, memory_snapshot_step=None))
    check_device(wanted, device)
    return compute_dtype(wanted)


def for_ranks(trained: Trained, ranks: Ranks, dtype: torch.dtype | None) -> LinearLlama3:
    """The model on this rank's device, for the ranks, with nothing that training alone needs.

    How the ranks of the training exchanged is not taken over: what it rounded or left out on the way, one process does not, and its
    method for softmax layers may not serve another number of ranks.
    """
    from longspan.train.config import ParallelConfig
    from longspan.train.model import make_parallel

    # A few sequences do not repay measuring how to exchange.
    train = dataclasses.replace(trained.config.train, compile=False, recompute="none", deterministic=True)
    config = dataclasses.replace(trained.config, train=train, parallel=ParallelConfig())
    return make_parallel(trained.model.to(ranks.device), config, ranks, dtype)


def is_beyond_training(trained: Trained, num_tokens: int) -> bool:
    """Whether softmax layers see further than in training; those with a window do not, and linear ones have no positions."""
    config = trained.model.config
    return "N" in config.layer_kinds and config.window is None and num_tokens > trained.config.train.seq_len


def say(line: str) -> None:
    """A line for the user beside what a command gives out."""
    sys.stderr.write(f"longspan: {line}\n")
    sys.stderr.flush()
