"""The next tokens of each row of a batch, after what a cache holds of those before.

Rows that have seen equally many tokens, and have equally many new ones, are one call of the model, without any padding.

Shapes: B rows, N new tokens of a row, padding included, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from longspan.errors import InputError
from longspan.layout import Order, SequenceLayout
from longspan.models.hf.cache import LinearLlamaCache, RowGroup
from longspan.models.linear_llama3 import LinearLlama3


def advance(
    model: LinearLlama3,
    tokens: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    cache: LinearLlamaCache,
    num_logits: int,
) -> Tensor:
    """Logits of the last `num_logits` columns ``[B, num_logits, V]``, 0 for padding; the cache holds the tokens afterwards.

    Args:
        tokens: int64 ``[B, N]``.
        mask: bool ``[B, N]``, False for padding; None is none.
        positions: integers ``[B, N]`` or ``[1, N]``, which must be those that the model counts itself; None does not look.
        cache: changed in place; empty before the first tokens.

    Raises:
        InputError: for a cache of another number of rows, or positions that are not those of the tokens.
    """
    rows, length = tokens.shape
    groups = cache.groups or [RowGroup(tuple(range(rows)))]
    if sum(len(group.rows) for group in groups) != rows:
        raise InputError(
            f"the cache is of {cache.batch_size} rows, and the tokens of {rows}. Pass the rows that it was filled with, or "
            "cache.batch_repeat_interleave"
        )
    found: list[RowGroup] = []
    logits: Tensor | None = None
    for part, count in _parts(groups, mask, length):
        if not count:
            found.append(part)
            continue
        chosen = torch.tensor(part.rows, device=tokens.device)
        # Where the tokens of these rows are.
        columns = torch.arange(length, device=tokens.device).expand(len(chosen), -1)
        if mask is not None:
            columns = columns[mask[chosen]].view(len(chosen), count)
        given = tokens[chosen].gather(1, columns)
        if positions is not None:
            _check_positions(positions.expand(rows, -1)[chosen].gather(1, columns), part)
        kept = min(num_logits, count)
        of_part, memory = model(
            given, _local(model, count), memory=part.memory, logits_to_keep=kept, output_memory=True
        )
        found.append(RowGroup(part.rows, memory))
        if part.rows == tuple(range(rows)) and kept == num_logits and mask is None:
            logits = of_part
            continue
        if logits is None:
            logits = of_part.new_zeros(rows, num_logits, of_part.shape[-1])
        targets = columns[:, count - kept :] - (length - num_logits)
        is_kept = targets >= 0
        logits[chosen[:, None].expand_as(targets)[is_kept], targets[is_kept]] = of_part[is_kept]
    if logits is None:
        raise InputError("attention_mask calls all new tokens padding. Leave them out")
    cache.groups, cache.num_columns = found, cache.num_columns + length
    return logits


def prefill_over_ranks(model: LinearLlama3, tokens: Tensor, cache: LinearLlamaCache, order: Order) -> Tensor:
    """Logits of the last token ``[B, 1, V]`` of a prompt ``[B, N]`` that the ranks share, on every rank; `cache` holds the prompt.

    The ranks read all tokens but the last, which each of them then reads by itself.
    """
    place = model.sequence_parallel
    assert place is not None
    num_tokens = tokens.shape[1] - 1
    memory = None
    if num_tokens:
        # Too few for each rank to have one: every rank takes all of them.
        split = num_tokens >= place.num_ranks
        layout = SequenceLayout(num_tokens, place.group, order) if split else SequenceLayout.local(num_tokens)
        given = layout.shard(tokens[:, :-1])
        _, memory = model(given, layout, memory=None, logits_to_keep=0, output_memory=True)
    logits, memory = model(tokens[:, -1:], SequenceLayout.local(1), memory=memory, logits_to_keep=1, output_memory=True)
    cache.groups = [RowGroup(tuple(range(len(tokens))), memory)]
    cache.num_columns = tokens.shape[1]
    return logits


def _parts(groups: list[RowGroup], mask: Tensor | None, length: int) -> Iterator[tuple[RowGroup, int]]:
    """Rows that have seen equally many tokens, and how many new ones each of them has."""
    counts = None if mask is None else mask.sum(1).tolist()
    for group in groups:
        if counts is None:
            yield group, length
            continue
        places: defaultdict[int, list[int]] = defaultdict(list)
        for place, row in enumerate(group.rows):
            places[counts[row]].append(place)
        for count, chosen in places.items():
            yield group.take(chosen, [group.rows[place] for place in chosen]), count


def _check_positions(positions: Tensor, part: RowGroup) -> None:
    before = 0 if part.memory is None else part.memory.num_tokens
    expected = torch.arange(before, before + positions.shape[1], device=positions.device)
    if not bool((positions == expected).all()):
        raise InputError(
            f"position_ids of a row must go on behind its {before} tokens in the cache; got {positions[0].tolist()[:8]}. Leave "
            "them out: the model counts them; packed documents have no cache together (use_cache=False)"
        )


def _local(model: LinearLlama3, num_tokens: int) -> SequenceLayout | None:
    """The layout of whole rows, for a model that was parallelized or not."""
    return None if model.sequence_parallel is None else SequenceLayout.local(num_tokens)
