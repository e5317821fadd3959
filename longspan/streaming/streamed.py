"""`longspan.stream`: the loss of a sequence of any length, and its gradients, with the activations of one segment of time.

Shapes: B batch rows, N tokens of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longspan.checks import check_count, check_flag, check_tensor, described, is_int
from longspan.errors import InputError, LayoutError
from longspan.exchange import Exchanger, exchange_named
from longspan.layout import SequenceLayout
from longspan.models.mixers import SequenceMixer
from longspan.models.segments import Between, SegmentDone
from longspan.ops.chunked.cross_entropy import IGNORED
from longspan.ops.chunked.scores import TokenScores
from longspan.parallel.sharded import accumulating
from longspan.streaming import llama  # noqa: F401  registers its adapter
from longspan.streaming.adapters import StreamedSequence, adapted, is_others_pretrained
from longspan.streaming.engine import forward_backward
from longspan.streaming.gradients import summed_in_float32
from longspan.streaming.segments import Segment, check_segment_tokens, cut_in_time


def stream(
    model: nn.Module, segment_tokens: int, *, keep_every: int = 1, offload: bool = False, reduce_each: bool = False
) -> Stream:
    """Let `model` be trained on sequences of any length in segments of time; the model itself is not changed.

    The gradients are those of the whole sequence in one piece, not truncated: what a segment leaves to the next (memory states,
    last taps of convolutions, keys and values) goes forward, and its gradient back. The price is one more forward pass.

    Args:
        model: a `longspan.models.LinearLlama3`, a model of Transformers that was given to `longspan.parallelize` (docs/stream.md),
            or one whose class has an adapter (`longspan.streaming.register_stream`). It may be parallelized (each segment is then
            split over the ranks), have divided weights, recompute its layers, compute in bfloat16.
        segment_tokens: tokens of a segment, of all ranks together; any number that gives each rank one at least. The activations
            of so many are held at once.
        keep_every: keep what enters every n-th segment between the passes, and compute the others once more from there. The states
            of linear layers then take ``ceil(S / n) + n`` times those of one segment, S the number of segments, instead of S times;
            keys and values are kept once in any case. 1 keeps all of them, and computes nothing twice.
        offload: keep keys and values of earlier segments, and their gradients, in host memory, and copy them to the device for each
            use, one segment's ahead. Where the model is on the CPU that is where they are, and copies are made all the same.
        reduce_each: where weights are divided (`longspan.parallel.shard_weights`, FSDP2), sum gradients over the ranks in the
            backward of each segment, so that a rank holds its share of them and those of one block; else they are summed once, in
            the last one's, and whole on every rank until then. Weights that are not divided are left to `sum_gradients` anyway.

    Raises:
        InputError: for a model that no adapter knows, a layer that reads later tokens, an exchange with error feedback, or numbers
            that do not fit.
    """
    if is_others_pretrained(model):
        from longspan.streaming.pretrained import PretrainedStream

        return PretrainedStream(model, segment_tokens, keep_every, offload, reduce_each)
    return Stream(model, segment_tokens, keep_every, offload, reduce_each)


def check_exchange(exchange: str | Exchanger) -> None:
    """Raise InputError for an exchange that remembers what it has left out."""
    if exchange_named(exchange).remembers_errors:
        raise InputError(
            "stream(): the exchange has error feedback, and a segment of time is computed twice: the second pass would send what "
            "the first has left out, and find another state. Take a codec without feedback, or sequences in one piece"
        )


def _check_exchanges(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, SequenceMixer):
            check_exchange(module.parallel.exchange)


class Stream:
    """A model that is given sequences in segments of time: see `stream`."""

    def __init__(
        self,
        model: nn.Module,
        segment_tokens: int,
        keep_every: int = 1,
        offload: bool = False,
        reduce_each: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"stream() takes a torch.nn.Module; got {described(model)}. Pass the model itself")
        self.segment_tokens = check_segment_tokens(segment_tokens)
        check_count("stream()", "keep_every", keep_every, "the distance of the segments whose memory is kept")
        self._keep_every = keep_every
        self._offload = check_flag("stream()", "offload", offload)
        self._reduce_each = check_flag("stream()", "reduce_each", reduce_each)
        self._model = model
        self._streamed = adapted(model)
        _check_exchanges(model)

    def forward_backward(
        self,
        tokens: Tensor,
        labels: Tensor,
        layout: SequenceLayout | None = None,
        *,
        num_valid: int | None = None,
        routing: Any = None,
        is_last: bool = True,
        between: Between | None = None,
    ) -> Tensor:
        """Add the gradients of the sequence's loss to the ``grad`` of the parameters.

        Args:
            tokens: int64 ``[B, N]``, the whole sequence, the same on every rank.
            labels: the token after each, int64 ``[B, N]``, shifted already; -100 where there is none.
            layout: of the whole sequence: its ranks, their order, its documents. Each segment is split over the ranks like a
                sequence of its own. None as in the model.
            num_valid: what the sum of the losses is divided by, the valid tokens of all ranks and micro batches; None is the number
                of those in `labels`.
            routing: of a model with experts, as it takes one; its losses are those of the whole sequence.
            is_last: whether this is the last micro batch of a step: where weights are divided (`longspan.parallel.shard_weights`)
                gradients are summed over the ranks then, unless each segment's are.
            between: called after each pass over a segment with what is done; an error that it raises ends the sequence there.

        Returns:
            This rank's share of the loss, a scalar without a graph. By the one gradient convention gradients are then summed over
            the ranks (`longspan.sum_gradients`).

        Raises:
            InputError: for tokens or labels that do not fit, a model that does not do the same in both passes, or ranks that were
                told to cut the sequence differently.
            LayoutError: for a layout of another length, or of another group than the model's.

        Both passes over a segment draw the same random numbers. Every rank must make the same calls.
        """
        check_flag("stream()", "is_last", is_last)
        # Whether there are gradients decides what a loss is made of, such as that of routers: also for a caller without them.
        with torch.enable_grad():
            sequence = self._begin(tokens, labels, layout, num_valid, routing, is_share=num_valid is not None)
        try:
            with summed_in_float32(self._model, divided=self._reduce_each):
                return forward_backward(
                    sequence,
                    tokens.device,
                    keep_every=self._keep_every,
                    around_backward=partial(_summing, self._model, self._reduce_each, is_last),
                    between=between or _nothing,
                )
        finally:
            sequence.end()

    @torch.no_grad()
    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        layout: SequenceLayout | None = None,
        *,
        num_valid: int | None = None,
        between: Between | None = None,
    ) -> Tensor:
        """This rank's share of the loss, without gradients: arguments and errors as of `forward_backward`.

        All passes that `between` hears of are ``"forward"``.
        """
        sequence, between = self._begin(tokens, labels, layout, num_valid), between or _nothing
        sequence.count_first(between)
        total, memory = torch.zeros((), dtype=torch.float64, device=tokens.device), sequence.start()
        for segment in range(sequence.num_segments):
            goes_on = sequence.is_gone_on_with(segment)
            share, left = sequence.loss(segment, memory, goes_on)
            memory = left if goes_on else sequence.start()
            total += share.double()
            between(SegmentDone("forward", segment, sequence.num_segments))
        return self._combined(total.to(share.dtype), sequence.layout, num_valid is not None)

    @torch.no_grad()
    def scores(self, tokens: Tensor, labels: Tensor, layout: SequenceLayout | None = None) -> Iterator[TokenScores]:
        """Of each segment in order, for this rank's tokens: the loss of each by itself, and whether its label is the likeliest."""
        sequence = self._begin(tokens, labels, layout, None)
        memory = sequence.start()
        for segment in range(sequence.num_segments):
            goes_on = sequence.is_gone_on_with(segment)
            found, left = sequence.scores(segment, memory, goes_on)
            memory = left if goes_on else sequence.start()
            yield found

    def _begin(
        self,
        tokens: Tensor,
        labels: Tensor,
        layout: SequenceLayout | None,
        num_valid: int | None,
        routing: Any = None,
        is_share: bool = True,
    ) -> CutSequence:
        """The sequence, cut in segments. is_share: its loss is a rank's share in any case; else what the model's call returns."""
        # At each call, as a model may be parallelized, or with another exchange, after it was given to `stream`; and there, too, as
        # the first call may be far from where the exchange was named.
        _check_exchanges(self._model)
        _check_sequence(tokens, labels, layout, num_valid)
        if layout is not None:
            self._check_agreement(layout)
        if num_valid is None:
            num_valid = int((labels != IGNORED).sum())
        segments = cut_in_time(tokens.shape[1], self.segment_tokens, layout)
        streamed = self._streamed.sequence(num_valid, routing, self._offload)
        return CutSequence(streamed, tokens, labels, layout, segments)

    def _check_agreement(self, layout: SequenceLayout) -> None:
        """The ranks cut alike, or an error on all of them; asked each time, as a rank that remembered would not answer."""
        if layout.num_ranks == 1 or layout.group is None:
            return
        own = {"segment_tokens": self.segment_tokens, "keep_every": self._keep_every, "reduce_each": self._reduce_each}
        everyone: list[Any] = [None] * layout.num_ranks
        dist.all_gather_object(everyone, own, group=layout.group)
        different = [name for name in own if any(other[name] != own[name] for other in everyone)]
        if different:
            values = (f"{name} {', '.join(str(other[name]) for other in everyone)}" for name in different)
            raise InputError(
                f"stream(): the ranks that share a sequence must cut it alike; in the order of their numbers they have "
                f"{'; '.join(values)}. Give all of them the same"
            )

    def _combined(self, share: Tensor, layout: SequenceLayout | None, is_counted: bool) -> Tensor:
        """What `loss` returns for this rank's share. is_counted: whether the caller has counted the valid tokens."""
        return share


