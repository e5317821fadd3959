"""The Auto classes of Transformers are told of ours."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from longspan.models.hf.configuration import LinearLlamaConfig
from longspan.models.hf.modeling import LinearLlamaForCausalLM


def register() -> None:
    """Let `AutoConfig` and `AutoModelForCausalLM` find `LinearLlamaConfig` and `LinearLlamaForCausalLM` by their model_type.

    Importing `longspan.models.hf` does it. No code comes with a checkpoint, so that ``trust_remote_code`` has no part in it.
    """
    AutoConfig.register(LinearLlamaConfig.model_type, LinearLlamaConfig, exist_ok=True)
    AutoModelForCausalLM.register(LinearLlamaConfig, LinearLlamaForCausalLM, exist_ok=True)
