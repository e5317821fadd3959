"""The table of what mixes tokens in Transformers' models: for each class, what it calls and what must stand in for that.

Modeling files give their kernels the same names, so that one stand-in (`functions.py`) serves all families; what differs is which
classes call which, and whether the model hands its keyword arguments on to them. tests/integrations/transformers hold the table
against the installed release: a class or a function that was renamed is seen there, and not in training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from longspan.errors import InputError

CONVOLUTION = "causal_conv1d_fn"
GATED_DELTA = "torch_chunk_gated_delta_rule"
KIMI_DELTA = "chunk_kimi_delta_attention"
MAMBA2 = "mamba2_chunk_scan"
SELECTIVE_SCAN = "mamba_selective_scan"
RWKV = "rwkv_linear_attention"
ATTENTION = "attention"
LIGHTNING = "lightning attention"
RECURRENT_UNIT = "recurrent unit"
TOKEN_SHIFT = "token shift"

GLA = "gla"
SIMPLE_GLA = "simple_gla"
RETENTION = "retention"
LINEAR_ATTENTION = "linear_attention"
DELTA_RULE = "delta_rule"
GATED_DELTA_RULE = "gated_delta_rule"
KDA = "kda"
HGRN = "hgrn"
RWKV6 = "rwkv6"
ROTARY = "rotary embedding"


@dataclass(frozen=True)
class MixerClass:
    """What one class of mixers does.

    calls: names of the functions it must have called with the layout in every forward. hands_on: whether the model gives its
    keyword arguments to the mixer and the mixer to these functions. reaches: whether the keyword arguments come as far as the
    mixer. methods: what is replaced on each instance, for classes that call no function: a path to the method, and the name of
    what stands in for it in `methods.py`. switched_off: attributes that are False in a parallelized model, since the attention
    function does what they ask for.
    """

    calls: tuple[str, ...]
    hands_on: bool = True
    reaches: bool = True
    methods: Mapping[str, str] = field(default_factory=dict)
    switched_off: tuple[str, ...] = ()


_GATED_DELTA_NET = MixerClass((CONVOLUTION, GATED_DELTA))
_KIMI_DELTA_ATTENTION = MixerClass((CONVOLUTION, KIMI_DELTA))
_MAMBA2 = MixerClass((CONVOLUTION, MAMBA2))
_MAMBA = MixerClass((CONVOLUTION, SELECTIVE_SCAN), hands_on=False, reaches=False)
_SHORT_CONVOLUTION = MixerClass((CONVOLUTION,))
_SHIFTED = {"time_shift.forward": "shift_of_module"}

MIXERS: Mapping[str, MixerClass] = {
    "BailingHybridDeltaAttention": _KIMI_DELTA_ATTENTION,
    "BambaMixer": _MAMBA2,
    "FalconH1Mixer": _MAMBA2,
    "FalconMambaMixer": _MAMBA,
    "GraniteMoeHybridMambaLayer": _MAMBA2,
    "JambaMambaMixer": _MAMBA,
    "KimiLinearDeltaAttention": _KIMI_DELTA_ATTENTION,
    "Lfm2MoeShortConv": _SHORT_CONVOLUTION,
    "Lfm2ShortConv": _SHORT_CONVOLUTION,
    "Lfm3ShortConv": _SHORT_CONVOLUTION,
    "Mamba2Mixer": _MAMBA2,
    "MambaMixer": _MAMBA,
    "MiniMaxLightningAttention": MixerClass((LIGHTNING,), methods={"forward": "lightning_attention"}),
    "NemotronHMamba2Mixer": _MAMBA2,
    "OlmoHybridGatedDeltaNet": _GATED_DELTA_NET,
    "Qwen3NextGatedDeltaNet": _GATED_DELTA_NET,
    "Qwen3_5GatedDeltaNet": _GATED_DELTA_NET,
    "Qwen3_5MoeGatedDeltaNet": _GATED_DELTA_NET,
    "RecurrentGemmaRecurrentBlock": MixerClass(
        (CONVOLUTION, RECURRENT_UNIT),
        hands_on=False,
        methods={"conv_1d.forward": "convolution_of_module", "rg_lru._rnn_scan": "recurrent_unit"},
    ),
    "RwkvFeedForward": MixerClass((TOKEN_SHIFT,), hands_on=False, reaches=False, methods=_SHIFTED),
    "RwkvSelfAttention": MixerClass((TOKEN_SHIFT, RWKV), hands_on=False, reaches=False, methods=_SHIFTED),
    "Zamba2MambaMixer": _MAMBA2,
}
"""The mixers of Transformers that are no attention, by the name of their class."""

TEMPERATURE = "attn_temperature_tuning"
"""Attribute of Llama 4's layers that scale queries by their position, and count it from the first token that they are given."""