class CutSequence:
    """A sequence as the engine takes it: of each segment, this rank's tokens. layout: of the whole sequence."""

    def __init__(
        self,
        streamed: StreamedSequence,
        tokens: Tensor,
        labels: Tensor,
        layout: SequenceLayout | None,
        segments: tuple[Segment, ...],
    ) -> None:
        self._streamed, self._tokens, self._labels, self._segments = streamed, tokens, labels, segments
        self.layout = layout
        self.num_segments = len(segments)
        self._layout: SequenceLayout | None = None

    @property
    def counts_first(self) -> bool:
        return self._streamed.counts_first

    def goes_on(self, segment: int) -> bool:
        return self._segments[segment].goes_on

    def is_gone_on_with(self, segment: int) -> bool:
        """Whether the next segment begins with what this one leaves."""
        return segment + 1 < self.num_segments and self.goes_on(segment + 1)

    def count_first(self, between: Between) -> None:
        """Remember every segment once, where that is to be done before any loss."""
        if not self.counts_first:
            return
        memory = self.start()
        for segment in range(self.num_segments):
            left = self.remember(segment, memory)
            memory = left if self.is_gone_on_with(segment) else self.start()
            between(SegmentDone("forward", segment, self.num_segments))
        self.all_remembered()

    def start(self) -> Any:
        return self._streamed.start()

    def remember(self, segment: int, memory: Any) -> Any:
        (tokens,) = self._own(segment, self._tokens)
        return self._streamed.remember(tokens, self._layout, memory)

    def all_remembered(self) -> None:
        self._streamed.all_remembered()

    def loss(self, segment: int, memory: Any, keeps: bool) -> tuple[Tensor, Any]:
        tokens, labels = self._own(segment, self._tokens, self._labels)
        return self._streamed.loss(tokens, labels, self._layout, memory, keeps)

    def scores(self, segment: int, memory: Any, keeps: bool) -> tuple[TokenScores, Any]:
        tokens, labels = self._own(segment, self._tokens, self._labels)
        return self._streamed.scores(tokens, labels, self._layout, memory, keeps)

    def end(self) -> None:
        self._streamed.end()

    def _own(self, segment: int, *given: Tensor) -> Iterator[Tensor]:
        """Of each, this rank's part of a segment, whose layout is held from here on in the place of another's."""
        part = self._segments[segment]
        layout = self._layout = part.layout()
        wholes = (x[:, part.start : part.stop] for x in given)
        return wholes if layout is None else map(layout.shard, wholes)


