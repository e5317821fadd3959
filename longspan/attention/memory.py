"""What all memories share: they belong to the step that wrote them."""

from __future__ import annotations

from typing import NoReturn, SupportsIndex

from longspan.errors import InputError


class StepMemory:
    """What `write` returns: part of one step's graph, and perhaps of an exchange that is on its way.

    A copy would read what only the original's backward gives back to other ranks, so there is none.
    """

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise InputError(
            f"a {type(self).__name__} belongs to the step and the ranks that wrote it, and can be neither copied nor pickled. "
            "Hand it on as it is, and read it several times; keep a final state (output_final_state=True), or write again"
        )
