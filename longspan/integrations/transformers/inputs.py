"""What a model is called with, turned into this rank's part of it.

Shapes: B rows, N tokens of a whole sequence, T tokens of this rank. Packed rows are taken one after another, ``[B, N]`` as
``[1, B · N]`` whose documents end where a row ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longspan.checks import described
from longspan.comm.collectives import all_gather_single
from longspan.errors import InputError, LayoutError
from longspan.integrations.transformers.losses import IGNORED, shifted_labels
from longspan.layout import SequenceLayout
from longspan.models.mixers import SequenceParallel

LAYOUT = "longspan_layout"
"""The keyword of a call whose sequences are split already: its layout. `shard_batch` makes such a call."""
SEGMENT = "longspan_segment"
"""The keyword of such a call that is a segment of time."""

BOUNDS = ("cu_seq_lens_q", "cu_seqlens")
"""What Transformers' collators, and flash-linear-attention's models, call the bounds of documents."""
PACKING = (*BOUNDS, "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""How documents are described to kernels; the layout says it instead."""

_SPLIT = ("input_ids", "inputs_embeds", "position_ids", "labels", "shift_labels")
OF_TOKENS = frozenset({*_SPLIT, "attention_mask", "seq_idx"})
"""Arguments with an entry for each token."""
STREAMED = frozenset({"input_ids", "labels", "position_ids", "attention_mask", "num_items_in_batch", *PACKING})
"""What `stream_batch` takes."""
_UNDERSTOOD = frozenset({*_SPLIT, *PACKING, "attention_mask", "num_items_in_batch", "past_key_values", "cache_params"})


