"""The loss of whole sequences from each rank's tokens, so that training loops need no change.

The sum of all ranks' shares is the loss. What a model returns depends on who combines the gradients:

    num_items_in_batch given     the share, as Transformers' Trainer counts and scales it
    loss="mean"                  the share times the number of ranks, for whoever averages gradients (DDP, FSDP2)
    loss="sum"                   the share, for `longspan.sum_gradients`

Without gradients nothing is combined afterwards: every rank is given the whole loss; with num_items_in_batch, which Trainer
multiplies by the number of ranks and averages, an equal part of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.errors import InputError
from longspan.exchange.all_reduce import sum_over_ranks
from longspan.layout import SequenceLayout

LossKind = Literal["mean", "sum"]
LOSSES: tuple[LossKind, ...] = ("mean", "sum")
IGNORED = -100
"""Label of a token that is not counted, in all of Transformers."""

BALANCE_LOSS = "load_balancing_loss_func"
"""Name in modeling files of the auxiliary loss of mixtures of experts."""

Z_LOSS = "z_loss_coefficient"
"""The attribute of a head that adds a loss of the size of logits, a mean over tokens."""

FUSED_HEAD = "fused_lm_head"
"""The keyword by which TRL asks a head for log-probabilities of labels, from which it computes the loss itself."""


@dataclass(frozen=True)
class LossCall:
    """The call of the head that runs now: its layout, and whether the balance loss is a rank's share or the whole.

    in_segments: where the call is a segment of time, what finds its share of the balance loss.

    TRL's loss is this rank's share times the number of ranks, and then the balance loss is added: that one must be whole.
    """

    layout: SequenceLayout
    balance_is_share: bool = True
    in_segments: BalanceInSegments | None = None


LOSS_CALL: ContextVar[LossCall | None] = ContextVar("longspan_loss_call", default=None)
"""None outside of parallelized models' heads."""


def shifted_labels(labels: Tensor, layout: SequenceLayout) -> Tensor:
    """The label of each token's successor: ``[B, N]`` of whole sequences, shifted before any split; none across documents."""
    shifted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].contiguous()
    if layout.documents is not None:
        shifted[:, layout.document_ends_on(labels.device)] = IGNORED
    return shifted


def check_z_loss(head: Any, given: Mapping[str, Any]) -> None:
    """Refuse padding beside a loss of all logits: Transformers' own, of padded tokens, depend on what it does with them."""
    mask = given.get("attention_mask")
    if not getattr(head, Z_LOSS, None) or not isinstance(mask, Tensor) or bool(mask.all()):
        return
    raise InputError(
        f"attention_mask has padding, and config.{Z_LOSS} of {type(head).__name__} asks for a loss of the logits of all tokens, "
        "padded ones too, which are others over ranks. Pack documents into one row without padding (position_ids that restart), "
        f"or set {Z_LOSS} to 0"
    )


def combined(share: Tensor, layout: SequenceLayout, kind: LossKind, counted_by_trainer: bool) -> Tensor:
    """What a model returns for this rank's share of the loss; see the table above."""
    if layout.num_ranks == 1:
        return share
    if not torch.is_grad_enabled():
        whole = sum_over_ranks(share.detach(), layout)
        return whole / layout.num_ranks if counted_by_trainer else whole
    return share * layout.num_ranks if kind == "mean" and not counted_by_trainer else share


def balance_loss(original: Callable[..., Any]) -> Callable[..., Any]:
    """The auxiliary loss over all ranks' tokens that are no padding; each rank's share is 1/P of it."""

    @functools.wraps(original)
    def dispatch(
        gate_logits: Any, num_experts: int | None = None, top_k: int = 2, attention_mask: Tensor | None = None
    ) -> Any:
        call = LOSS_CALL.get()
        if call is not None and call.in_segments is not None and isinstance(gate_logits, tuple) and num_experts:
            return call.in_segments.share(gate_logits, num_experts, top_k)
        if call is None or call.layout.num_ranks == 1 or not isinstance(gate_logits, tuple) or num_experts is None:
            return original(gate_logits, num_experts, top_k, attention_mask)
        whole = _balance(gate_logits, num_experts, top_k, _local_mask(attention_mask, call.layout), call.layout)
        return whole / call.layout.num_ranks if call.balance_is_share else whole

    return dispatch


def _local_mask(mask: Tensor | None, layout: SequenceLayout) -> Tensor | None:
    """1 for each of this rank's tokens that is no padding, ``[B · T]``; None where there is none."""
    if mask is None:
        return None
    return layout.shard(mask.reshape(1, -1) if layout.is_packed else mask).flatten()


def _balance(
    gate_logits: tuple[Tensor, ...], num_experts: int, top_k: int, mask: Tensor | None, layout: SequenceLayout
) -> Tensor:
    """Experts · Σ_e (share of choices of e) · (mean probability of e), over all layers' tokens of all ranks.

    gate_logits: ``[B · T, num_experts]`` of each layer. mask: ``[B · T]``, of the tokens that count.
    """
    summed = sum_over_ranks(_counted(gate_logits, num_experts, top_k, mask), layout)
    chosen, probabilities, rows = summed.split([num_experts, num_experts, 1])
    rows = rows.detach()
    return (chosen.detach() / rows * (probabilities / rows)).sum() * num_experts


def _counted(gate_logits: tuple[Tensor, ...], num_experts: int, top_k: int, mask: Tensor | None) -> Tensor:
    """Of this rank's tokens: how many chose each expert, the sum of each expert's probability, and how many tokens there are."""
    dtype, device = torch.promote_types(gate_logits[0].dtype, torch.float32), gate_logits[0].device
    chosen = torch.zeros(num_experts, dtype=dtype, device=device)
    probabilities = torch.zeros(num_experts, dtype=dtype, device=device)
    rows = torch.zeros(1, dtype=dtype, device=device)
    for logits in gate_logits:
        counts = torch.ones(len(logits), dtype=dtype, device=device) if mask is None else mask.to(device, dtype)
        weights = torch.softmax(logits.to(device=device, dtype=dtype), dim=-1)
        experts = torch.topk(weights, top_k, dim=-1).indices
        chosen = chosen.scatter_add(0, experts.flatten(), counts[:, None].expand_as(experts).flatten())
        probabilities = probabilities + counts @ weights
        rows = rows + counts.sum()
    return torch.cat([chosen, probabilities, rows])


class BalanceInSegments:
    """The balance loss of a sequence in segments of time: choices are counted in all of them first.

    With the shares of choices f_e and the number of tokens of the whole sequence, a segment's share of the loss is
    experts · Σ_e f_e · (sum of e's probabilities in the segment) / tokens.
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None
        self._is_counted = False

    def share(self, gate_logits: tuple[Tensor, ...], num_experts: int, top_k: int) -> Tensor:
        """This rank's share in the segment that runs now; while choices are counted, zero."""
        counts = _counted(gate_logits, num_experts, top_k, None)
        if not self._is_counted:
            detached = counts.detach()
            self._counts = detached if self._counts is None else self._counts + detached
            return counts.new_zeros(())
        assert self._counts is not None
        chosen, _, rows = self._counts.split([num_experts, num_experts, 1])
        probabilities = counts[num_experts:-1]
        return (chosen / rows * (probabilities / rows)).sum() * num_experts

    def all_counted(self, layout: SequenceLayout) -> None:
        """Every segment has been seen once: sum over the ranks of a segment's layout."""
        if self._counts is not None:
            self._counts = sum_over_ranks(self._counts, layout)
        self._is_counted = True
