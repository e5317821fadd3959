"""`longspan.prefill`: a long prompt over ranks, and its cache for Transformers' own ``generate``.

docs/transformers_generation.md is for users.
"""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from longspan.checks import described, is_int
from longspan.errors import InputError
from longspan.integrations.transformers import inputs, mixers
from longspan.integrations.transformers.cache import (
    RecordingCache,
    fresh_cache,
    of_last_token,
    rank_of_last_token,
    recording,
)
from longspan.integrations.transformers.decoding import CACHE_ARGUMENTS, mark_prefilled
from longspan.integrations.transformers.fla_cache import recording_fla_cache
from longspan.integrations.transformers.model import ParallelModel, state_of
from longspan.integrations.transformers.segment import Segment, SegmentMemory
from longspan.integrations.transformers.structure import head_of, virtual_tokens_of
from longspan.layout import SequenceLayout
from longspan.models.mixers import SequenceMixer
from longspan.models.segments import Between, SegmentDone

Target = Literal["last", "all"]
TARGETS: tuple[Target, ...] = ("last", "all")


class Prefilled(NamedTuple):
    """What `prefill` found.

    cache: one of the model's own class that holds the whole prompt, or None on ranks that have none.
    logits: ``[B, V]`` of the prompt's last token, or None on ranks that have none.
    rank: of the group, which has the prompt's last token: the last one in contiguous order; in zigzag order 0, unless the prompt
    has fewer than two tokens for each rank.
    """

    cache: Any
    logits: Tensor | None
    rank: int


@torch.no_grad()
def prefill(
    model: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    to: Target = "last",
    segment_tokens: int | None = None,
    between: Between | None = None,
) -> Prefilled:
    """Run a prompt through a parallelized model of Transformers, split over its ranks, and bring its cache together.

    Every rank of the group calls it, with the same prompt. The cache is of the class that Transformers itself makes, or
    flash-linear-attention for models of its layers, filled as these fill it: states, convolution inputs, keys and values or
    latents, a sliding window's last tokens. The parallelized model decodes with it, on one rank and without the others::

        cache = longspan.prefill(model, input_ids[:, :-1]).cache
        if cache is not None:
            tokens = model.generate(input_ids, past_key_values=cache, max_new_tokens=100)

    The last token is left to ``generate``, which then chooses the first new token in its own way. docs/transformers_generation.md
    says what differs for models whose cache does not know its length.

    Args:
        model: given to `longspan.parallelize` before; in evaluation mode; a causal language model, with PEFT around it or not.
        input_ids: ``[B, N]`` integers, the whole prompt on every rank, at least one token for each rank. Rows are of one length.
        attention_mask: ``[B, N]`` of ones, as tokenizers return it. Padding is refused: a state would run over it.
        position_ids: ``[1, N]`` or ``[B, N]`` (or as multimodal models take them), each one more than the last; from 0 if None.
        to: ``"last"`` fills the cache on the rank that has the last token; ``"all"`` on every rank, each of which then holds all
            keys and values.
        segment_tokens: read the prompt in segments of so many tokens, each split over the ranks: the activations of one segment are
            held, and the cache is the same. A number of at least the ranks'. None reads it at once.
        between: called after each segment, on every rank, with a `longspan.streaming.SegmentDone` of kind ``"forward"``; an error
            that it raises ends the prompt there.

    Raises:
        InputError: for a model that is not parallelized or has no head, in training mode, or whose parameters are split over ranks
            where `to` is ``"last"``; for layers of flash-linear-attention beside others, or in segments; for PEFT's virtual tokens,
            padding, packed documents, a prompt shorter than the number of ranks, or one that differs between ranks.
    """
    state = _checked_state(model, to)
    num_ranks = state.place.num_ranks
    if segment_tokens is not None:
        _check_segments(state, segment_tokens)
    named = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    given = {name: value for name, value in named.items() if value is not None}
    _check_prompt(state, given)
    state.compare_over_ranks(given)
    whole = state.layout_of(given, None)
    segments = _cut(whole, segment_tokens)

    def layout_of(start: int, stop: int) -> SequenceLayout:
        return whole if segment_tokens is None else whole.stretch(start, stop)

    last = layout_of(*segments[-1])
    owner = rank_of_last_token(last)
    targets = range(num_ranks) if to == "all" else range(owner, owner + 1)
    recorder = _recorder(state, last, targets)
    memory = SegmentMemory(gathers=False)
    for number, (start, stop) in enumerate(segments):
        # One for what is recorded, which is kept, and one for the layers, which keep in it what is of this segment alone.
        recorder.begin_segment(layout_of(start, stop))
        segment = None
        if segment_tokens is not None:
            segment = Segment(memory, state.numbers, stop < whole.seq_len, whole.seq_len, whole.seq_len)
        tokens = {name: x[..., start:stop] for name, x in given.items()}
        logits = _forward(state, tokens, layout_of(start, stop), recorder, segment)
        if segment is not None:
            memory = segment.take()
        if between is not None:
            between(SegmentDone("forward", number, len(segments)))
    recorder.check()
    cache = recorder.hand_over()
    if cache is not None:
        mark_prefilled(cache, whole.seq_len)
    if to == "all":
        logits = of_last_token(logits, last)
    return Prefilled(cache, None if cache is None else logits, owner)


