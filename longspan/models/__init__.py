"""Models whose files are single-device; `longspan.parallelize` splits their sequences over ranks from outside."""

from longspan.models.config import LinearLlama3Config
from longspan.models.linear_llama3 import Cache, LinearLlama3

__all__ = ["Cache", "LinearLlama3", "LinearLlama3Config"]
