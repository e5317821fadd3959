"""What mixes the tokens of a model: the interface, and one file for each kind. A new one is a file and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longspan.models.mixers.based import BasedMixer
from longspan.models.mixers.chela import CHELAMixer
from longspan.models.mixers.deltanet import DeltaNetMixer
from longspan.models.mixers.deltaproduct import DeltaProductMixer
from longspan.models.mixers.gated_deltanet import GatedDeltaNetMixer
from longspan.models.mixers.gla import GLAMixer
from longspan.models.mixers.gsa import GSAMixer
from longspan.models.mixers.hgrn2 import HGRN2Mixer
from longspan.models.mixers.kda import KDAMixer
from longspan.models.mixers.layer import LayerMixer
from longspan.models.mixers.lightning import LightningMixer
from longspan.models.mixers.linear_attention import LinearAttentionMixer
from longspan.models.mixers.mamba import MambaMixer
from longspan.models.mixers.mamba2 import Mamba2Mixer
from longspan.models.mixers.mixer import Context, LayerMemory, ParallelOptions, SequenceMixer, SequenceParallel
from longspan.models.mixers.rebased import RebasedMixer
from longspan.models.mixers.retention import RetentionMixer
from longspan.models.mixers.rwkv7 import RWKV7Mixer
from longspan.models.mixers.simple_gla import SimpleGLAMixer
from longspan.models.mixers.softmax import SoftmaxMixer

if TYPE_CHECKING:
    from longspan.models.config import LinearLlama3Config

MIXERS: dict[str, type[LayerMixer]] = {
    mixer.name: mixer
    for mixer in (
        LinearAttentionMixer,
        LightningMixer,
        RetentionMixer,
        SimpleGLAMixer,
        GLAMixer,
        GSAMixer,
        BasedMixer,
        RebasedMixer,
        HGRN2Mixer,
        MambaMixer,
        Mamba2Mixer,
        DeltaNetMixer,
        GatedDeltaNetMixer,
        DeltaProductMixer,
        RWKV7Mixer,
        KDAMixer,
        CHELAMixer,
        SoftmaxMixer,
    )
}
"""What a layer of a config can be, by the names that its `operator` and `pattern` take; ``"softmax"`` is the N of a pattern."""

__all__ = [
    "MIXERS",
    "Context",
    "LayerMemory",
    "LayerMixer",
    "ParallelOptions",
    "SequenceMixer",
    "SequenceParallel",
    "build_mixer",
]


def build_mixer(config: LinearLlama3Config, layer: int) -> LayerMixer:
    """The mixer of a layer, by the layer's number."""
    return MIXERS[config.layer_operators[layer]](config, layer)