def _cut(whole: SequenceLayout, segment_tokens: int | None) -> list[tuple[int, int]]:
    """First and last bound of a prompt's segments, in order; all of it, where it is not cut. Every rank has a token of each."""
    starts = list(range(0, whole.seq_len, segment_tokens or whole.seq_len))
    if len(starts) > 1 and whole.seq_len - starts[-1] < whole.num_ranks:
        starts.pop()
    return list(pairwise([*starts, whole.seq_len]))


def _forward(
    state: ParallelModel, given: dict[str, Tensor], layout: SequenceLayout, recorder: Any, segment: Segment | None
) -> Tensor:
    """The logits ``[B, V]`` of this rank's last token; what layers remember goes to `recorder` and, of a segment, to that."""
    head: Any = state.head
    of_head, of_backbone = (
        inspect.signature(type(module).forward).parameters for module in (state.head, state.backbone)
    )
    local = inputs.local_arguments(given, layout, frozenset(of_backbone))
    name = next((name for name in reversed(CACHE_ARGUMENTS) if name in of_head), None)
    if name is None:
        raise InputError(
            f"prefill: {type(head_of(head)).__name__} takes no cache ({' or '.join(CACHE_ARGUMENTS)}); what it remembers cannot "
            "be handed to it. Run the prompt on one rank, longspan.unparallelize(model)"
        )
    # Transformers' layers fill the cache that is given all the same; with use_cache RecurrentGemma takes a rank's only token for
    # a step of decoding.
    local |= {name: recorder, "use_cache": recorder.is_used_by_layers, inputs.LAYOUT: layout}
    if segment is not None:
        local[inputs.SEGMENT] = segment
    if "logits_to_keep" in of_head:
        local["logits_to_keep"] = 1
    logits: Tensor = head(**local).logits
    return logits[:, -1]


def _recorder(state: ParallelModel, layout: SequenceLayout, targets: range) -> Any:
    """What takes the place of a cache of the class that the model's layers fill."""
    if any(map(mixers.is_of_fla, state.mixers)):
        return recording_fla_cache(state.mixers, layout, targets)
    return recording(RecordingCache, fresh_cache(state.backbone), layout, targets)


