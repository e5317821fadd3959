"""One state before and after all tokens, where an operator has one for each document: layouts that `continue` a sequence.

Shapes: D documents; states ``[B, ...]``, B is 1 where there are documents.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from longspan.layout import SequenceLayout


def states_of_documents(initial_state: Tensor | None, layout: SequenceLayout | None) -> Tensor | None:
    """The initial state as that of the first of the layout's documents, ``[D, ...]``, the others' zeros.

    As it is where every document has one of its own, or there are no documents; None where the first begins with the first token.
    """
    if initial_state is None or layout is None or layout.continues is None:
        return initial_state
    if layout.continues == 0:
        return None
    if not layout.is_packed:
        return initial_state
    return F.pad(initial_state, (0, 0) * (initial_state.dim() - 1) + (0, layout.num_documents - 1))


def state_of_last(final_states: Tensor, layout: SequenceLayout | None) -> Tensor:
    """The last document's of final states ``[D, ...]``, as ``[1, ...]``; all of them where every document has one of its own."""
    one_of_many = layout is not None and layout.is_packed and not layout.has_document_states
    return final_states[-1:] if one_of_many else final_states
