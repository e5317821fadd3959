"""A model of flash-linear-attention's layers that the package itself has no model of; needs the package."""

from __future__ import annotations

from typing import Any

from fla.layers.simple_gla import SimpleGatedLinearAttention
from fla.models import GLAConfig, GLAForCausalLM

SimpleGLAConfig = GLAConfig


class SimpleGLAForCausalLM(GLAForCausalLM):
    """GLA's model with a decay for each head in place of one for each key channel."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.attn = SimpleGatedLinearAttention(
                hidden_size=config.hidden_size, num_heads=config.num_heads, use_short_conv=True, layer_idx=index
            )
