"""What a softmax layer computes and sends, as far as its cost goes."""

from __future__ import annotations

from dataclasses import dataclass

from longspan.layout import SequenceLayout
from longspan.layout.visibility import Visibility
from longspan.plan import Cluster


@dataclass(frozen=True)
class Shapes:
    """Sizes of a layer: B batch rows, H query heads, H_kv key and value heads, D channels per head of queries and keys, bytes per
    number, and D_v channels per head of values; None is D."""

    num_rows: int
    num_heads: int
    num_key_heads: int
    head_dim: int
    element_size: int
    value_dim: int | None = None

    @property
    def _both_dims(self) -> int:
        return self.head_dim + (self.head_dim if self.value_dim is None else self.value_dim)

    def pair_seconds(self, cluster: Cluster) -> float:
        """Seconds for one operation per channel of one pair of a query and a key; forward takes 4 of them, backward 10.

        Kernels take one size of head: where D and D_v differ, it is the larger one (`longspan.ops.softmax.block`).
        """
        return self.num_rows * self.num_heads * max(self.head_dim, self.value_dim or 0) / cluster.attention_rate

    @property
    def key_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return self.num_rows * self.num_key_heads * self._both_dims * self.element_size

    @property
    def query_bytes(self) -> int:
        """Bytes of one token's queries and outputs."""
        return self.num_rows * self.num_heads * self._both_dims * self.element_size


def pairs_of_ranks(layout: SequenceLayout, visibility: Visibility) -> list[int]:
    """How many pairs of a query of the rank and a key see each other, by rank."""
    ranks = range(layout.num_ranks)
    return [sum(visibility.num_pairs(run) for run in layout.segments_of(rank)) for rank in ranks]
