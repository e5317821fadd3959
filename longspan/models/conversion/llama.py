"""What a folder of a Llama says of it: its config as one of this library's, all of its layers softmax attention, and its names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longspan.errors import CheckpointError, ConfigError
from longspan.models.config import LinearLlama3Config
from longspan.models.linear_llama3 import LinearLlama3
from longspan.models.rope_parameters import rope_faults, rope_fields
from longspan.models.weights import Weights, check_shapes, shapes_of

_ARCHITECTURE, _MODEL_TYPE = "LlamaForCausalLM", "llama"
_THETA = 10_000.0
"""rope_theta of a config.json that says none, as in Llama 1 and 2."""

_OWN_NAMES = {
    "embedding.": "model.embed_tokens.",
    "norm.": "model.norm.",
    "head.": "lm_head.",
}
_IN_BLOCK = {
    "mixer_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "mixer.out_proj": "self_attn.o_proj",
    "mixer": "self_attn",
    "feed_forward": "mlp",
}
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_TABLES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Angles of the rotary embedding, which files of Llama 1 and 2 hold, and rope_theta says."""


@dataclass(frozen=True)
class Llama:
    """A Llama that a folder holds.

    config: with all layers softmax attention, it computes what the Llama computes. length: tokens of the sequences that it was
    trained on, or None. end: the token that ends a text, or None.
    """

    path: Path
    config: LinearLlama3Config
    length: int | None
    end: int | None

    def check(self, weights: Weights) -> None:
        """Raise CheckpointError, with every difference, unless these are this model's weights, all of them and no others."""
        found = {name: shape for name, shape in weights.shapes.items() if not _TABLES.fullmatch(name)}
        if self.config.tie_embeddings and _is_copy(weights):
            del found[_HEAD]
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            own = shapes_of(LinearLlama3(self.config))
        wanted = {llama_name(name): shape for name, shape in own.items()}
        check_shapes(
            f"the weights in {self.path}",
            found,
            wanted,
            "Give the weights and the config.json that were saved together",
        )


def llama_name(name: str) -> str:
    """What Llama calls a parameter that a `LinearLlama3` has outside its L layers."""
    for own, theirs in _OWN_NAMES.items():
        if name.startswith(own):
            return theirs + name.removeprefix(own)
    _, number, within = name.split(".", 2)
    for own, theirs in _IN_BLOCK.items():
        if within.startswith(f"{own}."):
            return f"model.layers.{number}.{theirs}.{within.removeprefix(f'{own}.')}"
    raise ValueError(f"no parameter of a block: {name}")


def read_llama(folder: Path) -> Llama:
    """What the ``config.json`` of a folder says.

    Raises:
        CheckpointError: for what is no config, another architecture, or a Llama with something that a `LinearLlama3` has not, all
            of it listed.
    """
    path = folder / "config.json"
    remedy = "Give the folder of a Llama as save_pretrained of Transformers writes it"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. {remedy}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise CheckpointError(f"{path} does not say what model this is. {remedy}")
    _check_architecture(path, values)
    odd = list(_what_differs(values))
    if odd:
        raise CheckpointError(
            f"{path} describes a Llama with what Linear-Llama3 has not; {len(odd)} differ:\n  "
            + "\n  ".join(odd)
            + "\nThis one cannot be converted"
        )
    try:
        config = LinearLlama3Config(
            vocab_size=values["vocab_size"],
            dim=values["hidden_size"],
            num_layers=values["num_hidden_layers"],
            pattern="N",
            num_heads=values["num_attention_heads"],
            num_kv_heads=values.get("num_key_value_heads") or values["num_attention_heads"],
            head_dim=values.get("head_dim"),
            hidden_dim=values["intermediate_size"],
            norm_eps=float(values.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(values.get("tie_word_embeddings", False)),
            **{"rope_theta": _THETA, **rope_fields(values)},
        )
    except KeyError as error:
        raise CheckpointError(f"{path} does not say {error}. {remedy}") from error
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} describes no model: {error}. {remedy}") from error
    end = values.get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    length = values.get("max_position_embeddings")
    return Llama(folder, config, length if isinstance(length, int) else None, end if isinstance(end, int) else None)


def _check_architecture(path: Path, values: Mapping[str, Any]) -> None:
    found = values.get("architectures") or [_ARCHITECTURE]
    if values["model_type"] != _MODEL_TYPE or _ARCHITECTURE not in found:
        raise CheckpointError(
            f"{path} is of the architecture {', '.join(map(str, found))} (model_type {values['model_type']!r}), and what is "
            f"converted is {_ARCHITECTURE} (model_type {_MODEL_TYPE!r}). Give the folder of a Llama"
        )


def _what_differs(values: Mapping[str, Any]) -> list[str]:
    """A line for each thing that makes this Llama compute something else than Llama 3's block."""
    lines = [
        f"{name} is {values[name]!r}: the layers of Linear-Llama3 have no biases"
        for name in ("attention_bias", "mlp_bias")
        if values.get(name)
    ]
    activation = values.get("hidden_act", "silu")
    if activation != "silu":
        lines.append(f"hidden_act is {activation!r}: feed-forward layers have 'silu'")
    lines += rope_faults(values)
    if values.get("quantization_config"):
        lines.append(
            "quantization_config: weights are numbers of 16 or 32 bits. Save the model before it was quantized"
        )
    return lines


def _is_copy(weights: Weights) -> bool:
    """Whether a head is there that the embedding is, too."""
    both = _HEAD in weights.shapes and _EMBEDDING in weights.shapes
    return both and torch.equal(weights.read(_HEAD), weights.read(_EMBEDDING))
