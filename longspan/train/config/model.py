"""The section [model]."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from longspan.errors import ConfigError
from longspan.models import LinearLlama3Config, preset

PRESET = "preset"
"""The key of [model] that stands for all others, which then change it: it is read, and not kept."""
_LISTS = ("operator", "pattern")


@dataclass(frozen=True)
class ModelConfig:
    """The Linear-Llama3 to train; its vocabulary is the data's."""

    dim: int = 128
    """Width of the residual stream."""
    num_layers: int = 4
    """Number of blocks."""
    pattern: tuple[str, ...] = ("LLLN",)
    """Kind of each layer, repeated over the layers: L linear attention, N softmax attention; or the mixer of each layer by name."""
    operator: tuple[str, ...] = ("simple_gla",)
    """What the L layers are (simple_gla, gla, gated_deltanet, mamba2, ...): one name for all of them, or one for each."""
    num_heads: int = 2
    """Query heads of a layer."""
    num_kv_heads: int | None = 1
    """Key and value heads of a softmax layer (grouped queries); None is num_heads."""
    head_dim: int | None = None
    """Size of a head; None is dim / num_heads."""
    window: int | None = None
    """How many tokens a softmax layer sees, the token itself included; None is all before it."""
    hidden_dim: int = 352
    """Width of the feed-forward layers, or of each of their experts."""
    num_experts: int = 0
    """Experts of a feed-forward layer, of which each token takes a few; 0 is a layer that takes all tokens."""
    experts_per_token: int = 2
    """Experts that a token takes, the likeliest by the router."""
    num_shared_experts: int = 0
    """Experts that every token takes beside its own."""
    balance_loss_weight: float = 0.01
    """Of the loss of each layer that is least where all experts are chosen equally often."""
    z_loss_weight: float = 0.001
    """Of the loss of each layer that keeps the router's logits small."""
    feed_forward_chunk: int = 0
    """Tokens that feed-forward layers compute at once, and again in backward, to keep nothing of their width; 0 is all, once."""
    rope_theta: float = 500_000.0
    """Base of the rotary embedding in softmax layers."""
    rope_factor: float = 1.0
    """How many times slower the slowest channels of the rotary embedding turn (Llama 3.1's scaling); 1 leaves all as they are."""
    rope_low_freq_factor: float = 1.0
    """Channels that turn less often than this over rope_original_length are among the slowest."""
    rope_high_freq_factor: float = 4.0
    """Channels that turn more often than this over rope_original_length stay as they are."""
    rope_original_length: int = 8192
    """Tokens of the sequences that a model was trained on before rope_factor."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Use the embedding's matrix for the output, too."""

    def build(self, vocab_size: int) -> LinearLlama3Config:
        """What the model itself is told.

        Raises:
            ConfigError: for values that make no model.
        """
        lists = {"operator": self.operator, "pattern": self.pattern}
        values = vars(self) | {name: value[0] if len(value) == 1 else value for name, value in lists.items()}
        try:
            return LinearLlama3Config(vocab_size, **values)
        except ConfigError as error:
            raise ConfigError(f"[model] {error}") from error

    @classmethod
    def of_preset(cls, name: str) -> ModelConfig:
        """The model of `longspan.models.PRESETS`, all values of this section, whatever it has otherwise.

        Raises:
            ConfigError: for a preset that does not exist.
        """
        try:
            full = preset(name)
        except ConfigError as error:
            raise ConfigError(f"model.preset: {error}") from error
        values = {entry.name: getattr(full, entry.name) for entry in dataclasses.fields(cls)}
        lists = {key: (value,) if isinstance(value, str) else value for key, value in values.items() if key in _LISTS}
        return cls(**(values | lists))
