"""`generate` of Transformers, with a cache that holds states."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from longspan.errors import InputError
from longspan.models.hf.arguments import check_some
from longspan.models.hf.cache import LinearLlamaCache

_OF_GENERATE_ALONE = ("tokenizer", "assistant_tokenizer")
"""What Transformers hands on to the model though it is for `generate` itself, as the tokenizer that stop strings need."""


class StatefulGenerationMixin(GenerationMixin):
    """`GenerationMixin` for a model that fills a `LinearLlamaCache`."""

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers.

        Raises:
            InputError: for a prompt of no tokens.
        """
        check_some(kwargs.get("input_ids") if inputs is None else inputs)
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """As in Transformers.

        Raises:
            InputError: for a prompt with padding on the right.
        """
        mask = kwargs.get("attention_mask")
        if mask is not None and bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise InputError(
                "a prompt to generate from has padding on the right: the next token would stand behind it. Pad on the left "
                "(tokenizer.padding_side = 'left')"
            )
        kwargs = {name: value for name, value in kwargs.items() if name not in _OF_GENERATE_ALONE}
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise InputError(
                f"cache_implementation={kind!r}: a LinearLlamaCache is the only one, of constant size in linear layers. Leave "
                "it out"
            )
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = LinearLlamaCache()
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