WINDOWS_OF_MASKS = frozenset({"PhimoeAttention", "Qwen2MoeAttention"})
"""Attention whose window is in the mask alone, and which does not tell the attention function."""

WITHOUT_KEYWORDS = frozenset({"NemotronAttention", "StableLmAttention"})
"""Attention whose decoder layer does not hand keyword arguments on to it."""

_ROTATED = {"rotary.forward": "rotary_of_positions"}

FLA_MIXERS: Mapping[str, MixerClass] = {
    "layers.attn.Attention": MixerClass((ATTENTION, ROTARY), hands_on=False, methods=_ROTATED),
    "layers.delta_net.DeltaNet": MixerClass((DELTA_RULE,), hands_on=False),
    "layers.gated_deltanet.GatedDeltaNet": MixerClass((GATED_DELTA_RULE,), hands_on=False),
    "layers.gla.GatedLinearAttention": MixerClass((GLA,), hands_on=False),
    "layers.hgrn.HGRNAttention": MixerClass((HGRN,), hands_on=False),
    "layers.hgrn2.HGRN2Attention": MixerClass((GLA,), hands_on=False),
    "layers.kda.KimiDeltaAttention": MixerClass((KDA,), hands_on=False),
    "layers.linear_attn.LinearAttention": MixerClass((LINEAR_ATTENTION,), hands_on=False, reaches=False),
    "layers.mamba.Mamba": MixerClass(
        (CONVOLUTION, SELECTIVE_SCAN), hands_on=False, methods={"forward": "mamba_of_fla"}
    ),
    "layers.mamba2.Mamba2": MixerClass((CONVOLUTION, MAMBA2), hands_on=False, methods={"forward": "mamba2_of_fla"}),
    "layers.mla.MultiheadLatentAttention": MixerClass((ATTENTION, ROTARY), hands_on=False, methods=_ROTATED),
    "layers.multiscale_retention.MultiScaleRetention": MixerClass(
        (RETENTION, ROTARY), hands_on=False, methods=_ROTATED
    ),
    "layers.rwkv6.RWKV6Attention": MixerClass((TOKEN_SHIFT, RWKV6), hands_on=False),
    "layers.simple_gla.SimpleGatedLinearAttention": MixerClass((SIMPLE_GLA,), hands_on=False),
    "models.rwkv6.modeling_rwkv6.RWKV6FeedForward": MixerClass((TOKEN_SHIFT,), hands_on=False),
}
"""Those of flash-linear-attention, by file and class in ``fla``. Short convolutions inside of them are counted too."""

FLA_MODELS = frozenset(
    {
        "delta_net",
        "gated_deltanet",
        "gla",
        "hgrn",
        "hgrn2",
        "kda",
        "linear_attn",
        "mamba",
        "mamba2",
        "mla",
        "retnet",
        "rwkv6",
        "samba",
        "transformer",
    }
)
"""Packages of ``fla.models`` whose models mix tokens in such layers alone."""

_FLA = "fla."
_FLA_LAYERS = "fla.layers."
_SHORT_CONVOLUTION_OF_FLA = "ShortConvolution"

LAYER_TYPES = frozenset(
    {
        "attention",
        "chunked_attention",
        "conv",
        "full_attention",
        "hybrid",
        "hybrid_sliding",
        "linear_attention",
        "mamba",
        "mlp",
        "moe",
        "recurrent",
        "sliding_attention",
    }
)
"""Entries of a config's ``layer_types`` (``layers_block_type``, ``block_types``) that are understood."""

_MIXES_TOKENS = re.compile(
    r"Mamba|Mixer$|Delta|LinearAttention|ShortConv|Recurrent|Rwkv|Retention|Lightning|Indexer|Hyena|Scan"
)
_IS_NO_MIXER = re.compile(r"(Layer|Model|Block|ForCausalLM|Norm|RMSNormGated|Cache|MLP|Mlp|Embedding)$")
_ADVICE = (
    "Write an adapter for it (docs/transformers.md, longspan.parallel.register_adapter), or leave the model on one rank"
)


def is_attention(module: nn.Module) -> bool:
    """Whether a module is an attention layer of a model, by the conventions of Transformers' modeling files."""
    is_named = type(module).__name__.endswith("Attention") and hasattr(module, "config")
    return is_named and class_in_table(module) is None