def tokens_of(given: Mapping[str, Any]) -> Tensor:
    """The tokens of a call: ids ``[B, N]``, or their embeddings ``[B, N, C]``."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    tokens = embeds if ids is None else ids
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        raise InputError(
            f"a parallelized model takes input_ids [B, N] or inputs_embeds [B, N, C]; got {described(tokens)}. Pass whole "
            "sequences, the same on every rank of the group"
        )
    return tokens


def check_arguments(given: Mapping[str, Any]) -> None:
    """Refuse what would be silently wrong over ranks.

    Raises:
        InputError: for an attention mask that is not of right padding, some of the logits, or an argument per token that is not
            known.
    """
    tokens = tokens_of(given)
    _check_mask(given.get("attention_mask"))
    kept = given.get("logits_to_keep", 0)
    if not isinstance(kept, int) or kept != 0:
        raise InputError(
            f"logits_to_keep={described(kept)}: the last tokens of a sequence are on one rank. Leave it out, and take them "
            "from the logits of the rank that holds them (layout_of(model).positions)"
        )
    for name, value in given.items():
        if isinstance(value, Tensor) and name not in _UNDERSTOOD and value.shape[:2] == tokens.shape[:2]:
            raise InputError(
                f"{name}, of shape {tuple(value.shape)}, has one entry for each token, and longspan does not know how to split it. "
                "Leave it out; tokens of one kind, in one causal sequence, are supported"
            )


def compare_over_ranks(given: Mapping[str, Any], place: SequenceParallel) -> None:
    """The same batch on every rank of the group, or an error on all of them.

    Raises:
        InputError: where ranks were given others.
    """
    if place.num_ranks == 1:
        return
    tokens = tokens_of(given).detach()
    # Of embeddings the first channel alone: all of them would be copied as float64.
    values = (tokens if tokens.dim() == 2 else tokens[..., 0]).to(torch.float64).flatten()
    weights = torch.arange(1, values.numel() + 1, device=values.device, dtype=torch.float64)
    own = torch.stack([values.new_tensor(s) for s in tokens.shape[:2]] + [values.sum(), (values * weights).sum()])
    all_ranks = own.new_empty(place.num_ranks * own.numel())
    all_gather_single(all_ranks, own, place.group)
    seen = all_ranks.view(place.num_ranks, -1)
    if bool((seen != seen[0]).any()):
        shapes = [tuple(int(size) for size in row[:2]) for row in seen.tolist()]
        raise InputError(
            "the ranks of a sequence-parallel group were called with different batches: their shapes are "
            f"{', '.join(map(str, shapes))}, and sums of their ids differ. Every rank of a group takes the same whole "
            "sequences; give a DistributedSampler the rank and number of the data-parallel dimension alone"
        )


def check_outputs(attentions: object) -> None:
    """Refuse what is never formed over ranks.

    attentions: whether attention weights are asked for, by the call or by the config.

    Raises:
        InputError: where they are.
    """
    if attentions:
        raise InputError(
            "output_attentions=True: attention weights of all tokens to all tokens are never formed over ranks. Leave it out, "
            "or call longspan.unparallelize(model) and take a short sequence"
        )


def _check_mask(mask: object) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise InputError(
            f"attention_mask must be of right padding, [B, N] of ones and then zeros; got {described(mask)}. Masks of pairs of "
            "tokens are not supported over ranks: pack documents (position_ids that restart) or pad on the right"
        )
    lengths = mask.to(torch.int64).sum(1, keepdim=True)
    right = torch.arange(mask.shape[1], device=mask.device) < lengths
    if not bool((mask.to(torch.bool) == right).all()):
        raise InputError(
            "attention_mask masks tokens on the left or inside of a row: the state of a recurrent layer would run over them. "
            "Pad on the right (padding_side='right'), or pack documents without padding"
        )


def document_bounds(given: Mapping[str, Any]) -> list[int] | None:
    """Where packed documents start and the last ends, in rows taken one after another; None for plain rows.

    By ``cu_seq_lens_q`` (``cu_seqlens``), ``seq_idx``, or position ids that do not go on, as Transformers' collators make them.
    Tokens that ``attention_mask`` calls padding belong to the document before them.

    Raises:
        InputError: for document bounds that do not end with the tokens.
    """
    rows, length = tokens_of(given).shape[:2]
    name = next((name for name in BOUNDS if given.get(name) is not None), None)
    if name is not None:
        bounds = given[name]
        values = bounds.flatten().tolist() if isinstance(bounds, Tensor) else [int(bound) for bound in bounds]
        if rows != 1 or values[0] != 0 or values[-1] != length:
            raise InputError(
                f"{name} must be of one row and go from 0 to its {length} tokens; got {rows} rows and bounds from "
                f"{values[0]} to {values[-1]}. Flatten the batch into one row, as DataCollatorWithFlattening does"
            )
        values = [value for value, before in zip(values, [-1, *values], strict=False) if value != before]
        return values if len(values) > 2 else None
    starts = _document_starts(given, rows, length)
    if starts is None or not bool(starts[:, 1:].any()):
        return None
    return [*starts.flatten().nonzero().flatten().tolist(), rows * length]


def _document_starts(given: Mapping[str, Any], rows: int, length: int) -> Tensor | None:
    """Whether a document starts at a token, bool ``[B, N]``; None where nothing says so."""
    numbers, positions = given.get("seq_idx"), given.get("position_ids")
    if numbers is not None:
        starts = numbers[:, 1:] != numbers[:, :-1]
    elif positions is not None:
        # Multimodal rotary embeddings have a row for each axis; the first is of the text.
        of_text = positions[0] if positions.dim() == 3 else positions
        starts = of_text[:, 1:] != of_text[:, :-1] + 1
    else:
        return None
    starts = starts.expand(rows, -1)
    mask = given.get("attention_mask")
    if mask is not None:
        starts = starts & mask[:, 1:].to(torch.bool)
    return torch.cat([starts.new_ones(rows, 1), starts], dim=1)


def check_first_labels(given: Mapping[str, Any], layout: SequenceLayout, rows: int) -> None:
    """Refuse labels of documents' first tokens where another has counted the labels: no token of the document predicts them.

    Raises:
        InputError: where one counts.
    """
    labels = given.get("labels")
    if labels is None or given.get("shift_labels") is not None or layout.documents is None or LAYOUT in given:
        return
    starts = [start for start in layout.documents[1:-1] if start % (layout.seq_len // rows)]
    if bool((labels[:, starts] != IGNORED).any()):
        raise InputError(
            "labels of the first tokens of packed documents count in num_items_in_batch, but no token predicts them: the loss "
            "would be too small. Set them to -100, as DataCollatorWithFlattening does"
        )


def flattened(x: Tensor, rows: int, length: int, dim: int = 0) -> Tensor:
    """Rows one after another: ``[B, N, ...]`` as ``[1, B · N, ...]``, B in dimension `dim`."""
    whole = x.expand(*x.shape[:dim], rows, *x.shape[dim + 1 :])
    return whole.reshape(*x.shape[:dim], 1, rows * length, *x.shape[dim + 2 :])


def in_one_row(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a packed batch with its rows one after another."""
    rows, length = tokens_of(given).shape[:2]
    if rows == 1:
        return given
    flat = {
        name: flattened(given[name], rows, length, dim=1 if name == "position_ids" and given[name].dim() == 3 else 0)
        for name in _SPLIT
        if given.get(name) is not None
    }
    return {**given, **flat}


