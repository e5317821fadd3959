"""Where the parts of a Transformers model are, and which models can be parallelized."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from torch import nn

from longspan.errors import InputError
from longspan.integrations.transformers import losses, mixers
from longspan.integrations.transformers.versions import warn_of_untested
from longspan.models.mixers import SequenceMixer

_MODELING_FILES = ("transformers.models.", "fla.layers.", "fla.models.", "fla.modules.")
_BY_CLASS = re.compile(r"(ForCausalLM|LMHeadModel)$")
_CROSS_ATTENTION = re.compile(r"cross_?att(ention|n)|encoder_att(ention|n)")
"""Names of layers that attend to another sequence."""
_COUNTS_FROM_PADDING = "create_position_ids_from_input_ids"
"""A method of embeddings that number tokens behind the padding token's own number."""


def is_transformers_model(model: nn.Module) -> bool:
    """Whether a model is Transformers', or PEFT's around one; Transformers is not imported for the answer."""
    return any(
        base.__module__.startswith("transformers.") and base.__name__ == "PreTrainedModel"
        for base in type(head_of(model)).__mro__
    )


def is_of_fla(head: nn.Module) -> bool:
    """Whether a model is one of flash-linear-attention's, or derived from one."""
    return any(base.__module__.startswith("fla.models.") for base in type(head).__mro__)


def head_of(model: nn.Module) -> nn.Module:
    """The Transformers model inside what PEFT, DistributedDataParallel and torch.compile put around it."""
    *_, head = _from_outside(model)
    return head


def virtual_tokens_of(model: nn.Module) -> str | None:
    """The class of PEFT's config that puts virtual tokens before those of each call of a model, or None."""
    for wrapper in _from_outside(model):
        config: Any = getattr(wrapper, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            return type(config).__name__
    return None


def _from_outside(model: nn.Module) -> Iterator[nn.Module]:
    """A model, and what is inside of each wrapping, down to the Transformers model."""
    while True:
        yield model
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif callable(getattr(model, "get_base_model", None)):
            wrapper: Any = model
            model = wrapper.get_base_model()
        else:
            return


def backbone_of(head: nn.Module) -> nn.Module:
    """The module of a model that turns tokens into hidden states; the model itself where it has no head."""
    model: Any = head
    backbone: nn.Module = model.base_model
    if backbone is not head:
        # Some heads call the decoder inside of it, and not the backbone itself.
        decoder = getattr(backbone, "decoder", None)
        return decoder if isinstance(decoder, nn.Module) and hasattr(decoder, "base_model_prefix") else backbone
    if not _has_head(head):
        return backbone
    # Some classes name their backbone otherwise than base_model_prefix says.
    found = [child for child in head.children() if hasattr(child, "base_model_prefix")]
    if len(found) != 1:
        raise InputError(f"longspan finds no backbone of {type(head).__name__}: parallelize it alone, as model.model")
    return found[0]


def _has_head(head: nn.Module) -> bool:
    """Whether a model's class is one of causal language models, whose head looks at each token alone."""
    return any(_BY_CLASS.search(base.__name__) for base in type(head).__mro__)


def check_model(head: nn.Module) -> None:
    """Refuse a model that would be silently wrong over ranks, or that the hooks do not reach.

    Raises:
        InputError: for encoders with decoders, attention to another sequence, heads that look at other tokens, ALiBi, positions
            that are counted from a padding token, PEFT's activated LoRA, and attention that does not ask Transformers' attention
            interface.
    """
    warn_of_untested("transformers")
    config: Any = head.config
    name = type(head).__name__
    if any(isinstance(module, SequenceMixer) for module in head.modules()):
        raise InputError(
            f"{name} has layers of this library, which take a layout by themselves: give it to longspan.parallelize(model, group), "
            "and sum its gradients with longspan.sum_gradients. Trainer over ranks (prepare_trainer) is for models of others; "
            "longspan train trains such models over ranks"
        )
    if is_of_fla(head):
        warn_of_untested("fla")
        if getattr(config, "use_l2warp", False):
            raise InputError(
                f"{name} adds a penalty to the gradient of its logits that depends on how many tokens a call has, which is not "
                "supported over ranks. Set config.use_l2warp to False"
            )
    backbone = backbone_of(head)
    if config.is_encoder_decoder:
        raise InputError(f"{name} is an encoder with a decoder; decoders of causal language models are supported")
    if head is not backbone and not _has_head(head):
        raise InputError(
            f"{name} has a head that longspan does not know: it may need tokens of other ranks. Parallelize a ForCausalLM "
            "model, or the backbone alone (model.model), whose hidden states are this rank's"
        )
    for path, module in backbone.named_modules():
        if _CROSS_ATTENTION.fullmatch(path.rpartition(".")[2]):
            raise InputError(
                f"{name} attends to another sequence, in {path!r}, a {type(module).__name__}; one causal sequence is supported. "
                "Build the model without cross attention (config.add_cross_attention=False), where its class can be"
            )
    if _adds_alibi(config):
        raise InputError(
            f"{name} adds a position bias (ALiBi) to its scores, which is not supported over ranks. Leave the model on one rank"
        )
    for path, module in backbone.named_modules():
        if hasattr(module, _COUNTS_FROM_PADDING):
            raise InputError(
                f"{path!r} of {name}, a {type(module).__name__}, counts positions from its padding token on, as encoders do that "
                "serve as decoders; the positions of a rank's tokens would be others. Leave the model on one rank"
            )
    for adapter, options in getattr(head, "peft_config", {}).items():
        if getattr(options, "alora_invocation_tokens", None):
            raise InputError(
                f"the adapter {adapter!r} of {name} is an activated LoRA, which begins at certain tokens of a whole sequence; "
                "layers over ranks see their own. Take a LoRA without alora_invocation_tokens"
            )
    has_attention = any(mixers.is_attention(module) for module in backbone.modules())
    if has_attention and not type(head)._can_set_attn_implementation():  # type: ignore[attr-defined]
        raise InputError(
            f"{name}'s attention does not ask Transformers' attention interface, where longspan answers. "
            "Write an adapter for it (docs/transformers.md)"
        )


def _adds_alibi(config: Any) -> bool:
    """Whether a model's scores have a bias by distance, as its config says; Bloom's does not say, and has one."""
    options = getattr(config, "attn_config", None)
    return config.model_type == "bloom" or bool(getattr(config, "alibi", False) or getattr(options, "alibi", False))


def arguments_by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments by name."""
    signature = inspect.signature(type(module).forward)
    given = dict(signature.bind(module, *args, **kwargs).arguments)
    given.pop("self", None)
    others = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    extra = given.pop(others[0], {}) if others else {}
    return {**given, **extra}


def modeling_files_of(head: nn.Module) -> set[str]:
    """Names of the modules of Transformers and flash-linear-attention that the model's classes come from."""
    classes = {base for module in head.modules() for base in type(module).__mro__}
    files = {base.__module__ for base in classes if base.__module__.startswith(_MODELING_FILES)}
    if any(hasattr(sys.modules[file], losses.BALANCE_LOSS) for file in files):
        # TRL takes the balance loss of every family from this one.
        files.add(import_module("transformers.models.mixtral.modeling_mixtral").__name__)
    return files


def owner_of(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The submodule that has what a dotted path ends with, and its name there."""
    *parents, name = path.split(".")
    return module.get_submodule(".".join(parents)), name
