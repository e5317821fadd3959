"""A `LinearLlama3` made of a Llama's weights, and the list of what became of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from longspan.errors import ConfigError
from longspan.models.block import HybridBlock
from longspan.models.config import LinearLlama3Config
from longspan.models.conversion.llama import Llama, llama_name
from longspan.models.conversion.recipes import RECIPES, Attention
from longspan.models.linear_llama3 import LinearLlama3
from longspan.models.mixers.softmax import SoftmaxMixer
from longspan.models.weights import Weights, as_float32


@dataclass(frozen=True)
class MappedTensor:
    """What became of a tensor: name and shape of the new one, those of Llama that it was made of, how, and of how many numbers."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    how: str
    num_taken: int

    @property
    def num_parameters(self) -> int:
        """Numbers of the tensor."""
        return torch.Size(self.shape).numel()

    @property
    def num_new(self) -> int:
        """Numbers that no weight of the Llama decided."""
        return self.num_parameters - self.num_taken


@dataclass(frozen=True)
class Converted:
    """A model made of a Llama.

    model: float32, on the CPU. teachers: the Llama's own attention of each L layer, by the layer's number, for attention
    transfer. tensors: what was made of what.
    """

    model: LinearLlama3
    teachers: dict[int, SoftmaxMixer]
    tensors: tuple[MappedTensor, ...]


def convert(llama: Llama, weights: Weights, config: LinearLlama3Config, seed: int = 0) -> Converted:
    """Make a model of a Llama's weights.

    Args:
        llama: of the folder of `weights`.
        weights: its tensors, float32, bfloat16 or float16.
        config: `llama.config` with another `pattern`, `operator` or `window`.
        seed: of the weights that are drawn.

    Raises:
        CheckpointError: for missing, extra or misshapen tensors, all of them listed, and for those of another dtype.
        ConfigError: for a mixer that has no entry in `RECIPES`.
    """
    unknown = sorted(set(config.layer_operators) - {*RECIPES, "softmax"})
    if unknown:
        raise ConfigError(
            f"there is no way from softmax attention to {', '.join(unknown)}; there is to {', '.join(RECIPES)}. Take one of these"
        )
    llama.check(weights)
    with torch.random.fork_rng(devices=[]):
        model = LinearLlama3(config)
    model.init_weights(seed)
    mapped: list[MappedTensor] = []
    teachers: dict[int, SoftmaxMixer] = {}
    own = dict(model.named_parameters())
    for name, parameter in own.items():
        if not _is_in_linear_layer(name, config):
            source = llama_name(name)
            _set(parameter, as_float32(source, weights.read(source)))
            mapped.append(MappedTensor(name, tuple(parameter.shape), (source,), "copied", parameter.numel()))
    for layer, operator in enumerate(config.layer_operators):
        if operator != "softmax":
            block = cast(HybridBlock, model.blocks[layer])
            teacher = _attention_of(llama, weights, layer)
            teachers[layer] = teacher
            mapped += _map_mixer(operator, block, layer, teacher)
    for name, parameter in model.shared.named_parameters(prefix="shared"):
        mapped.append(MappedTensor(name, tuple(parameter.shape), (), "new: the mixer's own", 0))
    order = {name: number for number, name in enumerate(own)}
    return Converted(model, teachers, tuple(sorted(mapped, key=lambda tensor: order[tensor.name])))


def _is_in_linear_layer(name: str, config: LinearLlama3Config) -> bool:
    """Whether a parameter is of the mixer of an L layer, or of what L layers share."""
    parts = name.split(".")
    if parts[0] == "shared":
        return True
    return parts[0] == "blocks" and parts[2] == "mixer" and config.layer_operators[int(parts[1])] != "softmax"


def _attention_of(llama: Llama, weights: Weights, layer: int) -> SoftmaxMixer:
    """A layer's attention as the Llama has it, frozen."""
    with torch.random.fork_rng(devices=[]):
        teacher = SoftmaxMixer(llama.config, layer)
    for name, parameter in teacher.named_parameters():
        source = llama_name(f"blocks.{layer}.mixer.{name}")
        _set(parameter, as_float32(source, weights.read(source)))
    return teacher.requires_grad_(False)


def _map_mixer(operator: str, block: HybridBlock, layer: int, teacher: SoftmaxMixer) -> Iterator[MappedTensor]:
    q, k, v, o = (
        projection.weight.detach() for projection in (teacher.q_proj, teacher.k_proj, teacher.v_proj, teacher.out_proj)
    )
    heads = (-1, teacher.head_dim)
    q, k, v = (part.unflatten(0, heads) for part in (q, k, v))
    attention = Attention(q, k, v, o.unflatten(1, heads), block.mixer_norm.weight.detach())
    recipe = RECIPES[operator]
    for name, parameter in block.mixer.named_parameters():
        whole = f"blocks.{layer}.mixer.{name}"
        if name not in recipe:
            yield MappedTensor(whole, tuple(parameter.shape), (), "new: the mixer's own", 0)
            continue
        made = recipe[name](attention, parameter.detach())
        _set(parameter, made.tensor)
        sources = tuple(f"model.layers.{layer}.self_attn.{source}.weight" for source in made.sources)
        yield MappedTensor(whole, tuple(parameter.shape), sources, made.how, made.num_taken)


@torch.no_grad()
def _set(parameter: Tensor, value: Tensor) -> None:
    assert parameter.shape == value.shape, (parameter.shape, value.shape)
    parameter.copy_(value)
