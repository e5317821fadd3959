"""What a step says of the routers of a model with experts: numbers of each rank, and the metrics of all of them."""

from __future__ import annotations

from torch import Tensor

from longspan.models import Routing

_SHARES = {
    "auxiliary_loss": "auxiliary",
    "balance_loss": "balance",
    "z_loss": "z",
    "router_entropy": "entropy",
}
"""Metrics that are sums over ranks, with the names of a rank's shares."""


def shares_of_rank(routing: Routing | None) -> list[float]:
    """This rank's shares, to be summed over the ranks; none where there are no experts. The host waits for them."""
    return [] if routing is None else [float(getattr(routing, name)) for name in _SHARES.values()]


def router_metrics(routing: Routing | None, shares: Tensor) -> dict[str, float]:
    """The metrics of a step, none where there are no experts; shares: those of all ranks, ``[num_ranks, number of shares]``."""
    if routing is None:
        return {}
    sums = dict(zip(_SHARES, shares.sum(0).tolist(), strict=True))
    return {**sums, "fullest_expert": routing.fullest, "idle_experts": routing.idle}
