"""Go on with a prompt: its tokens over ranks, then one token after another on one of them.

A linear layer carries a state of constant size from token to token, a softmax layer the keys and values that are still seen.

Shapes: T tokens of the prompt, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from longspan.checks import check_count, check_tensor, described, is_int
from longspan.errors import InputError, NonFiniteError
from longspan.layout import Order, SequenceLayout
from longspan.layout.shares import check_weights
from longspan.models.memory import ModelMemory
from longspan.models.mixers import SequenceParallel
from longspan.models.segments import Between, SegmentDone


class Decodable(Protocol):
    """A language model that can be given what it remembers of the tokens before, such as `LinearLlama3`.

    sequence_parallel: the group that it was parallelized for, or None.
    """

    sequence_parallel: SequenceParallel | None

    def __call__(
        self,
        tokens: Tensor,
        layout: SequenceLayout,
        *,
        memory: ModelMemory | None,
        logits_to_keep: int,
        output_memory: Literal[True],
    ) -> tuple[Tensor, ModelMemory]:
        """Logits [B, logits_to_keep, V] of the last of tokens [B, T], and what is remembered after all of them."""
        ...


@runtime_checkable
class DecodableInSegments(Protocol):
    """A `Decodable` whose prompts may be read in segments: in between each rank remembers what it likes."""

    def __call__(
        self,
        tokens: Tensor,
        layout: SequenceLayout,
        *,
        memory: ModelMemory | None,
        logits_to_keep: int,
        output_memory: Literal[True],
        in_segments: Literal[True],
    ) -> tuple[Tensor, ModelMemory]:
        """As `Decodable`, of a segment."""
        ...

    def empty_memory(self) -> ModelMemory:
        """What is remembered before the first segment."""
        ...

    def whole_memory(self, memory: ModelMemory, layout: SequenceLayout) -> ModelMemory:
        """What is remembered after the last segment, the same on every rank; layout: of any of them."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen by its logits: penalty, temperature, top-k and top-p, in this order; greedy if nothing is said.

    Raises:
        InputError: for a value out of its range, and for a choice among tokens that a temperature of 0 does not make.
    """

    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Choose among this many of the likeliest tokens; 0 is all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that have this probability together (arXiv 1904.09751); 1 is all."""
    repetition_penalty: float = 1.0
    """Make tokens less likely that were there before, in the prompt or behind it: their logits are divided by this where they are
    positive, else multiplied (arXiv 1909.05858)."""
    seed: int = 0
    """Of the random choices."""

    def __post_init__(self) -> None:
        self._check("temperature", self.temperature >= 0, "at least 0, which takes the likeliest token")
        self._check("top_k", is_int(self.top_k) and self.top_k >= 0, "a whole number of tokens, or 0 for all")
        self._check("top_p", 0 < self.top_p <= 1, "greater than 0 and at most 1, which is all tokens")
        self._check("repetition_penalty", self.repetition_penalty > 0, "greater than 0; 1 is none")
        self._check("seed", is_int(self.seed) and 0 <= self.seed < 2**63, "a whole number from 0 to 2^63 - 1")
        if self.temperature == 0:
            for name, given, nothing in (("top_k", self.top_k, 0), ("top_p", self.top_p, 1.0)):
                if given != nothing:
                    raise InputError(
                        f"{name} is {given}, which chooses among tokens, but temperature 0 always takes the likeliest one. Give a "
                        f"temperature, such as 0.8, or leave {name} out"
                    )

    def _check(self, name: str, fits: bool, expected: str) -> None:
        value = getattr(self, name)
        if not fits or not math.isfinite(value):
            raise InputError(f"{name} must be {expected}; got {value}")

    def choose(self, logits: Tensor, seen: Tensor, random: torch.Generator) -> int:
        """The next token.

        Args:
            logits: ``[V]``, finite, on the CPU.
            seen: bool ``[V]``, which tokens were there before.
            random: on the CPU.
        """
        if self.repetition_penalty != 1.0:
            logits = logits.double()
            penalty = self.repetition_penalty
            logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if self.temperature == 0:
            return int(logits.argmax())
        # From the largest down, so that no quotient overflows, however low the temperature.
        scaled = (logits - logits.amax()).double() / self.temperature
        if 0 < self.top_k < len(scaled):
            scaled = scaled.masked_fill(scaled < scaled.topk(self.top_k).values[-1], -torch.inf)
        weights = scaled.softmax(-1)
        if self.top_p < 1:
            ordered, order = weights.sort(descending=True, stable=True)
            likelier = ordered.cumsum(-1) - ordered
            weights = weights.index_fill(0, order[likelier >= self.top_p], 0.0)
        return int(torch.multinomial(weights, 1, generator=random))


