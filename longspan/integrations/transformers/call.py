"""What travels through a model's forward: one keyword argument, `ParallelCall`.

It is an argument, and no state of the process, so that gradient checkpointing of both kinds gives a recomputation the layout of
its own forward, also where another forward has run in between.
"""

from __future__ import annotations

from contextvars import ContextVar
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import nn

from longspan.integrations.transformers.segment import EMPTY, Segment, Slot
from longspan.layout import SequenceLayout
from longspan.models.mixers import ParallelOptions

if TYPE_CHECKING:
    from longspan.integrations.transformers.cache import Recorder

CALL = "longspan_call"
"""The keyword under which a call travels from a backbone to its mixers."""


class ParallelCall:
    """One forward of a parallelized model: whose tokens these are, and which mixers have taken that.

    layout: of this rank's tokens. options: how layers exchange. split_already: whether the caller split the sequences. mixer: the
    one that runs now, or None. taken: names of functions that mixers called with the layout, by the mixer. recorder: takes what
    layers remember of a prompt, or None where nothing is decoded afterwards. segment: the segment of time that this is; None for
    whole sequences. num_positions: the largest position of the whole sequence, and one more, where the caller has given positions
    and a layer looks at it.

    No dataclass: FSDP2 with a dtype to compute in hands on copies of those among a layer's arguments.
    """

    def __init__(
        self,
        layout: SequenceLayout,
        options: ParallelOptions,
        split_already: bool = False,
        recorder: Recorder | None = None,
        segment: Segment | None = None,
    ) -> None:
        self.layout, self.options, self.split_already = layout, options, split_already
        self.recorder, self.segment = recorder, segment
        self.num_positions: int | None = None
        self.mixer: nn.Module | None = None
        self.taken: dict[int, set[str]] = {}

    def take(self, function: str, mixer: nn.Module | None = None) -> None:
        """Note that a mixer, the one that runs if not said, has called `function` with the layout."""
        mixer = self.mixer if mixer is None else mixer
        if mixer is not None:
            self.taken.setdefault(id(mixer), set()).add(function)

    def slot(self, function: str) -> Slot:
        """The state that `function` of the mixer that runs now begins with, and that takes the one that it ends with."""
        return EMPTY if self.segment is None else self.segment.slot(function)

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document, of the whole sequence, by the positions that are given."""
        if self.num_positions is not None:
            return self.num_positions
        if self.segment is not None:
            return self.segment.longest
        return max(stop - start for start, stop in pairwise(self.layout.document_bounds))


RUNNING: ContextVar[ParallelCall | None] = ContextVar("longspan_running_call", default=None)
"""The call of the mixer that runs now, where its model does not hand keywords on to the functions; None outside of such mixers."""


def running_call(module: object) -> ParallelCall:
    """The call of the mixer that runs now, for what stands in for a part of it."""
    call = RUNNING.get()
    if call is None:
        raise RuntimeError(f"{type(module).__name__} of a parallelized model runs outside of its mixer's forward")
    return call