def _summing(model: nn.Module, each: bool, is_last: bool, is_last_segment: bool) -> AbstractContextManager[None]:
    return accumulating(model, each or (is_last and is_last_segment))


def _nothing(done: SegmentDone) -> None:
    """Between segments nobody wants to know."""


def _check_sequence(tokens: Tensor, labels: Tensor, layout: SequenceLayout | None, num_valid: int | None) -> None:
    for name, x in (("tokens", tokens), ("labels", labels)):
        check_tensor("stream()", name, x)
        if x.dim() != 2 or x.dtype != torch.int64 or 0 in x.shape:
            raise InputError(
                f"stream(): {name} must be int64 [B, N], whole sequences of at least a token; got {x.dtype} of shape "
                f"{tuple(x.shape)}. Pass token ids, rows.long()"
            )
    if labels.shape != tokens.shape:
        raise InputError(
            f"stream(): labels must be the token after each of tokens, {tuple(tokens.shape)}; got {tuple(labels.shape)}. Shift "
            "them before, with -100 where no token follows: SequenceLayout.local(N, documents).shard_labels(tokens)"
        )
    if num_valid is not None and (not is_int(num_valid) or num_valid < 0):
        raise InputError(
            f"stream(): num_valid must be the number of valid tokens of all ranks, an int of at least 0; got "
            f"{described(num_valid)}. Leave it out for those of labels"
        )
    if layout is not None and not isinstance(layout, SequenceLayout):
        raise InputError(f"stream(): layout must be a SequenceLayout or None; got {described(layout)}")
    if layout is not None and layout.seq_len != tokens.shape[1]:
        hint = (
            " It is this rank's number of tokens: pass those of all ranks"
            if layout.num_local_tokens == tokens.shape[1]
            else ""
        )
        raise LayoutError(
            f"stream() takes the whole sequence of the layout, {layout.seq_len} tokens; got {tokens.shape[1]}.{hint}"
        )
