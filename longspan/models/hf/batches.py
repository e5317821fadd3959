"""A batch as Transformers gives it, padded or packed, as one call of a model that knows no padding; and its results, put back.

Padding is taken away, and not masked: what is left of the rows goes one after another, as packed documents. So no state runs over
it, on whichever side it is, and no expert is chosen by it.

Shapes: B rows, N tokens of a row, padding included; T tokens of a call on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.checks import described
from longspan.errors import InputError
from longspan.layout import Order, SequenceLayout
from longspan.models.mixers import SequenceParallel

IGNORED = -100
"""Label of a token that is not counted."""


@dataclass(frozen=True)
class Arranged:
    """How a batch is given to the model.

    layout: of the call; None is whole rows. shape: (B, N). index: int64, which tokens of the batch, its rows one after another, are
    in the one row of the call; None where the batch is given as it is. longest: tokens of the longest row or document.
    """

    layout: SequenceLayout | None
    shape: tuple[int, int]
    index: Tensor | None
    longest: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the call, on all ranks that share it."""
        return self.shape[0] * self.shape[1] if self.index is None else len(self.index)

    def call(self, x: Tensor) -> Tensor:
        """Of one value for each token ``[B, N]`` those of the call, ``[B, T]`` or ``[1, T]``."""
        if self.index is not None:
            x = x.flatten()[self.index][None]
        return x if self.layout is None or self.layout.num_ranks == 1 else self.layout.shard(x).contiguous()

    def targets(self, labels: Tensor, mask: Tensor | None) -> Tensor:
        """The label of each token's successor in its row or document, ``[B, N]``; none for padding.

        labels: ``[B, N]``, not shifted. mask: as in `arrange`.
        """
        moved = shifted(labels)
        if mask is not None:
            moved = moved.masked_fill(~mask, IGNORED)
        if self.index is None or self.layout is None or self.layout.documents is None:
            return moved
        ends = self.index[self.layout.document_ends_on(moved.device)]
        return moved.flatten().index_fill(0, ends, IGNORED).view(self.shape)

    def batch(self, x: Tensor) -> Tensor:
        """What the call found for its tokens, ``[.., T, C]``, as ``[B, N, C]``, 0 for padding; over ranks as it is, this rank's."""
        if self.index is None or (self.layout is not None and self.layout.num_ranks > 1):
            return x
        rows, length = self.shape
        return x.new_zeros(rows * length, x.shape[-1]).index_copy(0, self.index, x[0]).view(rows, length, -1)


def arrange(
    tokens: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    bounds: Tensor | None,
    place: SequenceParallel | None,
    order: Order,
) -> Arranged:
    """How a batch of sequences that nothing came before is given to the model.

    Args:
        tokens: ``[B, N]``, on ranks that share sequences the same.
        mask: bool ``[B, N]``, False for padding; None is no padding.
        positions: integers ``[B, N]`` or ``[1, N]``; a document starts where they do not go on.
        bounds: integers, where packed documents of a single row start and the last ends; None goes by positions.
        place: the ranks that share the sequences; None is this process alone. order: which tokens of them a rank takes.

    Raises:
        InputError: for a batch of padding alone; for positions or bounds of another shape.
    """
    rows, length = tokens.shape

    def layout_of(num_tokens: int, documents: list[int] | None) -> SequenceLayout:
        if place is None or place.num_ranks == 1:
            return SequenceLayout.local(num_tokens, documents)
        return SequenceLayout(num_tokens, place.group, order, documents)

    is_packed = positions is not None or bounds is not None
    starts = _starts(tokens, mask, positions, bounds) if is_packed or mask is not None else None
    if starts is None or (mask is None and not bool(starts[:, 1:].any())):
        return Arranged(None if place is None else layout_of(length, None), (rows, length), None, length)
    real = torch.ones_like(starts) if mask is None else mask
    index = real.flatten().nonzero().flatten()
    if not len(index):
        raise InputError("attention_mask calls all tokens padding. Leave the batch out")
    documents = [*starts.flatten()[index].nonzero().flatten().tolist(), len(index)]
    longest = max(stop - start for start, stop in pairwise(documents))
    layout = layout_of(len(index), documents if len(documents) > 2 else None)
    return Arranged(layout, (rows, length), index, longest)


def check_mask(mask: object, tokens: Tensor, num_before: int = 0) -> Tensor | None:
    """The attention mask of these tokens, bool ``[B, N]``; None where none of them is padding.

    mask: ``[B, num_before + N]``, or ``[B, N]``, 0 for padding.

    Raises:
        InputError: for a mask of another shape, or with padding inside of a row's new tokens.
    """
    if mask is None:
        return None
    rows, length = tokens.shape
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != rows:
        raise InputError(
            f"attention_mask must be [B, N] = {(rows, length)}, 1 for tokens and 0 for padding; got {described(mask)}. Masks of "
            "pairs of tokens are not supported: pack documents (position_ids that restart)"
        )
    if mask.shape[1] not in (length, num_before + length):
        raise InputError(
            f"attention_mask must have a column for each of the {length} tokens"
            + (f", or of all {num_before + length} with those in the cache" if num_before else "")
            + f"; got {mask.shape[1]}. Pass the tokenizer's own"
        )
    real = mask[:, mask.shape[1] - length :].to(torch.bool)
    if bool(real.all()):
        return None
    # A token behind padding, in a row that had tokens before it.
    begins = real & ~F.pad(real, (1, 0))[:, :-1]
    if bool((begins.sum(1) > 1).any()):
        raise InputError(
            "attention_mask has padding between tokens of a row. Pad on one side, or on both, of the tokens"
        )
    return real


def shifted(labels: Tensor) -> Tensor:
    """The label of what follows each token, ``[B, N]``; none for the last one."""
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:].contiguous()


def _starts(tokens: Tensor, mask: Tensor | None, positions: Tensor | None, bounds: Tensor | None) -> Tensor:
    """Whether a document starts at a token, bool ``[B, N]``."""
    rows, length = tokens.shape
    starts = torch.zeros(rows, length, dtype=torch.bool, device=tokens.device)
    if bounds is not None:
        values = bounds.flatten().tolist()
        if rows != 1 or not values or values[0] != 0 or values[-1] != length:
            raise InputError(
                f"bounds of documents (cu_seq_lens_q) must be of one row, from 0 to its {length} tokens; got {rows} rows and "
                f"{values}. Flatten the batch into one row, as DataCollatorWithFlattening does"
            )
        starts[0, sorted({*values[:-1]} - {length})] = True
    elif positions is not None:
        if positions.dim() != 2 or positions.shape[0] not in (1, rows) or positions.shape[1] != length:
            raise InputError(
                f"position_ids must be [B, N] = {(rows, length)}, or [1, {length}]; got {described(positions)}. Leave them out "
                "where rows are no packed documents"
            )
        starts[:, 1:] = (positions[:, 1:] != positions[:, :-1] + 1).expand(rows, -1)
    if mask is None:
        starts[:, 0] = True
        return starts
    first = mask & ~F.pad(mask, (1, 0))[:, :-1]
    return (starts & mask) | first