def local_arguments(given: dict[str, Any], layout: SequenceLayout, takes: frozenset[str]) -> dict[str, Any]:
    """A backbone's arguments of whole sequences, as those of this rank's tokens.

    takes: names of the backbone's parameters. Positions are given where it takes them, masks and caches taken away.
    """
    local = dict(given)
    for name in ("input_ids", "inputs_embeds"):
        if local.get(name) is not None:
            local[name] = layout.shard(local[name])
    positions = local.get("position_ids")
    if positions is not None:
        local["position_ids"] = layout.shard(positions, dim=-1)
    return without_masks(with_positions(local, layout, takes), takes)


def with_positions(given: dict[str, Any], layout: SequenceLayout, takes: frozenset[str]) -> dict[str, Any]:
    """The arguments of this rank's tokens with their positions, where a backbone takes them and nobody has given any."""
    if given.get("position_ids") is not None or "position_ids" not in takes:
        return given
    return {**given, "position_ids": layout.document_positions_on(tokens_of(given).device)[None]}


def without_masks(given: dict[str, Any], takes: frozenset[str]) -> dict[str, Any]:
    """A backbone's arguments without what a layout replaces; no cache unless one is given."""
    rest = {name: value for name, value in given.items() if name != "attention_mask" and name not in PACKING}
    if "use_cache" in takes and rest.get("past_key_values") is None and rest.get("cache_params") is None:
        rest["use_cache"] = False
    return rest


def shard_batch(batch: Mapping[str, Any], layout: SequenceLayout) -> dict[str, Any]:
    """This rank's part of a batch, for a caller who splits sequences itself: ``model(**shard_batch(batch, layout))``.

    Args:
        batch: whole sequences: ``input_ids`` or ``inputs_embeds``, and any of ``labels`` (not shifted), ``position_ids``,
            ``attention_mask`` (of right padding), and arguments that are the same for all tokens.
        layout: which tokens are whose; of the group that the model was parallelized for, with the batch's documents.

    Returns:
        The arguments of a call: tokens, positions and shifted labels of this rank, and the layout itself.

    Raises:
        InputError: for what `parallelize` refuses in a call.
        LayoutError: for a batch of another length than the layout's.
    """
    given = dict(batch)
    check_arguments(given)
    rows, length = tokens_of(given).shape[:2]
    if layout.is_packed and rows * length == layout.seq_len:
        given = in_one_row(given)
    sharded = local_arguments(given, layout, frozenset({"position_ids"}))
    labels = sharded.pop("labels", None)
    if labels is not None:
        shifted = shifted_labels(labels, layout)
        sharded["labels"] = sharded["shift_labels"] = layout.shard(shifted).contiguous()
    return {**sharded, LAYOUT: layout}


def check_positions(given: Mapping[str, Any], layout: SequenceLayout) -> None:
    """Refuse positions other than those that segments of time are given: of each token in its document.

    Raises:
        InputError: for others, such as those of a sequence that goes on with another.
    """
    positions = given.get("position_ids")
    if positions is None:
        return
    own = SequenceLayout.local(layout.seq_len, layout.documents).document_positions_on(positions.device)
    if not bool((positions == own).all()):
        raise InputError(
            "position_ids do not count from 0 in each document, as segments of time do. Leave them out, or let them restart at 0 "
            "where a document starts"
        )


def check_given_layout(layout: object, given: Mapping[str, Any]) -> None:
    """Raise unless a call's layout is one, and its tokens are this rank's tokens of it."""
    if not isinstance(layout, SequenceLayout):
        raise InputError(f"{LAYOUT} must be a SequenceLayout; got {described(layout)}. Build one, or leave it out")
    layout.check_local_length(tokens_of(given).shape[1], "a call with its own layout")
    if given.get("labels") is not None and given.get("shift_labels") is None:
        raise LayoutError(
            f"labels of sequences that are split must have been shifted before the split: got labels and {LAYOUT}, but no "
            "shift_labels. Make the arguments with longspan.integrations.transformers.shard_batch"
        )
