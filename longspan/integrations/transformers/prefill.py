"""`longspan.prefill`: a long prompt over ranks, and its cache for Transformers' own ``generate``.

docs/transformers_generation.md is for users.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from longspan.checks import described
from longspan.errors import InputError
from longspan.integrations.transformers import inputs
from longspan.integrations.transformers.cache import fresh_cache, recording
from longspan.integrations.transformers.decoding import CACHE_ARGUMENTS, mark_prefilled
from longspan.integrations.transformers.model import ParallelModel, state_of
from longspan.integrations.transformers.structure import head_of, is_of_fla
from longspan.layout import SequenceLayout

Target = Literal["last", "all"]
TARGETS: tuple[Target, ...] = ("last", "all")


class Prefilled(NamedTuple):
    """What `prefill` found.

    cache: a cache of Transformers that holds the whole prompt, or None on ranks that have none.
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
) -> Prefilled:
    """Run a prompt through a parallelized model of Transformers, split over its ranks, and bring its cache together.

    Every rank of the group calls it, with the same prompt. The cache is of the class that Transformers itself makes, filled as
    Transformers fills it: states, convolution inputs, keys and values or latents, a sliding window's last tokens. The parallelized
    model decodes with it, on one rank and without the others::

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

    Raises:
        InputError: for a model that is not parallelized or has no head, in training mode, or whose parameters are split over ranks
            where `to` is ``"last"``; for padding, packed documents, a prompt shorter than the number of ranks, or one that differs
            between ranks.
    """
    state = _checked_state(model, to)
    named = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    given = {name: value for name, value in named.items() if value is not None}
    _check_prompt(state, given)
    state.compare_over_ranks(given)
    layout = state.layout_of(given, None)
    owner = _rank_of_last_token(layout)
    targets = range(layout.num_ranks) if to == "all" else range(owner, owner + 1)
    recorder = recording(fresh_cache(state.backbone), layout, targets)
    logits = _forward(state, given, layout, recorder)
    recorder.check()
    cache = recorder.hand_over()
    if cache is not None:
        mark_prefilled(cache, layout.seq_len)
    if to == "all":
        logits = _from_rank(logits, owner, layout)
    return Prefilled(cache, None if cache is None else logits, owner)


def _forward(state: ParallelModel, given: dict[str, Tensor], layout: SequenceLayout, recorder: Any) -> Tensor:
    """The logits ``[B, V]`` of this rank's last token; what layers remember goes to `recorder`."""
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
    # The cache that is given is used all the same; with use_cache RecurrentGemma takes a rank's only token for a step of decoding.
    local |= {name: recorder, "use_cache": False, inputs.LAYOUT: layout}
    if "logits_to_keep" in of_head:
        local["logits_to_keep"] = 1
    logits: Tensor = head(**local).logits
    return logits[:, -1]


def _from_rank(logits: Tensor, owner: int, layout: SequenceLayout) -> Tensor:
    """The logits of the rank that has the last token, on every rank."""
    from longspan.exchange.all_reduce import sum_over_ranks

    if layout.num_ranks == 1:
        return logits
    return sum_over_ranks(logits if layout.rank == owner else torch.zeros_like(logits), layout)


def _rank_of_last_token(layout: SequenceLayout) -> int:
    return next(s.rank for s in layout.all_segments if s.stop == layout.seq_len and s.num_tokens > 0)


def _checked_state(model: nn.Module, to: str) -> ParallelModel:
    if to not in TARGETS:
        raise InputError(f"to must be one of {', '.join(TARGETS)}; got {to!r}")
    state = _state_of(model)
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
    if is_of_fla(state.head):
        raise InputError(
            f"prefill() does not fill caches of flash-linear-attention's models yet; got {name}. Run the prompt on one rank, after "
            "longspan.unparallelize(model)"
        )
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


def _name(model: object) -> str:
    return f"a {type(model).__name__}" if isinstance(model, nn.Module) else described(model)
