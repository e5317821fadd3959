"""Whether ranks that must hold the same weights do.

Ranks along ``"replicate"`` of the mesh hold the same weights, or the same share of them, bit for bit: they start equal, and step by
the same sums of gradients. What makes them differ is a fault: of memory, of a kernel, of code that changes weights on one rank
alone.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from longspan.errors import LongspanError
from longspan.parallel.sharded import on_this_rank
from longspan.train.ranks import Ranks

# As many bytes of a digest as float64 holds exactly.
_DIGEST_BYTES = 6
_MOST_LISTED = 3


class ReplicaError(LongspanError):
    """Ranks that must hold the same weights hold others."""


def check_replicas(model: nn.Module, ranks: Ranks, step: int) -> None:
    """Compare the bytes of all weights over the ranks that must have the same, by SHA-256; every rank calls this.

    Raises:
        ReplicaError: on every rank, if they differ; the message names the weights and the ranks.
    """
    if ranks.degrees.size("replicate") == 1:
        return
    names = [name for name, _ in model.named_parameters()]
    digests = ranks.gather_numbers([_digest(on_this_rank(parameter)) for parameter in model.parameters()])
    odd = [
        f"{name}: ranks {parts}"
        for column, name in enumerate(names)
        for group in ranks.degrees.groups("replicate")
        if (parts := _parts(digests[:, column], group))
    ]
    if odd:
        more = f"\n  and {len(odd) - _MOST_LISTED} more" if len(odd) > _MOST_LISTED else ""
        raise ReplicaError(
            f"after step {step} ranks that must hold the same weights do not:\n  "
            + "\n  ".join(odd[:_MOST_LISTED])
            + f"{more}\nThe memory or a kernel of one of them has failed, or code has changed weights on one rank alone. Look at "
            "the machine of the rank that stands apart, and go on from the newest checkpoint with --resume: one is written only "
            "after this check, where both are due"
        )


@torch.no_grad()
def _digest(weights: Tensor) -> float:
    content = weights.detach().contiguous().cpu().flatten().view(torch.uint8)
    return float(int.from_bytes(hashlib.sha256(content.numpy().tobytes()).digest()[:_DIGEST_BYTES]))


def _parts(digests: Tensor, group: tuple[int, ...]) -> str:
    """The ranks of a group by what they hold, such as ``"0+1+3 | 2"``; nothing if they hold the same."""
    holders: dict[float, list[int]] = {}
    for rank in group:
        holders.setdefault(float(digests[rank]), []).append(rank)
    if len(holders) == 1:
        return ""
    return " | ".join("+".join(map(str, found)) for found in sorted(holders.values(), key=len, reverse=True))
