"""A Llama made into a Linear-Llama3: `read_llama` says what a folder holds, `convert` makes the model, and a list."""

from longspan.models.conversion.llama import Llama, read_llama
from longspan.models.conversion.mapping import Converted, convert
from longspan.models.conversion.recipes import RECIPES

__all__ = ["RECIPES", "Converted", "Llama", "convert", "read_llama"]
