"""Linear-Llama3 as classes of Hugging Face Transformers, which is imported here alone. See docs/hugging_face_models.md.

Importing this registers them: ``AutoConfig`` and ``AutoModelForCausalLM`` then know `model_type` ``"linear_llama3"``.
"""

from longspan.models.hf.auto import register
from longspan.models.hf.cache import LinearLlamaCache
from longspan.models.hf.configuration import LinearLlamaConfig
from longspan.models.hf.modeling import LinearLlamaForCausalLM

__all__ = ["LinearLlamaCache", "LinearLlamaConfig", "LinearLlamaForCausalLM", "register"]

register()
