"""LASP-2's own order of a call, or one pass: what is computed while states travel, and what a second pass over the outputs costs.

A call that writes and reads at once has nothing else to compute while its states travel. *Fused*, it waits for them and then reads
in one pass. *Overlapped* (LASP-2, arXiv 2502.07563), it computes what tokens read inside their chunks meanwhile, and adds what they
read of states in a second pass. So it hides the exchange behind the first pass, in both directions, and pays for the second.

Letters: T tokens of a rank, C a chunk, R = B · H rows, K and V sizes of keys and values.

    the pass inside chunks    2 · R · T · C · (K + V) operations, and 5/2 times as many backward: five products for two
    the second pass           q read again, what was found inside read and written again: R · T · (K + 2 · V) numbers;
                              backward q, ∂o and ∂q again: R · T · (2 · K + V); and the launches of its operators

On a CPU (process time of one thread, H8 D64, 64 to 8,192 tokens, forward and backward) the second pass took between 0.1 and 2.5
times what the formula says with the figures of `stated_cluster`: least where decays are of heads, most where they are of key
channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from longspan.plan.cluster import Cluster
from longspan.plan.cost import Cost

BACKWARD_PRODUCTS = 2.5
"""Products of the backward pass inside a chunk, for each of the forward one."""

MARGIN = 2.0
"""The formula of a second pass may be wrong by about so much, and a call that hides nothing should not pay for it."""


@dataclass(frozen=True)
class Reading:
    """What one rank reads in a call.

    num_tokens, chunk_size, num_rows, key_size, value_size: T, C, R, K, V. number_bytes: of a number, in the dtype of sums.
    num_launches: operators that the second pass calls in either direction, each of which takes as long as the smallest fold.
    """

    num_tokens: int
    chunk_size: int
    num_rows: int
    key_size: int
    value_size: int
    number_bytes: int
    num_launches: int = 0

    def seconds_inside(self, cluster: Cluster, backward: bool) -> float:
        """The pass inside chunks, which needs no state."""
        flops = 2.0 * self.num_rows * self.num_tokens * self.chunk_size * (self.key_size + self.value_size)
        return flops * (BACKWARD_PRODUCTS if backward else 1.0) / cluster.matmul_rate

    def seconds_of_second_pass(self, cluster: Cluster, backward: bool) -> float:
        """What the overlapped order moves more than the fused one."""
        sizes = 2 * self.key_size + self.value_size if backward else self.key_size + 2 * self.value_size
        num_bytes = self.num_rows * self.num_tokens * sizes * self.number_bytes
        return self.num_launches * cluster.fold_latency + num_bytes / cluster.fold_bandwidth


def overlap_pays(cost: Cost, cluster: Cluster, reading: Reading, with_backward: bool) -> bool:
    """Whether a call is faster in the overlapped order by the model: it hides `MARGIN` times what its second passes take.

    with_backward: count its backward pass, too.
    """
    hidden = passes = 0.0
    for direction, backward in ((cost.forward, False), (cost.backward, True))[: 1 + with_backward]:
        hidden += direction.exposed(0.0) - direction.exposed(reading.seconds_inside(cluster, backward))
        passes += reading.seconds_of_second_pass(cluster, backward)
    return hidden > MARGIN * passes