def prefill(
    model: Decodable,
    tokens: Tensor,
    *,
    order: Order = "zigzag",
    weights: Sequence[float] | None = None,
    segment_tokens: int | None = None,
    between: Between | None = None,
) -> ModelMemory | None:
    """What the model remembers of all tokens of a prompt but the last, the same on every rank.

    To be called on every rank of the group that the model was parallelized for, with the same tokens. No logits are computed: those
    behind the last token are the first thing that `decode` needs, on whichever rank it runs.

    Args:
        model: parallelized, or for one process.
        tokens: int64 ``[T]``, at least one, on the model's device.
        order, weights: which tokens a rank takes, as in `SequenceLayout`; zigzag balances softmax layers.
        segment_tokens: read the prompt in segments of so many tokens, one after another, each over all ranks: the activations of
            one are held at a time, whatever the prompt's length, and beside them this rank's keys and values, as in training
            (`longspan.EarlierKeys`), which are brought together on all ranks at the end. None is at once.
        between: called after each segment, on every rank, with a `longspan.streaming.SegmentDone` of kind ``"forward"``; an error
            that it raises ends the prompt there.

    Returns:
        None for a prompt of one token.

    Raises:
        InputError: for tokens of another shape or dtype, or none, for segments with fewer tokens than ranks, and for a model that
            cannot read segments.
        LayoutError: for weights that are not one for each rank.
    """
    _check_prompt(tokens)
    place = model.sequence_parallel
    num_ranks = 1 if place is None else place.num_ranks
    check_segment_tokens(segment_tokens, num_ranks)
    # A prompt of few tokens is not split, and would hide what does not fit.
    check_weights(weights, num_ranks)
    num_tokens = len(tokens) - 1
    if not num_tokens:
        return None
    if place is None or num_tokens < place.num_ranks:
        # Too few for each rank to have one: every rank takes all of them.
        layout = SequenceLayout.local(num_tokens)
    else:
        layout = SequenceLayout(num_tokens, place.group, order, weights=weights)
    starts = _segments(num_tokens, segment_tokens or num_tokens, layout.num_ranks)
    with torch.no_grad():
        if len(starts) == 2:
            own = layout.shard(tokens[None, :-1])
            memory = model(own, layout, memory=None, logits_to_keep=0, output_memory=True)[1]
            if between is not None:
                between(SegmentDone("forward", 0, 1))
            return memory
        if not isinstance(model, DecodableInSegments):
            raise InputError(
                "prefill(): segment_tokens is for a model that hands what it remembers from segment to segment, by empty_memory() "
                f"and whole_memory(), as LinearLlama3 does; got {type(model).__name__}. Leave segment_tokens out"
            )
        memory = model.empty_memory()
        for number, (start, stop) in enumerate(pairwise(starts)):
            segment = layout.stretch(start, stop)
            own = segment.shard(tokens[None, start:stop])
            _, memory = model(own, segment, memory=memory, logits_to_keep=0, output_memory=True, in_segments=True)
            if between is not None:
                between(SegmentDone("forward", number, len(starts) - 1))
        return model.whole_memory(memory, layout)


def check_segment_tokens(segment_tokens: int | None, num_ranks: int) -> None:
    """Raise InputError unless a prompt may be read in segments of so many tokens, or at once (None)."""
    if segment_tokens is None:
        return
    check_count("prefill()", "segment_tokens", segment_tokens, "the tokens that are read at a time, or None for all")
    if segment_tokens < num_ranks:
        raise InputError(
            f"prefill(): segment_tokens is {segment_tokens}, fewer than the {num_ranks} ranks that share a segment: each needs a "
            f"token of it. The least that works is {num_ranks}; a few thousand keep a device busy"
        )


