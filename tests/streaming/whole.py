"""A step in segments of time beside the step in one piece: loss and every gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longspan import SequenceLayout, stream
from tests.compare import relative_error

Found = dict[str, Tensor]


def gradients_of(model: nn.Module) -> Found:
    """The gradients, by name; each must be there and not be zero throughout."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


def labels_of(tokens: Tensor, documents: Any = None) -> Tensor:
    """The token after each of all but the last, with some missing."""
    labels = SequenceLayout.local(tokens.shape[1] - 1, documents).shard_labels(tokens)
    return torch.where(labels % 7 == 3, -100, labels)


def in_one_piece(model: Any, tokens: Tensor, documents: Any = None) -> Found:
    """The loss and the gradients of a call of the model."""
    labels = labels_of(tokens, documents)
    layout = SequenceLayout.local(tokens.shape[1] - 1, documents)
    model.zero_grad(set_to_none=True)
    loss = model(tokens[:, :-1], layout=layout, labels=labels, num_valid=int((labels >= 0).sum()))
    loss.backward()
    found = {"loss": loss.detach(), **gradients_of(model)}
    assert all(bool(value.abs().max() > 0) for value in found.values())
    return found


def in_segments(model: Any, tokens: Tensor, segment_tokens: int, documents: Any = None, **options: Any) -> Found:
    """The same in segments of time."""
    layout = SequenceLayout.local(tokens.shape[1] - 1, documents)
    model.zero_grad(set_to_none=True)
    streamed = stream(model, segment_tokens, **options)
    loss = streamed.forward_backward(tokens[:, :-1], labels_of(tokens, documents), layout)
    return {"loss": loss, **gradients_of(model)}


def differences(got: Found, want: Found) -> dict[str, float]:
    assert got.keys() == want.keys()
    return {name: relative_error(got[name], want[name]) for name in want}
