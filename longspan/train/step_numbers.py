"""What ranks tell each other at the end of a step, in one exchange, so that all of them decide alike; and what is noted of it."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import Any

from torch import Tensor

from longspan.comm.traffic import Traffic
from longspan.train.ranks import Ranks


@dataclass(frozen=True)
class RankNumbers:
    """What one rank tells of a step."""

    loss: float
    """Its part of the cross-entropy."""
    gradient_norm: float
    stops: bool
    """A signal has reached it."""
    waited: float
    """Seconds in which it waited for other ranks."""
    peak_bytes: float
    data_wait: float
    """Seconds in which it waited for its part of the next batch."""
    lacks_batch: bool
    """It could not read that part."""
    held_bytes: float
    exchanging: float
    """Seconds in which an exchange was under way."""
    operations: float
    """Of forward and backward."""

    def gathered(self, ranks: Ranks, of_routers: list[float]) -> StepNumbers:
        """Those of all ranks, `of_routers` behind them; every rank calls this."""
        everyone = ranks.gather_numbers([*astuple(self), *of_routers])
        num_own = len(fields(self))
        named = {field.name: everyone[:, place] for place, field in enumerate(fields(self))}
        return StepNumbers(named, everyone[:, num_own:])


@dataclass(frozen=True)
class StepNumbers:
    """What all ranks have told of a step, the same on each of them."""

    of_ranks: dict[str, Tensor]
    """By the names of `RankNumbers`, float64 ``[world_size]``."""
    of_routers: Tensor
    """``[world_size, number of shares]``: see `longspan.train.routers`."""

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradients are, on every rank."""
        return all(bool(self.of_ranks[name].isfinite().all()) for name in ("loss", "gradient_norm"))

    @property
    def stops(self) -> bool:
        """Whether a signal has reached any rank."""
        return bool(self.of_ranks["stops"].any())

    @property
    def lacks_batch(self) -> bool:
        """Whether any rank could not read its part of the next batch."""
        return bool(self.of_ranks["lacks_batch"].any())

    @property
    def loss(self) -> float:
        """The cross-entropy of the whole batch."""
        return float(self.of_ranks["loss"].sum())

    @property
    def waited(self) -> float:
        """Seconds in which a rank waited for others, in the mean."""
        return float(self.of_ranks["waited"].mean())

    @property
    def data_wait(self) -> float:
        """Seconds in which the slowest rank waited for data."""
        return float(self.of_ranks["data_wait"].max())

    @property
    def peak_bytes(self) -> int:
        """The most of any rank."""
        return int(self.of_ranks["peak_bytes"].max())

    def rates(self, num_tokens: int, seconds: float, peak_flops: float | None, traffic: Traffic) -> dict[str, Any]:
        """What a record says of a step of `num_tokens` in so many seconds.

        peak_flops: operations a second that all ranks together can reach; None is unknown. traffic: of this rank.
        """
        tokens_per_second = num_tokens / seconds
        flops_per_second = float(self.of_ranks["operations"].sum()) / seconds
        return {
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_rank": tokens_per_second / len(self.of_routers),
            "flops_per_second": flops_per_second,
            "flops_share": flops_per_second / peak_flops if peak_flops else None,
            "wait_share": self.waited / seconds,
            "exchange_share": float(self.of_ranks["exchanging"].mean()) / seconds,
            "data_wait": self.data_wait,
            "data_wait_share": self.data_wait / seconds,
            "exchanges": traffic.num_collectives,
            "exchanged_bytes": traffic.bytes_sent,
            "memory_bytes": int(self.of_ranks["held_bytes"].max()),
            "peak_memory_bytes": self.peak_bytes,
            "seconds": seconds,
        }
