"""How `LinearLlamaForCausalLM.from_pretrained` may load, and that every tensor was there."""

from __future__ import annotations

from typing import Any

from longspan.errors import CheckpointError, InputError
from longspan.models.weights import listed_differences, refuse_pickled_folder


def check_how_to_load(path: Any, given: dict[str, Any]) -> None:
    """Raise for pickled weights (CheckpointError), and for arguments that ask for them or for other tensors (InputError)."""
    if given.get("ignore_mismatched_sizes"):
        raise InputError(
            "ignore_mismatched_sizes=True would draw tensors anew that do not fit. Leave it out; resize_token_embeddings "
            "changes the vocabulary of a model that was loaded"
        )
    if given.get("use_safetensors") is False:
        raise InputError(
            "use_safetensors=False asks for pickled weights, and reading those can run any code. Leave it out"
        )
    if path is not None:
        refuse_pickled_folder(path, given.get("subfolder", ""))


def check_loaded(path: Any, info: dict[str, Any]) -> None:
    """Raise CheckpointError unless every tensor of the model was in the files, and nothing else was."""
    found: dict[str, tuple[int, ...]] = {name: tuple(there) for name, there, _ in info["mismatched_keys"]}
    wanted: dict[str, tuple[int, ...]] = {name: tuple(here) for name, _, here in info["mismatched_keys"]}
    lines = listed_differences(found, wanted)
    lines += [f"{name}: missing there" for name in sorted(info["missing_keys"])]
    lines += [f"{name}: there, and not of this model" for name in sorted(info["unexpected_keys"])]
    if lines:
        raise CheckpointError(
            f"the weights in {path} are not those of this model, {len(lines)} differ:\n  "
            + "\n  ".join(lines)
            + "\nGive the weights and the config.json that were saved together"
        )
