"""What a call of `LinearLlama3` may be given: each check raises InputError for the rest."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from longspan.checks import check_flag, check_not_empty, check_tensor, described, is_int
from longspan.errors import InputError
from longspan.layout import SequenceLayout
from longspan.models.config import LinearLlama3Config
from longspan.models.memory import ModelMemory
from longspan.models.routing import Routing
from longspan.ops.chunked.cross_entropy import check_labels, check_num_valid


def check_tokens(tokens: Tensor) -> None:
    """Token ids ``[B, T]``."""
    check_tensor("the model", "tokens", tokens)
    if tokens.dim() != 2 or tokens.dtype != torch.int64:
        raise InputError(
            f"tokens must be int64 [B, T]; got {tokens.dtype} of shape {tuple(tokens.shape)}. Pass token ids, rows.long()"
        )
    check_not_empty("the model", "tokens", tokens, "row and token")


def check_memory(memory: object, layout: SequenceLayout | None, num_layers: int) -> None:
    """What the model remembers, or None where nothing has to be remembered."""
    if memory is None:
        if layout is not None and layout.continues:
            raise InputError(
                f"the model: the layout continues a document of {layout.continues} earlier tokens, and nothing is remembered "
                "of them; got memory=None. Pass what the call before returned with output_memory=True"
            )
        return
    if not isinstance(memory, ModelMemory):
        raise InputError(
            f"the model: memory must be what a call with output_memory=True returned, or None; got {described(memory)}. Leave "
            "it out where a sequence starts"
        )
    if len(memory.layers) != num_layers:
        raise InputError(
            f"the model: memory must have one part for each of the {num_layers} layers; got {len(memory.layers)}. Pass "
            "what this very model returned"
        )


def check_loss(
    config: LinearLlama3Config,
    head: nn.Module,
    labels: Tensor | None,
    num_valid: object,
    routing: object,
    tokens: Tensor,
    in_segments: bool,
) -> None:
    """Labels and what a loss is divided by, or neither; and what notes the routers' decisions."""
    check_num_valid("the model", num_valid)
    if labels is None:
        for name, given in (("num_valid", num_valid), ("routing", None if in_segments else routing)):
            if given is not None:
                raise InputError(
                    f"the model: {name} is for a loss; got {described(given)} and no labels. Pass labels=, or leave it out"
                )
    if routing is not None and (not isinstance(routing, Routing) or not config.num_experts):
        raise InputError(
            f"the model: routing must be a longspan.models.Routing, for a model with experts; got {described(routing)} and "
            f"{config.num_experts} experts. Leave it out"
        )
    if labels is None:
        return
    check_labels("the model", labels, tokens.shape, config.vocab_size)
    if not isinstance(head, nn.Linear):
        raise InputError(
            f"the model: a loss takes the matrix of a head that is a torch.nn.Linear; got {type(head).__name__}. Compute "
            "it from logits: leave labels out"
        )


def check_token_scores(token_scores: object, labels: Tensor | None, **others: object) -> None:
    """Scores of each label, which are asked for with labels and nothing else."""
    check_flag("the model", "token_scores", token_scores)
    given = [name for name, value in others.items() if value is not None]
    if token_scores and (labels is None or given):
        raise InputError(
            "the model: token_scores=True scores each of the labels by itself, and returns nothing else; got "
            f"{given[0] if given else 'no labels'}. Give labels alone, or leave token_scores out"
        )


def check_logits_to_keep(logits_to_keep: object, labels: Tensor | None, tokens: Tensor) -> None:
    """A number of the tokens here, or None."""
    if logits_to_keep is None:
        return
    if labels is not None:
        raise InputError(
            f"the model: logits_to_keep is for logits; got {described(logits_to_keep)} and labels. Leave one of them out"
        )
    if not is_int(logits_to_keep) or not 0 <= cast(int, logits_to_keep) <= tokens.shape[1]:
        raise InputError(
            f"the model: logits_to_keep must be an int from 0 to the number of tokens here, {tokens.shape[1]}, or None; got "
            f"{described(logits_to_keep)}. Leave it out for the logits of all"
        )
