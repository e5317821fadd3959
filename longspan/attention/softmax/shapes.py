"""What a softmax layer computes and sends, as far as its cost goes."""

from __future__ import annotations

from dataclasses import dataclass

from longspan.layout import SequenceLayout
from longspan.layout.visibility import Visibility
from longspan.plan import Cluster


@dataclass(frozen=True)
class Shapes:
    """Sizes of a layer: B batch rows, H query heads, H_kv key and value heads, D channels per head, bytes per number."""

    num_rows: int
    num_heads: int
    num_key_heads: int
    head_dim: int
    element_size: int

    def pair_seconds(self, cluster: Cluster) -> float:
        """Seconds for one operation per channel of one pair of a query and a key; forward takes 4 of them, backward 10."""
        return self.num_rows * self.num_heads * self.head_dim / cluster.attention_rate

    @property
    def key_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return 2 * self.num_rows * self.num_key_heads * self.head_dim * self.element_size

    @property
    def query_bytes(self) -> int:
        """Bytes of one token's queries and outputs."""
        return 2 * self.num_rows * self.num_heads * self.head_dim * self.element_size


def pairs_of_ranks(layout: SequenceLayout, visibility: Visibility) -> list[int]:
    """How many pairs of a query of the rank and a key see each other, by rank."""
    ranks = range(layout.num_ranks)
    return [sum(visibility.num_pairs(run) for run in layout.segments_of(rank)) for rank in ranks]
