"""What a model of Transformers must be, and must not do, to run in segments of time: all else is refused by its name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from longspan.errors import InputError
from longspan.integrations.transformers import mixers
from longspan.integrations.transformers.model import ParallelModel, state_of
from longspan.integrations.transformers.structure import virtual_tokens_of

_WITH_RANDOM_STATE = ("cpu", "cuda")
"""Types of devices whose random state both passes over a segment begin with."""


def callable_part(model: nn.Module) -> nn.Module:
    """What is called for each segment: the model with what PEFT and FSDP2 put around it, and not compiled.

    Raises:
        InputError: for DistributedDataParallel, and PEFT's virtual tokens.
    """
    while isinstance(inside := getattr(model, "_orig_mod", None), nn.Module):
        model = inside
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise InputError(
            "stream(): DistributedDataParallel sums gradients in the backward of one forward, and a segment of time has its own. "
            "Pass the module inside (model.module), and sum gradients with longspan.sum_gradients()"
        )
    virtual = virtual_tokens_of(model)
    if virtual is not None:
        raise InputError(
            f"stream(): {virtual} puts virtual tokens before those of each call, and every segment of time would "
            "have them. Train adapters on layers, such as peft.LoraConfig, or whole sequences"
        )
    return model


def checked_state(model: nn.Module) -> ParallelModel:
    """What longspan keeps for a model that runs in segments.

    Raises:
        InputError: for a model that is not parallelized, a backbone without a head, layers whose memory is not handed on, or that
            read later tokens.
    """
    state = state_of(model)
    if state is None:
        raise InputError(
            f"stream() takes a model of Hugging Face Transformers that was given to longspan.parallelize(); got a "
            f"{type(model).__name__}, which was not. Call longspan.parallelize(model, group) first; a group of one rank is enough"
        )
    if state.head is state.backbone:
        name = type(state.head).__name__
        raise InputError(
            f"stream(): {name} has no head, so that it has no loss. Parallelize the ForCausalLM model that has one"
        )
    for mixer in state.mixers:
        kind = type(mixer).__name__
        if mixers.is_of_fla(mixer):
            raise InputError(
                f"stream(): {kind} of flash-linear-attention does not hand what it remembers from one segment of time to the next. "
                "Train the model on whole sequences, over ranks where they are too long for one"
            )
        if not getattr(mixer, "is_causal", True):
            raise InputError(
                f"stream(): {kind} reads later tokens, which a segment of time does not have. Train the model on whole sequences"
            )
    return state


def check_before_sequence(state: ParallelModel, tokens: Tensor) -> None:
    """Refuse what may have been set in a model since, and would make its gradients others than those of one piece.

    Raises:
        InputError: for layers that are recomputed by reentrant checkpointing, or with other random numbers; dropout on devices
            whose random state is not restored; NEFTune's noise.
    """
    name, dropouts = type(state.head).__name__, _dropouts(state.head)
    for options in _checkpointing_options(state.backbone):
        if options.get("use_reentrant"):
            raise InputError(
                f"stream(): {name} recomputes its layers by reentrant checkpointing, which gives what a segment leaves to the next "
                "no gradient. Call gradient_checkpointing_enable({'use_reentrant': False}), or leave checkpointing out: the "
                "activations of one segment alone are held"
            )
        if dropouts and options.get("preserve_rng_state") is False:
            raise InputError(
                f"stream(): {name} has dropout ({dropouts}), and recomputes its layers with other random numbers "
                "(preserve_rng_state=False). Leave preserve_rng_state out"
            )
    if dropouts:
        _check_random_state(state.head, tokens.device, dropouts)
    head: Any = state.head
    if head.training and getattr(head.get_input_embeddings(), "neftune_noise_alpha", None) is not None:
        raise InputError(
            f"stream(): the noise of NEFTune in {name} depends on how many tokens a call has, and a segment of time has fewer than "
            "the sequence. Remove its hook and neftune_noise_alpha from the embeddings"
        )


def _checkpointing_options(backbone: nn.Module) -> list[dict[str, Any]]:
    """The options of each checkpointing function that is in use."""
    found = []
    for module in backbone.modules():
        function: Any = module.__dict__.get("_gradient_checkpointing_func")
        function = getattr(function, "checkpoint", function)
        if getattr(module, "gradient_checkpointing", False):
            found.append(getattr(function, "keywords", {}))
    return found


def _dropouts(head: nn.Module) -> str:
    """The kinds of modules that drop numbers now."""
    drops = (m for m in head.modules() if isinstance(m, _DropoutNd) and m.training and m.p > 0)
    return ", ".join(sorted({type(module).__name__ for module in drops}))


def _check_random_state(head: nn.Module, device: torch.device, dropouts: str) -> None:
    """Refuse devices other than the CPU and that of the tokens, if it is a GPU."""
    used = {parameter.device for parameter in head.parameters()} | {device}
    known = {torch.device("cpu"), *([device] if device.type in _WITH_RANDOM_STATE else [])}
    others = ", ".join(sorted(map(str, used - known)))
    if others:
        raise InputError(
            f"stream(): {type(head).__name__} has dropout ({dropouts}) and is on {others}, beside tokens on {device}: the random "
            "state there is not restored, so that the second pass over a segment would drop other numbers. Set dropout to 0, or "
            "keep the model on the device of the tokens, the CPU or a CUDA GPU"
        )
