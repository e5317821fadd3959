"""The model without its head, for libraries that put a head of their own in its place, as TRL does for its losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from longspan.errors import InputError
from longspan.models.hf.arguments import check_arguments, tokens_of
from longspan.models.hf.batches import arrange, check_mask
from longspan.models.hf.watching import watching

if TYPE_CHECKING:
    from longspan.models.hf.modeling import LinearLlamaForCausalLM


class Backbone(nn.Module):
    """Called as a `LinearLlamaForCausalLM` is, without labels and cache: what its head would read, ``[B, N, C]``, 0 for padding.

    It has no parameters of its own, and is no part of the model that it belongs to.
    """

    def __init__(self, head: LinearLlamaForCausalLM) -> None:
        super().__init__()
        # As an attribute the model would become a part of this.
        self.__dict__["head"] = head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """``last_hidden_state`` of the tokens.

        Raises:
            InputError: for a cache; over ranks, each of which has some of the tokens; and as `LinearLlamaForCausalLM`.
        """
        head: LinearLlamaForCausalLM = self.__dict__["head"]
        if use_cache or past_key_values is not None or return_dict is False:
            raise InputError(
                "the backbone takes no cache and returns no tuple. Call the model itself, or leave use_cache and return_dict out"
            )
        tokens = tokens_of(input_ids, inputs_embeds)
        check_arguments(kwargs, position_ids is not None)
        model = head.model
        place = model.sequence_parallel
        if place is not None and place.num_ranks > 1:
            raise InputError(
                "the backbone gives the states of whole sequences, and a rank has some of their tokens. Let the model compute the "
                "loss, from labels"
            )
        if head.config.num_experts and model.training and torch.is_grad_enabled():
            raise InputError(
                "the backbone of a model with experts is not for training: the routers' losses would be missing. Let the model "
                "compute the loss, from labels"
            )
        mask = check_mask(attention_mask, tokens)
        arranged = arrange(tokens, mask, position_ids, kwargs.get("cu_seq_lens_q"), place, "contiguous")
        head.warn_of_length(arranged.longest)
        with watching([model.blocks[-1]]) as found:
            model(arranged.call(tokens), arranged.layout, logits_to_keep=0)
        return BaseModelOutputWithPast(last_hidden_state=arranged.batch(model.norm(found[-1])))
