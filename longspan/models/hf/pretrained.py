"""What Transformers asks of a model beside its `forward`: loading, embeddings, a head, gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from longspan.models.hf.checkpointing import keep_all, recompute
from longspan.models.hf.configuration import LinearLlamaConfig
from longspan.models.hf.loading import check_how_to_load, check_loaded
from longspan.models.initial import STD
from longspan.models.linear_llama3 import LinearLlama3
from longspan.models.mixers import SequenceParallel


class LinearLlamaPreTrainedModel(PreTrainedModel):
    """A `LinearLlama3` as Transformers handles it; `forward` is `LinearLlamaForCausalLM`'s."""

    model: LinearLlama3

    config_class = LinearLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # A memory state cannot go back to fewer tokens, as assisted generation would have it.
    _is_stateful = True
    _supports_context_parallel = False
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`, from safetensors alone, and with every tensor in its place.

        Raises:
            CheckpointError: for pickled weights, another architecture, and missing, extra or misshapen tensors, all of them listed.
            InputError: for arguments that ask for anything else.
        """
        check_how_to_load(pretrained_model_name_or_path, kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            **{**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True, "use_safetensors": True},
        )
        if not getattr(model, "_hf_peft_config_loaded", False):
            check_loaded(pretrained_model_name_or_path, info)
        return (model, info) if wants_info else model

    @property
    def sequence_parallel(self) -> SequenceParallel | None:
        """The group that the model was parallelized for, or None."""
        return self.model.sequence_parallel

    @sequence_parallel.setter
    def sequence_parallel(self, place: SequenceParallel | None) -> None:
        self.model.sequence_parallel = place

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another embedding in its place."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Put another head in its place."""
        self.model.head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As `PreTrainedModel.resize_token_embeddings`: the model inside has that many tokens, too."""
        embedding: nn.Module = super().resize_token_embeddings(*args, **kwargs)
        self.model.config = self.config.core()
        return embedding

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Of a vocabulary that grows: the model's own were drawn when it was made.
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(std=STD)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        if enable:
            recompute(self.model.blocks, gradient_checkpointing_func, every_n_layers)
        else:
            keep_all(self.model.blocks)
        self.gradient_checkpointing = enable