def class_in_table(module: nn.Module) -> MixerClass | None:
    """What the tables say of a module's class, or of the one that it derives from (FSDP2 derives classes of its own)."""
    for base in type(module).__mro__:
        if base.__module__.startswith(_FLA):
            known = FLA_MIXERS.get(f"{base.__module__.removeprefix(_FLA)}.{base.__name__}")
            if known is None:
                continue
            has_convolution = any(type(child).__name__ == _SHORT_CONVOLUTION_OF_FLA for child in module.children())
            return replace(known, calls=(*known.calls, CONVOLUTION)) if has_convolution else known
        if base.__name__ in MIXERS:
            return MIXERS[base.__name__]
    return None


def is_of_fla(mixer: nn.Module) -> bool:
    """Whether a mixer is one of flash-linear-attention's, or derived from one."""
    return any(base.__module__.startswith(_FLA) for base in type(mixer).__mro__)


def mixers_of(backbone: nn.Module) -> dict[nn.Module, MixerClass]:
    """Every module of a model that mixes tokens.

    Raises:
        InputError: for a layer type or a class that is not known.
    """
    _check_layer_types(backbone)
    _check_fla_model(backbone)
    found: dict[nn.Module, MixerClass] = {}
    # What stands inside of a mixer is the mixer's.
    inside: list[str] = []
    for name, module in backbone.named_modules():
        kind = type(module).__name__
        known = class_in_table(module)
        if known is not None:
            found[module] = known
            inside.append(f"{name}.")
        elif is_attention(module):
            found[module] = _attention(name, module)
        elif _is_unknown_mixer(module) and not name.startswith(tuple(inside)):
            raise InputError(
                f"longspan does not know how the layer {name!r} of {type(backbone).__name__}, a {kind}, mixes tokens. {_ADVICE}"
            )
    if not found:
        raise InputError(f"{type(backbone).__name__} has no layer that mixes tokens which longspan knows. {_ADVICE}")
    return found


def _attention(name: str, module: nn.Module) -> MixerClass:
    """What is known of an attention layer. Modules inside of it are looked at, too: some have convolutions, or choose keys."""
    if not getattr(module, "is_causal", True):
        raise InputError(
            f"the layer {name!r}, a {type(module).__name__}, reads later tokens (is_causal is False), as encoders do: decoders of "
            "causal language models are supported. Set config.is_decoder, or leave use_bidirectional_attention out, where there is "
            "one; or leave the model on one rank"
        )
    switched_off = (
        (TEMPERATURE,) if getattr(module, TEMPERATURE, False) and not getattr(module, "use_rope", True) else ()
    )
    reached = not has_class(module, WITHOUT_KEYWORDS)
    return MixerClass((ATTENTION,), hands_on=reached, reaches=reached, switched_off=switched_off)


def attention_dropout_of(module: nn.Module) -> float:
    """The part of its weights that an attention layer drops in training; 0 for layers that are none."""
    dropout = getattr(module, "attention_dropout", 0.0)
    return dropout if isinstance(dropout, float) else 0.0


def has_class(module: nn.Module, names: frozenset[str]) -> bool:
    """Whether a module is of one of these classes, or derived from one (FSDP2 derives classes of its own)."""
    return any(base.__name__ in names for base in type(module).__mro__)


def _is_unknown_mixer(module: nn.Module) -> bool:
    kind = type(module).__name__
    if type(module).__module__.startswith(_FLA_LAYERS):
        return True
    if isinstance(module, nn.Conv1d):
        return max(module.kernel_size) > 1
    if isinstance(module, nn.RNNBase):
        return True
    return bool(_MIXES_TOKENS.search(kind)) and not _IS_NO_MIXER.search(kind)


def _check_layer_types(backbone: nn.Module) -> None:
    config = getattr(backbone, "config", None)
    for name in ("layer_types", "layers_block_type", "block_types"):
        unknown = sorted({*(getattr(config, name, None) or ())} - LAYER_TYPES)
        if unknown:
            raise InputError(
                f"{type(backbone).__name__} has layers of the type {', '.join(unknown)} (config.{name}), which longspan does not "
                f"know. {_ADVICE}"
            )


def _check_fla_model(backbone: nn.Module) -> None:
    """Refuse a model of flash-linear-attention that is not known to mix tokens in the layers of the table alone."""
    package = type(backbone).__module__.split(".")
    if package[:2] == ["fla", "models"] and package[2] not in FLA_MODELS:
        raise InputError(
            f"longspan does not know how {type(backbone).__name__} of flash-linear-attention mixes tokens; it knows its models "
            f"{', '.join(sorted(FLA_MODELS))}. {_ADVICE}"
        )
