"""What a Linear-Llama3 is made of."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from longspan.errors import ConfigError
from longspan.models.gates import GATE_BUILDERS
from longspan.ops.variants import VARIANTS

LayerKind = Literal["L", "N"]

_OF_EXPERTS = ("experts_per_token", "num_shared_experts", "balance_loss_weight", "z_loss_weight")
"""Fields that say nothing of a model without experts."""


@dataclass(frozen=True)
class LinearLlama3Config:
    """A hybrid of linear (L) and softmax (N) attention layers in Llama 3's block; checked when it is made.

    Raises:
        ConfigError: for a value that does not fit, with the value, what was expected and what to do.
    """

    vocab_size: int
    """Number of token ids."""
    dim: int = 256
    """Width of the residual stream."""
    num_layers: int = 4
    """Number of blocks."""
    pattern: str = "LLLN"
    """Kind of each layer, repeated over the layers: L linear attention, N softmax attention."""
    operator: str | tuple[str, ...] = "simple_gla"
    """What the L layers are: one name for all of them, or one for each."""
    num_heads: int = 4
    """Query heads of a layer."""
    num_kv_heads: int | None = None
    """Key and value heads of a softmax layer (grouped queries); None is `num_heads`. Linear layers have `num_heads`."""
    head_dim: int | None = None
    """Size of a head; None is ``dim / num_heads``."""
    window: int | None = None
    """How many tokens a softmax layer sees, the token itself included; None is all before it."""
    hidden_dim: int = 704
    """Width of the feed-forward layers, or of each of their experts."""
    num_experts: int = 0
    """Experts of a feed-forward layer, of which each token takes a few; 0 is a layer that takes all tokens."""
    experts_per_token: int = 2
    """Experts that a token takes, the likeliest by the router."""
    num_shared_experts: int = 0
    """Experts that every token takes beside its own."""
    balance_loss_weight: float = 0.01
    """Of the loss of each layer that is least where all experts are chosen equally often (arXiv 2101.03961)."""
    z_loss_weight: float = 0.001
    """Of the loss of each layer that keeps the router's logits small (arXiv 2202.08906)."""
    feed_forward_chunk: int = 0
    """Tokens that feed-forward layers compute at once, and again in backward, to keep nothing of their width; 0 is all, once."""
    rope_theta: float = 500_000.0
    """Base of the rotary embedding in softmax layers."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Use the embedding's matrix for the output, too."""

    def __post_init__(self) -> None:
        if not isinstance(self.operator, str):
            # A list comes from TOML or JSON; a frozen config must hash.
            object.__setattr__(self, "operator", tuple(self.operator))
        for name in ("vocab_size", "dim", "num_layers", "num_heads", "hidden_dim"):
            _check_positive(name, getattr(self, name))
        if self.feed_forward_chunk != 0 or isinstance(self.feed_forward_chunk, bool):
            _check_positive("feed_forward_chunk", self.feed_forward_chunk, ", or 0 for all tokens at once")
        for name in ("num_kv_heads", "head_dim", "window"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        for name in ("rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be greater than 0; got {getattr(self, name)}")
        self._check_heads()
        self._check_layers()
        self._check_experts()

    def _check_experts(self) -> None:
        for name in ("num_experts", "num_shared_experts"):
            if getattr(self, name) != 0 or isinstance(getattr(self, name), bool):
                _check_positive(name, getattr(self, name), ", or 0 for none")
        _check_positive("experts_per_token", self.experts_per_token)
        for name in ("balance_loss_weight", "z_loss_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be at least 0, which leaves the loss out; got {getattr(self, name)}")
        if not self.num_experts:
            for name in _OF_EXPERTS:
                if getattr(self, name) != getattr(type(self), name):
                    raise ConfigError(
                        f"{name} is {getattr(self, name)}, which concerns experts, and num_experts is 0. Set num_experts, or leave "
                        f"{name} out"
                    )
        elif self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"experts_per_token {self.experts_per_token} is more than num_experts {self.num_experts}: a token takes different "
                "experts. Lower it, or use more experts"
            )

    def _check_heads(self) -> None:
        if self.head_dim is None and self.dim % self.num_heads:
            raise ConfigError(
                f"dim {self.dim} is not a multiple of num_heads {self.num_heads}. Change one of them, or set head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}: each key and value "
                "head serves an equal number of query heads"
            )
        if "N" in self.pattern and self.size_of_head % 2:
            raise ConfigError(
                f"the size of a head must be even, for the rotary embedding of softmax layers; got {self.size_of_head}"
            )

    def _check_layers(self) -> None:
        if not self.pattern or set(self.pattern) - {"L", "N"}:
            raise ConfigError(
                "pattern must be letters L (linear attention) and N (softmax attention), such as LLLN; "
                f"got {self.pattern!r}"
            )
        names = (self.operator,) if isinstance(self.operator, str) else self.operator
        for name in names:
            if name in VARIANTS and name not in GATE_BUILDERS:
                gates = ", ".join(gate.name for gate in VARIANTS[name].gates)
                raise ConfigError(
                    f"operator {name!r} has no module that makes its gates ({gates}) from a layer's input: add one to "
                    "longspan/models/gates.py"
                )
            if name not in GATE_BUILDERS:
                raise ConfigError(f"operator must be one of {', '.join(GATE_BUILDERS)}; got {name!r}")
        num_linear = self.layer_kinds.count("L")
        if not isinstance(self.operator, str) and len(self.operator) != num_linear:
            raise ConfigError(
                f"operator lists {len(self.operator)} names for {num_linear} L layers (pattern {self.pattern!r} over "
                f"{self.num_layers} layers): give one for each, or a single one for all"
            )

    @property
    def kv_heads(self) -> int:
        """Key and value heads of a softmax layer."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def size_of_head(self) -> int:
        """Channels of a head."""
        return self.dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Kind of each layer: the pattern tiled over the layers."""
        kinds: list[LayerKind] = []
        for index in range(self.num_layers):
            kinds.append("L" if self.pattern[index % len(self.pattern)] == "L" else "N")
        return tuple(kinds)

    @property
    def layer_operators(self) -> tuple[str, ...]:
        """Operator of each layer: the L layers' own, and ``"softmax"``."""
        names = iter([self.operator] * self.num_layers if isinstance(self.operator, str) else self.operator)
        return tuple(next(names) if kind == "L" else "softmax" for kind in self.layer_kinds)

    def to_dict(self) -> dict[str, object]:
        """Plain values that JSON and TOML can hold; ``LinearLlama3Config(**values)`` reads them back."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _check_positive(name: str, value: object, otherwise: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be an integer of at least 1{otherwise}; got {value!r}")
