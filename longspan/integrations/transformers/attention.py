"""Softmax attention of Transformers' models over ranks: the function registered with its attention interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longspan.attention.softmax import softmax_attention
from longspan.errors import InputError
from longspan.integrations.transformers.call import CALL, RUNNING, ParallelCall
from longspan.integrations.transformers.mixers import ATTENTION, TEMPERATURE, WINDOWS_OF_MASKS, has_class
from longspan.layout import SequenceLayout

ATTENTION_NAME = "longspan"
"""Under which the function is registered, and what ``config._attn_implementation`` says in a parallelized model.

No mask function is registered under this name, so that models build no mask at all: causality, windows and documents are the
layout's and the operator's.
"""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of this rank's queries to all ranks' keys.

    Args:
        module: the attention layer.
        query, key, value: ``[B, H, T, D]``, ``[B, H_kv, T, D]``, ``[B, H_kv, T, D_v]``, positions encoded.
        attention_mask: None; there is no mask under this implementation.
        scaling: of the scores. sliding_window: how many tokens a query sees, itself included.
        softcap: scores become softcap · tanh(scores / softcap). s_aux, sinks: ``[H]``, logits of a token that every query sees and
            that has no value. is_causal: as in the layer where None. indices, block_indices: keys that an indexer has chosen.

    Returns:
        ``[B, T, H, D_v]``, and None for the weights, which are never formed.

    Raises:
        InputError: for what is not supported over ranks: dropout, a mask, a position bias, keys chosen by an indexer.
        RuntimeError: where no layout reached the layer.
    """
    name = type(module).__name__
    call: ParallelCall | None = kwargs.get(CALL) or RUNNING.get()
    if call is None:
        raise RuntimeError(
            f"{name} uses the attention implementation {ATTENTION_NAME!r} outside of a parallelized model's forward. Call the "
            "model that was given to longspan.parallelize(), or set_attn_implementation('sdpa') on this one"
        )
    refused = {
        "a mask that is not causal": (
            attention_mask is not None,
            "Pack documents or pad on the right instead of masking",
        ),
        f"attention dropout {dropout}": (bool(dropout), "Set attention_dropout to 0 in the config"),
        "a position bias": (position_bias is not None, "Leave the model on one rank"),
        "a choice of keys by an indexer": (
            indices is not None or block_indices is not None,
            "Leave the model on one rank",
        ),
    }
    for what, (is_given, advice) in refused.items():
        if is_given:
            raise InputError(f"{name}: {what} is not supported over ranks. {advice}")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = _window_of(module) if sliding_window is None else sliding_window
    q, k, v = (t.transpose(1, 2) for t in (_scaled_by_position(module, query, call.layout), key, value))
    layout = _layout_of(module, call.layout)
    earlier = None if call.segment is None else call.segment.earlier
    out = softmax_attention(
        q,
        k,
        v,
        causal=causal,
        window=window,
        scale=q.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        sinks=s_aux if sinks is None else sinks,
        earlier=earlier,
        layout=layout,
        method=call.options.softmax_method,
    )
    call.take(ATTENTION, module)
    if call.segment is not None and earlier is not None and call.segment.keeps:
        # Chunks start anew, so that what is seen of earlier tokens is less than a chunk.
        config: Any = module.config
        seen = window if layout is call.layout else config.attention_chunk_size
        call.segment.keep_keys(earlier.followed_by(k, v, call.layout, window=seen))
    return out, None


def register() -> None:
    """Make the function known to Transformers; once is enough."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if ATTENTION_NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, attention)


def _window_of(module: nn.Module) -> int | None:
    """How many tokens a query sees in a layer whose mask alone would say so; None where it sees all."""
    if not has_class(module, WINDOWS_OF_MASKS):
        return None
    config: Any = module.config
    types, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    is_full = types is not None and index is not None and types[index] != "sliding_attention"
    window: int | None = None if is_full else config.sliding_window
    return window


def _scaled_by_position(module: nn.Module, query: Tensor, layout: SequenceLayout) -> Tensor:
    """Queries ``[B, H, T, D]`` times Llama 4's temperature of their position in the document, in layers without rotary embeddings.

    The layer itself counts from the first token that it is given, which is right for whole sequences alone (`switched_off`).
    """
    config: Any = getattr(module, "config", None)
    if not getattr(config, TEMPERATURE, False) or getattr(module, "use_rope", True):
        return query
    layer: Any = module
    positions = layout.document_positions_on(query.device).float()
    scales = torch.log1p(torch.floor((positions + 1.0) / layer.floor_scale)) * layer.attn_scale + 1.0
    return (query * scales[:, None]).to(query.dtype)


def _layout_of(module: nn.Module, layout: SequenceLayout) -> SequenceLayout:
    """Chunked attention is attention inside chunks of each document."""
    config: Any = getattr(module, "config", None)
    types, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if types is None or index is None or types[index] != "chunked_attention":
        return layout
    return layout.chunked(config.attention_chunk_size)