def _segments(num_tokens: int, segment_tokens: int, num_ranks: int) -> list[int]:
    """Where segments begin, and `num_tokens`: a last one of fewer tokens than ranks is part of the one before."""
    starts = list(range(0, num_tokens, segment_tokens))
    if len(starts) > 1 and num_tokens - starts[-1] < num_ranks:
        starts.pop()
    return [*starts, num_tokens]


def decode(
    model: Decodable,
    tokens: Tensor,
    memory: ModelMemory | None,
    *,
    sampling: Sampling | None = None,
    max_new_tokens: int | None = None,
    end: int | None = None,
) -> Iterator[int]:
    """The tokens that follow a prompt, each as soon as it is chosen; on one rank alone, or on each that calls it the same ones.

    Args:
        model: as in `prefill`.
        tokens: int64 ``[T]``, the whole prompt.
        memory: what `prefill` returned for it.
        sampling: how tokens are chosen; None is greedy.
        max_new_tokens: after how many it ends; None goes on as long as it is asked for more.
        end: the token that ends a text: it is not among those returned, and none comes behind it.

    Raises:
        InputError: for a prompt or a number of tokens that does not fit, at once.
        NonFiniteError: where logits are no longer numbers, when that token is asked for.
    """
    _check_prompt(tokens)
    if max_new_tokens is not None:
        check_count("decode()", "max_new_tokens", max_new_tokens)
    return _decoded(model, tokens, memory, sampling or Sampling(), max_new_tokens, end)


def generate(
    model: Decodable,
    tokens: Tensor,
    *,
    sampling: Sampling | None = None,
    max_new_tokens: int | None = None,
    end: int | None = None,
    order: Order = "zigzag",
    weights: Sequence[float] | None = None,
    segment_tokens: int | None = None,
    between: Between | None = None,
) -> Iterator[int]:
    """`prefill` at once, on every rank of the model's group, then `decode` as tokens are asked for, on one of them.

    Raises:
        InputError, NonFiniteError: as these do.
    """
    return decode(
        model,
        tokens,
        prefill(model, tokens, order=order, weights=weights, segment_tokens=segment_tokens, between=between),
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        end=end,
    )


def _decoded(
    model: Decodable,
    tokens: Tensor,
    memory: ModelMemory | None,
    sampling: Sampling,
    max_new_tokens: int | None,
    end: int | None,
) -> Iterator[int]:
    random = torch.Generator().manual_seed(sampling.seed)
    # On any rank, whatever the model was parallelized for, these are whole sequences.
    layout = SequenceLayout.local(1)
    given = tokens[None, -1:]
    seen: Tensor | None = None
    num_made = 0
    while num_made != max_new_tokens:
        with torch.no_grad():
            found, memory = model(given, layout, memory=memory, logits_to_keep=1, output_memory=True)
            logits = found[0, -1].cpu()
            if not logits.isfinite().all():
                raise NonFiniteError(
                    f"the logits behind {memory.num_tokens} tokens are not finite: the model's weights or memory are no numbers "
                    "any more. Take an earlier checkpoint, or float32 if this is bfloat16"
                )
            if seen is None:
                seen = torch.zeros(len(logits), dtype=torch.bool)
                seen[tokens.cpu()] = True
            chosen = sampling.choose(logits, seen, random)
        if chosen == end:
            return
        seen[chosen] = True
        num_made += 1
        yield chosen
        given = torch.full_like(given, chosen)


def _check_prompt(tokens: object) -> None:
    check_tensor("generate()", "tokens", tokens)
    assert isinstance(tokens, Tensor)
    if tokens.dim() != 1 or tokens.dtype != torch.int64:
        raise InputError(f"generate(): tokens must be int64 [T], those of one prompt; got {described(tokens)}")
    if not len(tokens):
        raise InputError(
            "generate(): a prompt must have at least one token; got none. Begin with that which ends a document"
        )
