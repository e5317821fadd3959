"""Next-token labels of a whole sequence: what `SequenceLayout.shard_labels` splits.

Shapes: B batch rows, N tokens of the sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longspan.checks import check_tensor, described, is_int
from longspan.errors import InputError, LayoutError

if TYPE_CHECKING:
    from longspan.layout.sequence_layout import SequenceLayout


def shifted_labels(layout: SequenceLayout, tokens: Any, ignore_index: Any) -> Tensor:
    """The token after each of ``[B, N]`` or ``[B, N + 1]``, int64 ``[B, N]``; `ignore_index` where a document or the sequence ends.

    Raises:
        LayoutError, InputError: as `SequenceLayout.shard_labels`.
    """
    check_tensor("shard_labels()", "tokens", tokens)
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise InputError(
            f"shard_labels() takes integer tokens, whose numbers are the labels; got {described(tokens)}. Pass token ids, "
            "tokens.long()"
        )
    if not is_int(ignore_index):
        raise InputError(
            f"ignore_index must be an int, as of torch.nn.functional.cross_entropy; got {described(ignore_index)}. "
            "Leave it out for -100"
        )
    if tokens.dim() != 2 or tokens.shape[1] not in (layout.seq_len, layout.seq_len + 1):
        raise LayoutError(
            f"shard_labels() takes global tokens [B, {layout.seq_len}] or [B, {layout.seq_len + 1}], because labels must be "
            f"shifted before the split; got shape {tuple(tokens.shape)}"
        )
    labels = torch.full((tokens.shape[0], layout.seq_len), ignore_index, dtype=torch.int64, device=tokens.device)
    num_known = tokens.shape[1] - 1
    labels[:, :num_known] = tokens[:, 1:]
    if layout.documents is not None:
        labels[:, layout.document_ends_on(tokens.device)] = ignore_index
    return labels
