"""What mixes the tokens of a model: the interface and one file for each kind."""

from __future__ import annotations

from longspan.models.config import LinearLlama3Config
from longspan.models.mixers.linear import LinearMixer
from longspan.models.mixers.mixer import Context, LayerMemory, ParallelOptions, SequenceMixer, SequenceParallel
from longspan.models.mixers.softmax import SoftmaxMixer

__all__ = [
    "Context",
    "LayerMemory",
    "LinearMixer",
    "ParallelOptions",
    "SequenceMixer",
    "SequenceParallel",
    "SoftmaxMixer",
    "build_mixer",
]


def build_mixer(config: LinearLlama3Config, operator: str) -> SequenceMixer:
    """The mixer of a layer, by its operator."""
    return SoftmaxMixer(config) if operator == "softmax" else LinearMixer(config, operator)
