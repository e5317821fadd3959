"""The self-check of `longspan.parallelize`: loss and gradients of the first batch, beside those of one process.

Sequences are split because one process cannot hold them, so the batch is shortened first. What is left of it goes the way that all
batches go: labels, positions, padding and documents are the caller's.

Shapes: B rows, N tokens of a whole sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.checks import described
from longspan.comm.collectives import all_reduce
from longspan.errors import InputError
from longspan.integrations.transformers import inputs, losses, rotary
from longspan.integrations.transformers.model import ParallelModel
from longspan.integrations.transformers.structure import arguments_by_name, backbone_of
from longspan.models.mixers import SequenceParallel

_log = logging.getLogger("longspan")

VERIFIED_TOKENS = 1024
"""Tokens of the first batch that are compared, if not said."""

TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-2}
"""Largest error of a gradient relative to its own largest entry; Transformers computes norms and gates in float32."""

_TOLERANCE_OF_HALF = 0.25

NOISE = 1e-3
"""A gradient smaller than this part of the largest is compared with that part: rounding may be all that it is."""

_OF_CALLER = ("num_items_in_batch", "use_cache", "return_dict", "past_key_values", "cache_params", losses.FUSED_HEAD)
"""Arguments that the check sets by itself, or leaves out."""

_BALANCE = "output_router_logits"
"""The argument, and the entry of a config, that asks for the balance loss."""


def tokens_to_verify(
    head: nn.Module, place: SequenceParallel, verify: bool | Mapping[str, Any], given: int | None
) -> int | None:
    """How many tokens of the first batch are compared with one process; None where none are."""
    if not isinstance(verify, bool | Mapping):
        raise InputError(
            f"verify must be True, False or the first batch, a mapping of a call's arguments; got {described(verify)}. How many "
            "of its tokens are compared is verify_tokens"
        )
    if given is not None and (type(given) is not int or given < place.num_ranks):
        raise InputError(
            f"verify_tokens must be an integer, {place.num_ranks} at least, a token for each rank; got {described(given)}"
        )
    if verify is False:
        if given is not None:
            raise InputError(
                f"verify_tokens={given} says how much of the first batch is compared. Say verify=True, too"
            )
        return None
    if head is backbone_of(head):
        raise InputError(
            f"verify compares loss and gradients, and {type(head).__name__} has no head that computes them. Parallelize the "
            "causal language model that it is a part of, or leave verify out"
        )
    return VERIFIED_TOKENS if given is None else given


def verify_first_batch(state: ParallelModel, given: dict[str, Any]) -> None:
    """Compare the batch of a call with one process, before the call.

    Raises:
        InputError: where they differ, on every rank; the next batch is compared then.
    """
    if inputs.LAYOUT in given:
        raise InputError(
            "verify=True compares whole sequences with one process, and those of this call are split already. Give the first "
            "batch itself: longspan.parallelize(model, group, verify=batch)"
        )
    num_tokens, state.tokens_to_verify = state.tokens_to_verify, None
    assert num_tokens is not None
    before = state.num_calls.copy()
    try:
        state.check_mode(given)
        state.compare_over_ranks(given)
        with state.decoding.unmodified():
            reference = Reference.of(state.head, state.place, given, num_tokens)
        reference.compare(state)
    except BaseException:
        state.tokens_to_verify = num_tokens
        raise
    # The first batches of the caller are still to be compared over the ranks.
    state.num_calls = before


@dataclass(frozen=True)
class Reference:
    """A batch, shortened, with its loss and gradients as one process computes them with the model as it was.

    batch: the arguments of a call. targets: ``[B, N]``, of logits, where the batch has no label that counts; else None. is_counted:
    whether the caller counts the labels, as Trainer does. is_packed: whether there are several documents; then losses that are no
    sums over tokens (of balance, of logits' size) are left out, which documents one by one do not have.
    """

    place: SequenceParallel
    batch: dict[str, Any]
    targets: Tensor | None
    is_counted: bool
    is_packed: bool
    loss: Tensor
    gradients: dict[str, Tensor]

    @classmethod
    def of(cls, head: nn.Module, place: SequenceParallel, batch: Mapping[str, Any], num_tokens: int) -> Reference:
        """Run the model, which must be as it was, on at most `num_tokens` tokens of `batch`."""
        _check_whole(head)
        device = next(head.parameters()).device
        given = {name: x.detach().to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}
        inputs.check_arguments(given)
        short = shortened(
            {name: x for name, x in given.items() if name not in _OF_CALLER and x is not None}, num_tokens
        )
        targets = None if _num_valid(short) else _targets(short, head)
        if targets is not None:
            short = {name: x for name, x in short.items() if name not in ("labels", "shift_labels")}
        bounds = inputs.document_bounds(short)
        is_packed = bounds is not None
        if is_packed and (short.get(_BALANCE) or getattr(head.config, _BALANCE, False)):
            short[_BALANCE] = False
        with _evaluated(head), _without_z_loss(head, is_packed):
            loss, gradients = _gradients(head, _loss_alone(head, short, targets, bounds))
        is_counted = batch.get("num_items_in_batch") is not None
        return cls(place, short, targets, is_counted, is_packed, loss, gradients)

    def compare(self, state: ParallelModel) -> None:
        """Run the parallelized model on the same batch, and raise where it differs.

        Raises:
            InputError: naming what differs most, on every rank.
        """
        head, num_ranks = state.head, self.place.num_ranks
        with _evaluated(head), _without_z_loss(head, self.is_packed):
            share, scale = self._share(state)
            own_loss, gradients = _gradients(head, share)
        loss = self._summed(own_loss / scale)
        worst, error = "the loss", _relative(loss, self.loss, 0.0)
        largest = max((float(expected.abs().max()) for expected in self.gradients.values()), default=0.0)
        for name, expected in self.gradients.items():
            of_this = _relative(self._summed(gradients.pop(name) / scale), expected, NOISE * largest)
            if not of_this <= error:
                worst, error = f"the gradient of {name}", of_this
        tolerance = TOLERANCES.get(self.loss.dtype, _TOLERANCE_OF_HALF)
        if next(head.parameters()).dtype not in TOLERANCES or torch.is_autocast_enabled(self.loss.device.type):
            tolerance = _TOLERANCE_OF_HALF
        # What is cast under autocast is kept for the calls that follow.
        torch.clear_autocast_cache()
        rows, length = inputs.tokens_of(self.batch).shape[:2]
        of_rows = f"{rows} rows of " if rows > 1 else ""
        _log.info(
            "the first batch of %s over %d ranks, %s%d tokens, differs from one process by %.1e at most, in %s (allowed: %.0e)",
            type(head).__name__,
            num_ranks,
            of_rows,
            length,
            error,
            worst,
            tolerance,
        )
        if not error <= tolerance:
            raise InputError(
                f"{type(head).__name__} over {num_ranks} ranks differs from one process: {worst} by {error:.1e} of its size, "
                f"more than {tolerance:.0e}, for {of_rows}{length} tokens of the first batch. Do not train it so; see "
                "docs/transformers.md for what is supported"
            )

    def _share(self, state: ParallelModel) -> tuple[Tensor, int]:
        """What this rank returns of the loss, and how often all ranks together have it then."""
        model: Any = state.head
        if self.targets is None:
            counted = {"num_items_in_batch": _num_valid(self.batch)} if self.is_counted else {}
            share = model(**self.batch, **counted, return_dict=True).loss
            return share, self.place.num_ranks if state.loss == "mean" and not self.is_counted else 1
        logits = model(**self.batch, return_dict=True).logits
        layout = state.last_layout
        assert layout is not None
        targets = self.targets.reshape(1, -1) if layout.is_packed else self.targets
        return _sum_of_logits(logits, layout.shard(targets)) / (self.targets != losses.IGNORED).sum(), 1

    def _summed(self, x: Tensor) -> Tensor:
        return all_reduce(x, self.place.group, "backward") if self.place.num_ranks > 1 else x


def shortened(batch: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """At most so many tokens of a batch: whole rows, or a part of one row, those with the most labels that count, else the first.

    Documents end where they did; the first may begin inside of one.
    """
    rows, length = inputs.tokens_of(batch).shape[:2]
    if rows * length <= num_tokens:
        return batch
    width = min(length, num_tokens)
    labels = next((batch[name] for name in ("labels", "shift_labels") if batch.get(name) is not None), None)
    counts = inputs.tokens_of(batch).new_zeros((rows, length), dtype=torch.int64)
    if labels is not None:
        counts = (labels != losses.IGNORED).to(torch.int64)
    in_windows = F.pad(counts.cumsum(1), (1, 0)).unfold(1, width + 1, 1)
    in_windows = in_windows[..., -1] - in_windows[..., 0]
    chosen = in_windows.amax(1).sort(descending=True, stable=True).indices[: num_tokens // width].sort().values
    start = int(in_windows[chosen[0]].argmax()) if width < length else 0
    return {name: _part(name, x, rows, chosen, start, start + width) for name, x in batch.items()}


def _part(name: str, x: Any, num_rows: int, rows: Tensor, start: int, stop: int) -> Any:
    """An argument for some rows of `num_rows`, and for their tokens from `start` to `stop`."""
    if name in inputs.BOUNDS:
        bounds = torch.as_tensor(x).clamp(start, stop) - start
        return bounds.unique_consecutive()
    if not isinstance(x, Tensor) or name not in inputs.OF_TOKENS:
        return x
    row, column = (x.dim() - 2, x.dim() - 1) if name != "inputs_embeds" else (0, 1)
    if x.shape[row] == num_rows:
        x = x.index_select(row, rows.to(x.device))
    return x.narrow(column, start, stop - start)


def _loss_alone(head: nn.Module, batch: dict[str, Any], targets: Tensor | None, bounds: list[int] | None) -> Tensor:
    """The loss in one process. Packed documents are run one by one: Transformers' own packed forward mixes some."""
    model: Any = head
    options = {"use_cache": False, "return_dict": True}
    batch = {name: x for name, x in batch.items() if name not in inputs.PACKING}
    if bounds is None:
        if targets is None:
            loss: Tensor = model(**batch, **options).loss
            return loss
        return _sum_of_logits(model(**batch, **options).logits, targets) / (targets != losses.IGNORED).sum()
    flat = inputs.in_one_row(batch)
    mask, positions = flat.get("attention_mask"), flat.get("position_ids")
    if mask is not None:
        flat["attention_mask"] = mask.reshape(1, -1)
    longest = max(stop - start for start, stop in pairwise(bounds)) if positions is None else int(positions.max()) + 1
    total = _num_valid(batch, bounds) if targets is None else int((targets != losses.IGNORED).sum())
    parts, first = [], torch.zeros(1, dtype=torch.int64)
    with _longest(head, longest):
        for start, stop in pairwise(bounds):
            part = {name: _part(name, x, 1, first, start, stop) for name, x in flat.items()}
            if targets is not None:
                parts.append(
                    _sum_of_logits(model(**part, **options).logits, targets.reshape(1, -1)[:, start:stop]) / total
                )
            elif num_valid := _num_valid(part):
                parts.append(model(**part, **options).loss * (num_valid / total))
    return torch.stack(parts).sum()


def _num_valid(batch: Mapping[str, Any], bounds: list[int] | None = None) -> int:
    """How many labels are predicted: none across documents, where their bounds are given."""
    if batch.get("shift_labels") is not None:
        return int((batch["shift_labels"] != losses.IGNORED).sum())
    labels = batch.get("labels")
    if labels is None:
        return 0
    if bounds is None:
        bounds = inputs.document_bounds(batch)
    counted = labels != losses.IGNORED
    if bounds is None:
        return int(counted[:, 1:].sum())
    counted = counted.reshape(-1).clone()
    counted[bounds[:-1]] = False
    return int(counted.sum())


def _targets(batch: Mapping[str, Any], head: nn.Module) -> Tensor:
    """What logits are compared for where nobody says it, ``[B, N]``: the tokens that follow; any, where they are embeddings."""
    ids = batch.get("input_ids")
    if ids is None:
        config: Any = head.config
        rows, length = inputs.tokens_of(batch).shape[:2]
        ids = torch.arange(rows * length, device=inputs.tokens_of(batch).device).view(rows, length)
        ids = ids % config.get_text_config().vocab_size
    bounds = inputs.document_bounds(batch)
    shifted = F.pad(ids[:, 1:], (0, 1), value=losses.IGNORED)
    if bounds is not None:
        shifted = shifted.reshape(-1)
        shifted[[stop - 1 for stop in bounds[1:]]] = losses.IGNORED
        shifted = shifted.view(ids.shape)
    mask = batch.get("attention_mask")
    return shifted if mask is None else shifted.masked_fill(mask == 0, losses.IGNORED)


def _sum_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    return F.cross_entropy(wide, targets.flatten(), ignore_index=losses.IGNORED, reduction="sum")


def _gradients(head: nn.Module, loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss, and its gradients by parameter, which are not accumulated anywhere."""
    trained = {name: parameter for name, parameter in head.named_parameters() if parameter.requires_grad}
    found: tuple[Tensor | None, ...] = ()
    if trained:
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(parameter) if gradient is None else gradient.detach()
        for (name, parameter), gradient in zip(trained.items(), found, strict=True)
    }
    return loss.detach(), gradients


@contextmanager
def _evaluated(head: nn.Module) -> Iterator[None]:
    """Gradients, and no dropout."""
    training = [module for module in head.modules() if module.training]
    head.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _without_z_loss(head: nn.Module, is_packed: bool) -> Iterator[None]:
    coefficient = getattr(head, losses.Z_LOSS, None)
    if not is_packed or not coefficient:
        yield
        return
    setattr(head, losses.Z_LOSS, 0.0)
    try:
        yield
    finally:
        setattr(head, losses.Z_LOSS, coefficient)


@contextmanager
def _longest(head: nn.Module, num_positions: int) -> Iterator[None]:
    """Rotary embeddings that look at the largest position find that of the longest document in each of them."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = arguments_by_name(module, args, kwargs)
        given["position_ids"] = rotary.with_last_position(given["position_ids"], num_positions)
        return (), given

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        return rotary.without_last_position(output)

    handles = []
    for module in head.modules():
        if rotary.looks_at_largest_position(module):
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_whole(head: nn.Module) -> None:
    """Refuse a model of whose weights a rank has a part: no process can be compared with."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    if any(isinstance(x, FSDPModule) for x in head.modules()) or any(isinstance(x, DTensor) for x in head.parameters()):
        raise InputError(
            f"verify=True compares the first call of {type(head).__name__} with one process, and its weights are divided among "
            "the ranks by now. Give the first batch itself while they are whole, before fully_shard: "
            "longspan.parallelize(model, group, verify=batch)"
        )


def _relative(got: Tensor, expected: Tensor, floor: float) -> float:
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    size = max(float(expected.abs().max()), floor, torch.finfo(expected.dtype).tiny)
    return float((got - expected).abs().max()) / size
