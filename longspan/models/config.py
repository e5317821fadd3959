"""What a Linear-Llama3 is made of."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from longspan.errors import ConfigError
from longspan.models.mixers import MIXERS
from longspan.models.rotary import RopeScaling

LayerKind = Literal["L", "N"]

_OF_EXPERTS = ("experts_per_token", "num_shared_experts", "balance_loss_weight", "z_loss_weight")
"""Fields that say nothing of a model without experts."""

_OF_SCALING = ("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_length")
"""Fields that say nothing where `rope_factor` is 1."""


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
    pattern: str | tuple[str, ...] = "LLLN"
    """Kind of each layer, as letters that are repeated over the layers: L linear attention, N softmax attention. Or the name of
    each layer's mixer; fewer names are repeated over the layers, without a rest."""
    operator: str | tuple[str, ...] = "simple_gla"
    """The mixer of the L layers (`longspan.models.MIXERS`): one name for all of them, or one for each. Left out where `pattern` has
    names."""
    num_heads: int = 4
    """Query heads of a layer."""
    num_kv_heads: int | None = None
    """Key and value heads of a softmax layer (grouped queries); None is `num_heads`. Linear layers have `num_heads`."""
    head_dim: int | None = None
    """Size of a head; None is ``dim / num_heads``. Keys or values of some linear layers have half or twice as many channels a head
    (docs/models.md)."""
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
    rope_factor: float = 1.0
    """How many times slower the slowest channels of the rotary embedding turn, for sequences that much longer, as in Llama 3.1
    (``rope_type`` ``"llama3"``); 1 leaves all as they are."""
    rope_low_freq_factor: float = 1.0
    """Channels that turn less often than this over `rope_original_length` are among the slowest."""
    rope_high_freq_factor: float = 4.0
    """Channels that turn more often than this over `rope_original_length` stay as they are."""
    rope_original_length: int = 8192
    """Tokens of the sequences that a model was trained on before `rope_factor`."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Use the embedding's matrix for the output, too."""

    def __post_init__(self) -> None:
        # A list comes from TOML or JSON; a frozen config must hash.
        for name in ("operator", "pattern"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        if isinstance(self.pattern, str) and self.pattern in MIXERS:
            object.__setattr__(self, "pattern", (self.pattern,))
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
        self._check_rope()
        self._check_heads()
        if isinstance(self.pattern, str):
            self._check_letters(self.pattern)
        else:
            self._check_names(self.pattern)
        for name in dict.fromkeys(self.layer_operators):
            MIXERS[name].check(self)
        self._check_experts()

    def _check_rope(self) -> None:
        for name in ("rope_factor", "rope_low_freq_factor", "rope_high_freq_factor"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ConfigError(f"{name} must be a number greater than 0; got {value!r}")
        _check_positive("rope_original_length", self.rope_original_length)
        if self.rope_factor < 1:
            raise ConfigError(f"rope_factor must be at least 1, which leaves all as it is; got {self.rope_factor}")
        if self.rope_factor == 1:
            self._check_left_out(_OF_SCALING, "a scaled rotary embedding, and rope_factor is 1. Set rope_factor")
        elif not self.rope_low_freq_factor < self.rope_high_freq_factor:
            raise ConfigError(
                f"rope_low_freq_factor must be less than rope_high_freq_factor; got {self.rope_low_freq_factor} and "
                f"{self.rope_high_freq_factor}. Llama 3.1 has 1 and 4"
            )

    def _check_left_out(self, names: Iterable[str], what: str) -> None:
        """Raise ConfigError where one of these fields, which concern `what`, was set."""
        for name in names:
            if getattr(self, name) != getattr(type(self), name):
                raise ConfigError(f"{name} is {getattr(self, name)}, which concerns {what}, or leave {name} out")

    def _check_experts(self) -> None:
        for name in ("num_experts", "num_shared_experts"):
            if getattr(self, name) != 0 or isinstance(getattr(self, name), bool):
                _check_positive(name, getattr(self, name), ", or 0 for none")
        _check_positive("experts_per_token", self.experts_per_token)
        for name in ("balance_loss_weight", "z_loss_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be at least 0, which leaves the loss out; got {getattr(self, name)}")
        if not self.num_experts:
            self._check_left_out(_OF_EXPERTS, "experts, and num_experts is 0. Set num_experts")
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

    def _check_letters(self, pattern: str) -> None:
        if not pattern or set(pattern) - {"L", "N"}:
            # What is no L stands for something else, and so for the other letter.
            letters = "".join("L" if letter in "lL" else "N" for letter in pattern)
            raise ConfigError(
                "pattern must be letters L (linear attention) and N (softmax attention), such as LLLN, or the name of a mixer for "
                f"each layer; got {pattern!r}{_hint(pattern, MIXERS, letters)}"
            )
        linear = [name for name in MIXERS if name != "softmax"]
        for name in (self.operator,) if isinstance(self.operator, str) else self.operator:
            if name not in linear:
                raise ConfigError(
                    f"operator must be one of {', '.join(linear)}; got {name!r}"
                    + (". Softmax layers are N in pattern" if name == "softmax" else _hint(name, linear))
                )
        num_linear = self.layer_kinds.count("L")
        if not isinstance(self.operator, str) and len(self.operator) != num_linear:
            raise ConfigError(
                f"operator lists {len(self.operator)} names for {num_linear} L layers (pattern {self.pattern!r} over "
                f"{self.num_layers} layers): give one for each, or a single one for all"
            )

    def _check_names(self, pattern: tuple[str, ...]) -> None:
        for name in pattern:
            if name not in MIXERS:
                raise ConfigError(
                    f"pattern must be letters L and N, or names of mixers, of {', '.join(MIXERS)}; got {name!r} among "
                    f"{len(pattern)} names{_hint(name, MIXERS)}"
                )
        if not pattern or self.num_layers % len(pattern):
            raise ConfigError(
                f"pattern lists {len(pattern)} names for {self.num_layers} layers: give one for each, or as many as can be "
                "repeated without a rest"
            )
        if self.operator != type(self).operator:
            raise ConfigError(
                f"pattern names the mixer of each layer ({', '.join(pattern)}), and operator is {self.operator!r}, which is for "
                "the letters L of a pattern. Leave one of them out"
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
    def rope_scaling(self) -> RopeScaling | None:
        """What becomes of the frequencies of the rotary embedding; None leaves them."""
        if self.rope_factor == 1:
            return None
        return RopeScaling(
            self.rope_factor, self.rope_low_freq_factor, self.rope_high_freq_factor, self.rope_original_length
        )

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Kind of each layer: the pattern tiled over the layers."""
        tiled = [self.pattern[index % len(self.pattern)] for index in range(self.num_layers)]
        return tuple("N" if entry in ("N", "softmax") else "L" for entry in tiled)

    @property
    def layer_operators(self) -> tuple[str, ...]:
        """The mixer of each layer by name: the L layers' own, and ``"softmax"``."""
        if not isinstance(self.pattern, str):
            return self.pattern * (self.num_layers // len(self.pattern))
        names = iter([self.operator] * self.num_layers if isinstance(self.operator, str) else self.operator)
        return tuple(next(names) if kind == "L" else "softmax" for kind in self.layer_kinds)

    def to_dict(self) -> dict[str, object]:
        """Plain values that JSON and TOML can hold; ``LinearLlama3Config(**values)`` reads them back."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _check_positive(name: str, value: object, otherwise: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be an integer of at least 1{otherwise}; got {value!r}")


def _names(field: str, value: object) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{field} must be a string or a list of strings; got {value!r}")
    return tuple(value)


def _hint(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """The known name that is nearest, or `otherwise` where none is near, as the end of a message."""
    near = difflib.get_close_matches(name, [*known], n=1, cutoff=0.5 if otherwise else 0.0)
    return f". Did you mean {(near or [otherwise])[0]!r}?" if name else ""
