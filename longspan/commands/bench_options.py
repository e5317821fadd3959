"""What ``longspan bench exchange`` is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from longspan.commands.plan_exchange import LayerOptions
from longspan.errors import ConfigError
from longspan.exchange import TOPOLOGIES
from longspan.ops.variants import VARIANTS


@dataclass(frozen=True)
class BenchExchange(LayerOptions):
    """The exchange of one layer, and how often to measure it."""

    ranks: int = 4
    """Ranks to start on this machine; torchrun's own number under torchrun."""
    topologies: tuple[str, ...] = field(
        default_factory=lambda: tuple(name for name in TOPOLOGIES if name != "neighbour")
    )
    """What to measure. neighbour holds for two ranks, and for retention with a log_decay that leaves nothing."""
    log_decay: float | None = None
    """Over a segment, but for the delta rules; else random ones from −1 to 0. Below −104 nothing is left in float32."""
    ranks_per_node: int | None = None
    """Ranks that share a node, for two_level; else the names of the hosts tell."""
    repeats: int = 11
    """Measurements of each topology, in turn with the others; the median is shown."""
    threads: int = 1
    """CPU threads per rank."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the states are: ranks on the CPU use gloo, those on GPUs NCCL."""
    timeout_seconds: float = 120.0
    """How long a rank waits for the others before it gives up."""
    json: str | None = None
    """Write the figures to this file, too."""

    def check(self, num_ranks: int) -> None:
        """Raise ConfigError for values that do not fit each other or `num_ranks`."""
        if num_ranks < 2:
            raise ConfigError(f"an exchange takes at least 2 ranks; got {num_ranks}")
        for name in ("batch_size", "heads", "key_size", "value_size", "repeats", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.operator not in VARIANTS:
            raise ConfigError(f"operator must be one of {', '.join(VARIANTS)}; got {self.operator!r}")
        for name in self.topologies:
            if name not in (*TOPOLOGIES, "auto"):
                raise ConfigError(f"topologies must be among {', '.join(TOPOLOGIES)} and auto; got {name!r}")
        if self.ranks_per_node is not None and (self.ranks_per_node < 1 or num_ranks % self.ranks_per_node):
            raise ConfigError(f"ranks_per_node {self.ranks_per_node} does not divide {num_ranks} ranks")
