"""What users call for models of Transformers: `longspan.parallelize` and its opposite, layouts, and batches in segments of time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from longspan.errors import InputError
from longspan.exchange.auto.order import RankOrderOption, measured_rank_order
from longspan.integrations.transformers import inputs, losses
from longspan.integrations.transformers.model import ParallelModel, state_of
from longspan.integrations.transformers.structure import check_model, head_of
from longspan.integrations.transformers.verify import tokens_to_verify, verify_first_batch
from longspan.layout import ORDERS, Order, SequenceLayout
from longspan.layout.shares import check_rank_order
from longspan.models.mixers import ParallelOptions, SequenceParallel

Model = TypeVar("Model", bound=nn.Module)


def parallelize_pretrained(
    model: Model,
    options: ParallelOptions,
    place: SequenceParallel,
    *,
    order: Order | None,
    rank_order: RankOrderOption | None = None,
    loss: losses.LossKind,
    verify: bool | Mapping[str, Any],
    verify_tokens: int | None,
) -> Model:
    """`longspan.parallelize` of a model of Transformers."""
    head = head_of(model)
    if state_of(model) is not None:
        raise InputError(
            f"{type(head).__name__} is parallelized already. Call longspan.unparallelize(model) before giving it other options"
        )
    if order not in (None, *ORDERS):
        raise InputError(f"order must be one of {', '.join(ORDERS)}; got {order!r}")
    if loss not in losses.LOSSES:
        raise InputError(f"loss must be one of {', '.join(losses.LOSSES)}; got {loss!r}")
    num_tokens = tokens_to_verify(head, place, verify, verify_tokens)
    check_model(head)
    state = ParallelModel(head, options, place, order, loss, _order_of_ranks(rank_order, head, place))
    state.install()
    state.tokens_to_verify = num_tokens
    if isinstance(verify, Mapping):
        try:
            verify_first_batch(state, dict(verify))
        except BaseException:
            state.uninstall()
            raise
    return model


def _order_of_ranks(given: RankOrderOption | None, head: nn.Module, place: SequenceParallel) -> tuple[int, ...] | None:
    """The order in which ranks hold sequences, None as they are numbered; measured now where that is asked for."""
    if given is None or place.num_ranks == 1:
        return None
    if given == "measured":
        device = next(head.parameters()).device
        return measured_rank_order(SequenceLayout(place.num_ranks, place.group), device)
    return check_rank_order(given, place.num_ranks)


def unparallelize_pretrained(model: nn.Module) -> None:
    """`longspan.unparallelize` of a model of Transformers."""
    state = state_of(model)
    if state is None:
        raise InputError(f"{type(head_of(model)).__name__} is not parallelized: there is nothing to undo")
    state.uninstall()


def layout_of(model: nn.Module) -> SequenceLayout:
    """The layout of the last forward of a parallelized model: which tokens its logits are of.

    Raises:
        InputError: for a model that is not parallelized, or was not called yet.
    """
    state = state_of(model)
    if state is None or state.last_layout is None:
        raise InputError(
            f"{type(head_of(model)).__name__} {'was not called yet' if state else 'is not parallelized'}: it has no layout. "
            f"{'Call it' if state else 'Call longspan.parallelize(model, group)'} first"
        )
    return state.last_layout


def stream_batch(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch as a call of the model takes it, as what `longspan.stream` takes: ``streamed.forward_backward(**stream_batch(...))``.

    Args:
        model: given to `longspan.parallelize` before.
        batch: whole sequences, the same on every rank of the group: ``input_ids`` and ``labels`` (not shifted), and any of
            ``position_ids``, ``cu_seq_lens_q`` or ``seq_idx``, which tell packed documents, ``attention_mask`` (of right padding),
            and ``num_items_in_batch``.

    Returns:
        ``tokens``, ``labels`` (shifted, and not across documents), ``layout`` of the whole sequence, and ``num_valid``, None
        without num_items_in_batch. Packed rows are one after another.

    Raises:
        InputError: for a model that is not parallelized, a batch without ids or labels, what a call refuses, positions that do
            not count from 0 in each document, and padding beside a balance loss.
    """
    state = state_of(model)
    if state is None:
        raise InputError(
            f"stream_batch(): {type(head_of(model)).__name__} is not parallelized, so that it has no layout. Call "
            "longspan.parallelize(model, group) first"
        )
    given = {name: value for name, value in batch.items() if value is not None}
    unknown = sorted(given.keys() - inputs.STREAMED)
    missing = sorted({"input_ids", "labels"} - given.keys())
    if unknown or missing:
        wrong = f"got {', '.join(unknown)}, too" if unknown else f"there is no {' and no '.join(missing)}"
        raise InputError(
            f"stream_batch() takes input_ids, labels, and what tells documents; {wrong}. What it knows is "
            f"{', '.join(sorted(inputs.STREAMED))}"
        )
    inputs.check_arguments(given)
    mask = given.get("attention_mask")
    if mask is not None and getattr(state.head.config, "output_router_logits", False) and not bool(mask.all()):
        raise InputError(
            f"stream_batch(): attention_mask has padding, and config.output_router_logits of {type(state.head).__name__} asks for "
            "a balance loss, in which segments of time count every token. Pack documents into one row without padding "
            "(position_ids that restart), or set output_router_logits to False"
        )
    losses.check_z_loss(state.head, given)
    bounds = inputs.document_bounds(given)
    layout = state.layout_of(given, bounds)
    if bounds is not None:
        given = inputs.in_one_row(given)
    inputs.check_positions(given, layout)
    num_valid = given.get("num_items_in_batch")
    return {
        "tokens": given["input_ids"],
        "labels": losses.shifted_labels(given["labels"], layout),
        "layout": layout,
        "num_valid": None if num_valid is None else int(num_valid),
    }
