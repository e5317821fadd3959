"""What `LinearLlamaForCausalLM` is called with beside what it names: known, or refused."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from longspan.checks import described
from longspan.errors import InputError
from longspan.models.hf.batches import IGNORED, shifted

_IMPLIED = ("cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""What collators say of packed documents beside ``cu_seq_lens_q`` or ``position_ids``, which say it all."""


def tokens_of(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """The tokens of a call, int64 ``[B, N]``; raises InputError for anything else."""
    if inputs_embeds is not None:
        raise InputError("inputs_embeds are not supported: the model takes token ids. Pass input_ids")
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        raise InputError(f"input_ids must be int64 [B, N]; got {described(input_ids)}. Pass what the tokenizer returns")
    check_some(input_ids)
    return input_ids.long()


def check_some(input_ids: object) -> None:
    """Raise InputError for tokens of which there are none."""
    if isinstance(input_ids, Tensor) and not input_ids.numel():
        raise InputError(
            f"input_ids must have at least one row and token; got {described(input_ids)}. Begin with the token that ends a document"
        )


def check_arguments(given: dict[str, Any], has_positions: bool) -> None:
    """Raise InputError for keyword arguments that are not known, or would say something that nothing else says."""
    known = ("num_items_in_batch", "shift_labels", "cu_seq_lens_q", "output_attentions", *_IMPLIED)
    if given.get("output_attentions"):
        raise InputError(
            "output_attentions=True: linear layers have no attention weights, and softmax layers form none. Leave it out"
        )
    said = sorted(name for name in _IMPLIED if given.get(name) is not None)
    if said and given.get("cu_seq_lens_q") is None and not has_positions:
        raise InputError(
            f"{', '.join(said)} alone do not say where packed documents start. Pass position_ids that restart, or cu_seq_lens_q"
        )
    unknown = sorted(name for name, value in given.items() if name not in known and value is not None)
    if unknown:
        raise InputError(
            f"LinearLlamaForCausalLM takes no {', '.join(unknown)}. Leave that out"
            + (": return_token_type_ids=False" if "token_type_ids" in unknown else "")
        )


def check_labels(labels: object, tokens: Tensor) -> None:
    """Raise InputError unless there is one label for each token."""
    if not isinstance(labels, Tensor) or labels.shape != tokens.shape or labels.is_floating_point():
        raise InputError(
            f"labels must be one for each token, int64 {tuple(tokens.shape)}, not shifted; got {described(labels)}. Pass "
            "input_ids, with -100 where none counts"
        )


def check_counted(labels: Tensor, targets: Tensor) -> None:
    """Raise InputError where labels that another has counted are predicted by no token of their row or document.

    targets: what tokens predict, ``[B, N]``.
    """
    if bool(((shifted(labels) != IGNORED) & (targets == IGNORED)).any()):
        raise InputError(
            "num_items_in_batch counts labels that no token predicts, and the loss would be too small: those of padding, or of "
            "the first token of a row behind padding, or of a packed document. Set them to -100, as DataCollatorWithFlattening "
            "does, or pad on the right"
        )