def _checked_state(model: nn.Module, to: str) -> ParallelModel:
    if to not in TARGETS:
        raise InputError(f"to must be one of {', '.join(TARGETS)}; got {to!r}")
    state = _state_of(model)
    if state is None and _has_layers_of_this_library(model):
        raise InputError(
            f"prefill() is for models of other libraries; {_name(model)}, of layers of this one, reads a prompt over ranks by "
            "itself. Call model.generate(input_ids, ...) of a parallelized LinearLlamaForCausalLM, or longspan.models.generate, on "
            "every rank"
        )
    if state is None:
        raise InputError(
            f"prefill() takes a model of Hugging Face Transformers that was given to longspan.parallelize(); got {_name(model)}, "
            "which was not. Call longspan.parallelize(model, group) first"
        )
    name = type(state.head).__name__
    if state.head is state.backbone:
        raise InputError(
            f"{name} has no head, so that nothing can be generated from its cache. Parallelize the ForCausalLM model that has one"
        )
    virtual = virtual_tokens_of(model)
    if virtual is not None:
        raise InputError(
            f"prefill(): {virtual} puts virtual tokens before those of a prompt, which a cache that ranks fill does not hold. "
            "Generate with the unparallelized model, longspan.unparallelize(model)"
        )
    _check_layers(state, name)
    if state.head.training:
        raise InputError(
            f"{name} is in training mode, in which dropout changes what is generated and checkpointing drops the cache. Call "
            "model.eval() first"
        )
    if to == "last" and any(hasattr(parameter, "device_mesh") for parameter in head_of(model).parameters()):
        raise InputError(
            f"the parameters of {name} are split over ranks (FSDP), and one rank alone cannot decode: every step needs all of "
            "them. Pass to='all', and generate on every rank"
        )
    return state


def _check_segments(state: ParallelModel, segment_tokens: object) -> None:
    """Refuse segments without a token for each rank, and layers that do not hand on what they remember."""
    num_ranks = state.place.num_ranks
    if not is_int(segment_tokens) or segment_tokens < num_ranks:  # type: ignore[operator]
        raise InputError(
            f"prefill(): segment_tokens must be None or an int of at least {num_ranks}, a token for each rank; got "
            f"{described(segment_tokens)}. A few thousand keep a device busy"
        )
    of_fla = sorted({type(mixer).__name__ for mixer in state.mixers if mixers.is_of_fla(mixer)})
    if of_fla:
        raise InputError(
            f"prefill(): {', '.join(of_fla)} of flash-linear-attention cannot begin with what a segment before it left. Leave "
            "segment_tokens out"
        )


def _check_layers(state: ParallelModel, name: str) -> None:
    """Refuse layers of flash-linear-attention that share no cache with others, or that their cache cannot tell apart."""
    of_fla = [mixer for mixer in state.mixers if mixers.is_of_fla(mixer)]
    if of_fla and len(of_fla) < len(state.mixers):
        kinds = sorted({type(mixer).__name__ for mixer in state.mixers})
        raise InputError(
            f"{name} has layers of flash-linear-attention and others ({', '.join(kinds)}), which keep what they remember in caches "
            "of two classes: prefill() fills one. Run the prompt on one rank, after longspan.unparallelize(model)"
        )
    unknown = sorted({type(mixer).__name__ for mixer in of_fla if getattr(mixer, "layer_idx", None) is None})
    if unknown:
        raise InputError(
            f"{', '.join(unknown)} of {name} has no layer_idx, by which a cache of flash-linear-attention tells layers apart. "
            "Build each layer with its own layer_idx"
        )


def _check_prompt(state: ParallelModel, given: dict[str, Tensor]) -> None:
    inputs.check_arguments(given)
    ids, mask = given["input_ids"], given.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise InputError(
            "attention_mask has padding: keys and states of padding would lie between the prompt and what is generated. Prefill "
            "rows of one length together, and rows of other lengths by themselves"
        )
    if inputs.document_bounds(given) is not None:
        raise InputError(
            "position_ids restart: packed documents have no common continuation. Prefill each prompt by itself, or those of one "
            "length as rows"
        )
    num_ranks = state.place.num_ranks
    if ids.shape[1] < num_ranks:
        raise InputError(
            f"the prompt has {ids.shape[1]} tokens, fewer than the {num_ranks} ranks: each needs at least one. Generate from a "
            "prompt this short with the unparallelized model"
        )


def _state_of(model: object) -> ParallelModel | None:
    return state_of(model) if isinstance(model, nn.Module) else None


def _has_layers_of_this_library(model: object) -> bool:
    return isinstance(model, nn.Module) and any(isinstance(module, SequenceMixer) for module in model.modules())


def _name(model: object) -> str:
    return f"a {type(model).__name__}" if isinstance(model, nn.Module) else described(model)
