"""Where a sequence is cut in segments of time, and which of them go on with a document."""

from __future__ import annotations

from dataclasses import dataclass

from longspan.checks import described, is_int
from longspan.errors import InputError
from longspan.layout import SequenceLayout


@dataclass(frozen=True)
class Segment:
    """Tokens ``[start, stop)`` of a sequence.

    whole: the layout of the sequence over the ranks; None where it has none. goes_on: whether its first token belongs to a document
    that began before.
    """

    start: int
    stop: int
    whole: SequenceLayout | None
    goes_on: bool

    def layout(self) -> SequenceLayout | None:
        """Of these tokens over the ranks. What layers keep in it lasts as long as it is held: hold one segment's at a time."""
        return None if self.whole is None else self.whole.stretch(self.start, self.stop)


def cut_in_time(num_tokens: int, segment_tokens: int, layout: SequenceLayout | None) -> tuple[Segment, ...]:
    """The segments of `num_tokens` tokens, each of `segment_tokens`; the last one has what is left.

    layout: of the whole sequence. A last segment of fewer tokens than ranks is made part of the one before.

    Raises:
        InputError: for segments shorter than the number of ranks.
    """
    num_ranks = 1 if layout is None else layout.num_ranks
    check_segment_tokens(segment_tokens, num_ranks)
    starts = list(range(0, num_tokens, segment_tokens))
    if len(starts) > 1 and num_tokens - starts[-1] < num_ranks:
        starts.pop()
    new_documents = set() if layout is None else set(layout.document_bounds)
    return tuple(
        Segment(start, stop, layout, start > 0 and start not in new_documents)
        for start, stop in zip(starts, [*starts[1:], num_tokens], strict=True)
    )


def check_segment_tokens(segment_tokens: object, num_ranks: int = 1) -> int:
    """`segment_tokens`; raises InputError unless it is a number of tokens of which each of `num_ranks` ranks has one at least."""
    if not is_int(segment_tokens) or segment_tokens < 1:  # type: ignore[operator]
        raise InputError(
            f"stream(): segment_tokens must be an int of at least 1, the tokens whose activations are held at once; got "
            f"{described(segment_tokens)}. A few thousand keep a device busy"
        )
    if segment_tokens < num_ranks:  # type: ignore[operator]
        raise InputError(
            f"stream(): segment_tokens is {segment_tokens}, fewer than the {num_ranks} ranks that share a segment: each needs a "
            f"token of it. The least that works is {num_ranks}"
        )
    return segment_tokens  # type: ignore[return-value]
