"""What an exchange has to move and to fold: the sizes of a layer's pairs, and how segments hang together.

The letters of this package: P ranks, n segments per rank, R = B · H rows, |U| = R · K · V numbers of a state, |A| numbers of a
transition that is sent (0 where every rank knows it), m ranks per node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from longspan.errors import InputError
from longspan.layout import SequenceLayout
from longspan.plan.wire import WireFormat
from longspan.state import Dense, Transition


@dataclass(frozen=True)
class Problem:
    """The exchange of one layer.

    num_ranks, segments_per_rank: P and n; n is 1 (contiguous) or 2 (zigzag).
    num_rows, key_size, value_size: R, K, V.
    transition: the form of A.
    number_bytes: of a number of states and transitions in memory, 4 or 8. state_bytes: of a number of a state on the wire.
    wire: how a head of a state travels, where a codec makes bytes of it; None is `state_bytes` a number.
    longest_chain: the largest number of messages of which each needs the one before it, when every rank sends the state that
        leaves its segment to the owner of the next; None is a single document. Documents that start inside make it shorter.

    Raises:
        InputError: for sizes that are not positive.
    """

    num_ranks: int
    num_rows: int
    key_size: int
    value_size: int
    transition: type[Transition]
    segments_per_rank: int = 1
    number_bytes: int = 4
    state_bytes: int = 4
    longest_chain: int | None = None
    wire: WireFormat | None = None

    def __post_init__(self) -> None:
        for name in ("num_ranks", "num_rows", "key_size", "value_size", "segments_per_rank"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")

    @classmethod
    def of_states(
        cls,
        transition: type[Transition],
        shape: Sequence[int],
        layout: SequenceLayout,
        number_bytes: int = 4,
        state_bytes: int | None = None,
    ) -> Problem:
        """The exchange of states of `shape` ``[n, B, H, K, V]`` over the ranks of a layout.

        state_bytes: of a number of a state on the wire; None is `number_bytes`.
        """
        _, batch_size, num_heads, key_size, value_size = shape
        return cls(
            num_ranks=layout.num_ranks,
            num_rows=batch_size * num_heads,
            key_size=key_size,
            value_size=value_size,
            transition=transition,
            segments_per_rank=layout.num_segments,
            number_bytes=number_bytes,
            state_bytes=number_bytes if state_bytes is None else state_bytes,
            longest_chain=layout.cached("longest_chain", lambda: longest_chain(layout)),
        )

    @property
    def num_segments(self) -> int:
        """P · n."""
        return self.num_ranks * self.segments_per_rank

    @property
    def chain(self) -> int:
        """Messages of the longest chain. A rank's own next segment, where zigzag turns, needs none."""
        if self.longest_chain is not None:
            return self.longest_chain
        return self.num_segments - self.segments_per_rank

    @property
    def row_state(self) -> int:
        """Bytes of one row of a state on the wire."""
        return self.row_bytes(self.value_size)

    def row_bytes(self, columns: int) -> int:
        """Bytes of so many value columns of one row of a state on the wire."""
        numbers = self.key_size * columns
        return numbers * self.state_bytes if self.wire is None else self.wire.row_bytes(numbers)

    def coding_size(self, num_rows: float, times: float = 1.0, messages: float = 1.0) -> tuple[float, float]:
        """What it takes to encode and decode `num_rows` rows of a state so many times, in so many messages.

        (folds that are as small as can be, bytes of states that folds would go through meanwhile).
        """
        if self.wire is None:
            return 0.0, 0.0
        numbers = times * num_rows * self.key_size * self.value_size
        return self.wire.starts * messages, self.wire.passes * numbers * self.number_bytes

    @property
    def row_transition(self) -> int:
        """Bytes of one row of a transition on the wire; 0 where it is not sent."""
        if self.transition.is_known:
            return 0
        return prod(self.transition.parameter_shape((1, 1, 1, self.key_size, self.value_size))) * self.number_bytes

    @property
    def state(self) -> int:
        """Bytes of a state on the wire."""
        return self.num_rows * self.row_state

    @property
    def pair(self) -> int:
        """Bytes of a pair (A, U) on the wire."""
        return self.num_rows * (self.row_state + self.row_transition)

    def fold_size(self, num_rows: float) -> tuple[float, float]:
        """(bytes of states, operations of matrix products) of A · S + U for `num_rows` rows."""
        numbers = self.key_size * self.value_size
        flops = 2.0 * self.key_size * numbers if issubclass(self.transition, Dense) else 0.0
        return num_rows * numbers * self.number_bytes, num_rows * flops

    def compose_size(self, num_rows: float) -> tuple[float, float]:
        """`fold_size` of composing two pairs: the states', and for Dense transitions the product A₂A₁ beside it."""
        num_bytes, flops = self.fold_size(num_rows)
        if issubclass(self.transition, Dense):
            num_bytes += num_rows * self.key_size**2 * self.number_bytes
            flops += num_rows * 2.0 * self.key_size**3
        return num_bytes, flops


def longest_chain(layout: SequenceLayout) -> int:
    """The largest number of messages of which each needs the one before it; see `Problem`.

    A segment in which a document starts sends what it wrote itself, whatever arrives; where the next segment begins with a new
    document nothing is sent; between two segments of one rank nothing is sent either, but the chain goes on.
    """
    starts = set(layout.document_bounds[:-1])
    longest = current = 0
    for earlier, later in zip(layout.all_segments, layout.all_segments[1:], strict=False):
        if earlier.starts_document or later.start in starts:
            current = 0
        if later.start not in starts and earlier.rank != later.rank:
            current += 1
        longest = max(longest, current)
    return longest
