"""What a Linear-Llama3 is made of, as a config of Transformers."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeVar

from transformers import PreTrainedConfig

from longspan.errors import CheckpointError, ConfigError
from longspan.models.config import LinearLlama3Config
from longspan.models.rope_parameters import ROPE_KEYS, rope_faults, rope_fields

DEFAULT_VOCABULARY = 32_000
"""Tokens where none are said: configs of Transformers can be made without arguments."""

_NAMES = tuple(entry.name for entry in dataclasses.fields(LinearLlama3Config))
"""What `LinearLlama3Config` is told: this config has all of it, under the same names."""

Config = TypeVar("Config", bound="LinearLlamaConfig")


class LinearLlamaConfig(PreTrainedConfig):
    """`longspan.models.LinearLlama3Config` for Transformers: the same names and defaults, and the usual ones of Transformers.

        LinearLlamaConfig(vocab_size=32_000, dim=2048, num_layers=16, num_heads=16, hidden_dim=5632, pattern="LLLN")
        LinearLlamaConfig(hidden_size=2048, num_hidden_layers=16, num_attention_heads=16, intermediate_size=5632)

    ``rope_parameters`` or ``rope_scaling`` of the types ``"default"`` and ``"llama3"`` are taken, too, and kept under our names.

    Args (beside those of `LinearLlama3Config`, whose vocab_size is 32,000 if not said):
        max_position_embeddings: tokens of the sequences that it was trained on. Where more are given to softmax layers that have no
            window, the model warns once. None does not know.
        documents: how training has them: memory starts anew with each (``"reset"``), or they follow one another, the end of the one
            before in front of each (``"concatenate"``).
        logits_in_training: whether a model in training mode that is given labels returns logits as well as the loss, which it
            computes without holding the logits of all tokens.
        use_cache: whether a model in evaluation mode returns what it remembers, if a call does not say.
        bos_token_id, eos_token_id, pad_token_id: tokens of the vocabulary.

    Raises:
        ConfigError: for values that make no model.
    """

    model_type = "linear_llama3"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "intermediate_size": "hidden_dim",
        "rms_norm_eps": "norm_eps",
        "tie_word_embeddings": "tie_embeddings",
    }

    max_position_embeddings: int | None = None
    documents: Literal["reset", "concatenate"] = "reset"
    logits_in_training: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        given: dict[str, Any] = {}
        for name in list(kwargs):
            own = self.attribute_map.get(name, name)
            if own in _NAMES:
                if own in given:
                    raise ConfigError(f"{own} is given twice, as {name} too. Leave one of them out")
                given[own] = kwargs.pop(name)
        self._take_rope(kwargs, given)
        if self.documents not in ("reset", "concatenate"):
            raise ConfigError(f"documents must be 'reset' or 'concatenate'; got {self.documents!r}")
        core = LinearLlama3Config(**{"vocab_size": DEFAULT_VOCABULARY, **given})
        for name, value in core.to_dict().items():
            setattr(self, name, value)
        super().__post_init__(**kwargs)

    def _take_rope(self, kwargs: dict[str, Any], given: dict[str, Any]) -> None:
        """Move what `kwargs` say of the rotary embedding as Transformers does to `given`, by our names."""
        rope = {name: kwargs.pop(name) for name in ROPE_KEYS if name in kwargs}
        if not any(value is not None for value in rope.values()):
            return
        values = {**rope, "max_position_embeddings": self.max_position_embeddings}
        faults = rope_faults(values)
        if faults:
            raise ConfigError(f"{'; '.join(faults)}. Take another embedding")
        for name, value in rope_fields(values).items():
            if name in given:
                raise ConfigError(f"{name} is given twice, in {' and '.join(rope)} too. Leave one of them out")
            given[name] = value

    @classmethod
    def of(cls: type[Config], core: LinearLlama3Config, **more: Any) -> Config:
        """The config of a model of this library; `more` is what Transformers is told beside it."""
        return cls(**core.to_dict(), **more)

    def core(self) -> LinearLlama3Config:
        """What the model itself is told, checked.

        Raises:
            ConfigError: where attributes were set to what makes no model.
        """
        return LinearLlama3Config(**{name: getattr(self, name) for name in _NAMES})

    @classmethod
    def from_dict(cls: type[Config], config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_dict`.

        Raises:
            CheckpointError: for the config of another architecture.
        """
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise CheckpointError(
                f"this is a model of the type {found!r}, and {cls.__name__} is of {cls.model_type!r}: another architecture. Give a "
                "folder that longspan export, or save_pretrained of LinearLlamaForCausalLM, has written"
            )
        return super().from_dict(config_dict, **kwargs)
