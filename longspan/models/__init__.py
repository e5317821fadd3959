"""Models whose files are single-device; `longspan.parallelize` splits their sequences over ranks from outside."""

from longspan.models.config import LinearLlama3Config
from longspan.models.counts import flops_per_token, num_active_parameters, num_parameters
from longspan.models.decoding import Decodable, Sampling, decode, generate, prefill
from longspan.models.linear_llama3 import LinearLlama3
from longspan.models.memory import ModelMemory
from longspan.models.mixers import MIXERS
from longspan.models.presets import PRESETS, preset
from longspan.models.routing import Routing
from longspan.ops.chunked.scores import TokenScores

__all__ = [
    "MIXERS",
    "PRESETS",
    "Decodable",
    "LinearLlama3",
    "LinearLlama3Config",
    "ModelMemory",
    "Routing",
    "Sampling",
    "TokenScores",
    "decode",
    "flops_per_token",
    "generate",
    "num_active_parameters",
    "num_parameters",
    "prefill",
    "preset",
]
