"""Models of Transformers in segments of time: through the stand-ins and hooks that `longspan.parallelize` has given them."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from longspan.dtypes import at_least_float32
from longspan.errors import InputError
from longspan.integrations.transformers import inputs, losses
from longspan.integrations.transformers.segment import Segment, SegmentMemory
from longspan.layout import SequenceLayout
from longspan.ops.chunked.cross_entropy import IGNORED
from longspan.ops.chunked.scores import TokenScores
from longspan.streaming.pretrained_checks import callable_part, check_before_sequence, checked_state
from longspan.streaming.streamed import CutSequence, Stream


class PretrainedStream(Stream):
    """A model of Transformers that is given sequences in segments of time: see `longspan.stream`.

    What it returns, and scales gradients by, is what the model's own call does over ranks (docs/transformers.md): with `num_valid`
    this rank's share; without it, for a model that was parallelized with ``loss="mean"``, its share times the number of ranks.
    Without gradients, the whole loss.
    """

    _streamed: StreamedPretrained

    def _begin(
        self,
        tokens: Tensor,
        labels: Tensor,
        layout: SequenceLayout | None,
        num_valid: int | None,
        routing: Any = None,
        is_share: bool = True,
    ) -> CutSequence:
        layout = self._streamed.begin(tokens, layout, routing, is_share)
        return super()._begin(tokens, labels, layout, num_valid)

    def _combined(self, share: Tensor, layout: SequenceLayout | None, is_counted: bool) -> Tensor:
        assert layout is not None
        return losses.combined(share, layout, self._streamed.state.loss, is_counted)


class StreamedPretrained:
    """A parallelized model of Transformers as the engine takes it.

    It is called as it was given, so that what PEFT and FSDP2 have put around it takes part.

    Raises:
        InputError: for what `pretrained_checks` refuses.
    """

    def __init__(self, model: nn.Module) -> None:
        self.called = callable_part(model)
        self.state = checked_state(self.called)
        self._whole: SequenceLayout | None = None
        self._factor = 1

    def begin(
        self, tokens: object, layout: SequenceLayout | None, routing: object, is_share: bool
    ) -> SequenceLayout | None:
        """Note a sequence that begins: its layout, which is returned, and what its loss is multiplied by.

        None for tokens that are refused afterwards.
        """
        if routing is not None:
            raise InputError(
                f"stream(): routing is for longspan.models.LinearLlama3; the routers of {type(self.state.head).__name__} are its "
                "own, whose balance loss config.output_router_logits asks for. Leave it out"
            )
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or 0 in tokens.shape:
            return None
        check_before_sequence(self.state, tokens)
        given = {"input_ids": tokens}
        self.state.compare_over_ranks(given)
        self._whole = self.state.layout_of(given, None) if layout is None else layout
        self._factor = self.state.place.num_ranks if self.state.loss == "mean" and not is_share else 1
        return self._whole

    def sequence(self, num_valid: int, routing: Any, offload: bool) -> StreamedPretrainedSequence:
        assert self._whole is not None
        return StreamedPretrainedSequence(self, self._whole, num_valid, self._factor, offload)


class StreamedPretrainedSequence:
    """A sequence on its way through a model of Transformers; where it has a balance loss, choices of experts are counted first."""

    def __init__(
        self, streamed: StreamedPretrained, whole: SequenceLayout, num_valid: int, factor: int, offload: bool
    ) -> None:
        self._state, self._called = streamed.state, streamed.called
        self._whole, self._num_valid, self._factor, self._offload = whole, num_valid, factor, offload
        bounds = whole.document_bounds
        self._longest = max(stop - start for start, stop in pairwise(bounds))
        head: Any = self._state.head
        self.counts_first = bool(getattr(head.config, "output_router_logits", False))
        self._balance = losses.BalanceInSegments() if self.counts_first else None
        self._takes = frozenset(inspect.signature(type(self._state.backbone).forward).parameters)
        self._of_head = frozenset(inspect.signature(type(head).forward).parameters)
        self._layout = whole

    def start(self) -> SegmentMemory:
        return SegmentMemory(offload=self._offload)

    def remember(self, tokens: Tensor, layout: SequenceLayout | None, memory: SegmentMemory) -> SegmentMemory:
        assert layout is not None
        self._layout = layout
        given = {"logits_to_keep": 1} if "logits_to_keep" in self._of_head else {}
        return self._run(tokens, layout, memory, True, given)[1]

    def all_remembered(self) -> None:
        if self._balance is not None:
            self._balance.all_counted(self._layout)

    def loss(
        self, tokens: Tensor, labels: Tensor, layout: SequenceLayout | None, memory: SegmentMemory, keeps: bool
    ) -> tuple[Tensor, SegmentMemory | None]:
        assert layout is not None
        own = labels.contiguous()
        # Where no label counts the sum is zero, whatever divides it.
        given = {"labels": own, "shift_labels": own, "num_items_in_batch": max(self._num_valid, 1)}
        output, left = self._run(tokens, layout, memory, keeps, given)
        share = output.loss
        return (share if self._factor == 1 else share * self._factor), left if keeps else None

    def scores(
        self, tokens: Tensor, labels: Tensor, layout: SequenceLayout | None, memory: SegmentMemory, keeps: bool
    ) -> tuple[TokenScores, SegmentMemory | None]:
        assert layout is not None
        output, left = self._run(tokens, layout, memory, keeps, {})
        logits = at_least_float32(output.logits)
        nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        is_likeliest = (logits.argmax(-1) == labels) & (labels != IGNORED)
        return TokenScores(nats.view(labels.shape), is_likeliest), left if keeps else None

    def end(self) -> None:
        """Nothing of a sequence stays in the model."""

    def _run(
        self, tokens: Tensor, layout: SequenceLayout, memory: SegmentMemory, keeps: bool, given: dict[str, Any]
    ) -> tuple[Any, SegmentMemory]:
        """The model's output for a segment, and what it leaves."""
        segment = Segment(memory, self._state.numbers, keeps, self._whole.seq_len, self._longest, self._balance)
        if "position_ids" in self._takes:
            given["position_ids"] = layout.document_positions_on(tokens.device)[None]
        given |= {"return_dict": True, inputs.LAYOUT: layout, inputs.SEGMENT: segment}
        return self._called(input_ids=tokens, **given), segment.take()
