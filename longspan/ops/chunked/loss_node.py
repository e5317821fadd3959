"""The sum of the losses of a head, with its gradients, a chunk of tokens at a time, as a node of autograd: `sum_of_losses`.

Shapes: N tokens (all leading dimensions together), D channels, V words, n tokens of a chunk.

    z = x Wᵀ + b        z' = cap · tanh(z / cap), or z without a cap        loss = −Σ_t log softmax(z'_t)[label_t]
    ∂z' = softmax(z') − onehot(label), 0 for ignored tokens        ∂z = ∂z' ⊙ (1 − (z' / cap)²)
    ∂x = ∂z W        ∂W = ∂zᵀ x        ∂b = Σ_t ∂z_t

What arrives in backward is one number. So the gradients are made in forward, while a chunk's logits are there, and multiplied by it
in backward: three products for each chunk, as many as with the logits of all tokens, and none of them twice. Kept until then are
∂x and ∂W. They are those of the plain sum: a factor such as 1/N would be lost in float16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.autocast import as_in_product, without_autocast
from longspan.dtypes import accumulation_dtype
from longspan.first_order import first_order
from longspan.ops.chunked.sums import add_product, chunks_of, times_number
from longspan.tracing import OpaqueOperator, has_no_values, unseen_by_checkpointing

Results = tuple[Tensor, Tensor, Tensor, Tensor]


class Given(NamedTuple):
    """What `sum_of_losses` was given; the dtype of products; and which gradients are wanted, of hidden, weight and bias."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    ignore_index: int
    chunk_size: int
    softcap: float | None
    dtype: torch.dtype
    needs: list[bool]


def sum_of_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    chunk_size: int,
    softcap: float | None,
) -> Tensor:
    """The sum of the losses of all tokens; arguments as in `chunked_cross_entropy`, and checked."""
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    dtype = as_in_product(hidden.new_empty(0)).dtype
    arguments = (hidden, weight, bias, labels, ignore_index, chunk_size, softcap, dtype, needs)
    total: Tensor = OPERATOR(*arguments)[0] if has_no_values(hidden) else _apply(*arguments)
    return total


@unseen_by_checkpointing
def _apply(hidden: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    # Depends on all that gets a gradient, and has no numbers: second derivatives are refused through it.
    inputs = [
        x[:0].flatten()
        for x, needed in zip((hidden, weight, bias), options[-1], strict=True)
        if needed and x is not None
    ]
    witness = torch.cat(inputs) if inputs else hidden.new_empty(0)
    total: Tensor = ChunkedCrossEntropy.apply(witness, hidden, weight, bias, *options)
    return total


class ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of the losses; see the module for the equations. Behind the witness stand the arguments of `Given`.

    | | shape | dtype | gradient |
    |---|---|---|---|
    | witness | ``[0]`` | any | none; depends on the inputs that get gradients, which are not kept |
    | hidden | ``[..., D]`` | any | ∂x · grad |
    | weight | ``[V, D]`` | any | ∂W · grad |
    | bias | ``[V]`` or None | any | ∂b · grad |
    | labels | ``[...]`` | int64 | none |
    | result | ``[]`` | float32 or float64 | |
    """

    @staticmethod
    def forward(ctx: Any, witness: Tensor, *arguments: Any) -> Tensor:
        total, *gradients = _sums_of_chunks(*arguments)
        given = Given(*arguments)
        ctx.dtypes = [None if x is None else x.dtype for x in given[:3]]
        ctx.chunk_size, ctx.needs = given.chunk_size, given.needs
        ctx.save_for_backward(witness, *gradients)
        return total

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, *gradients = ctx.saved_tensors
        found = [
            times_number(x, grad, ctx.chunk_size).to(dtype) if needed else None
            for x, dtype, needed in zip(gradients, ctx.dtypes, ctx.needs, strict=True)
        ]
        return (None, *found, None, None, None, None, None, None)


def _sums_of_chunks(*arguments: Any) -> Results:
    """The sum of the losses, and its gradients for hidden (in its dtype), weight and bias (float32 at least); empty if unwanted."""
    hidden, weight, bias, labels, ignore_index, chunk_size, softcap, dtype, needs = Given(*arguments)
    x, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
    wide = accumulation_dtype(dtype)
    losses = x.new_zeros(len(x), dtype=wide)
    grad_x = x.new_empty(x.shape if needs[0] else 0)
    grad_w = torch.zeros_like(w, dtype=wide) if needs[1] else x.new_empty(0)
    grad_b = x.new_zeros(len(w), dtype=wide) if needs[2] else x.new_empty(0)
    all_logits = x.new_empty(min(chunk_size, len(x)), len(w), dtype=wide)
    all_log_probs = torch.empty_like(all_logits)
    with without_autocast(x):
        for rows in chunks_of(len(x), chunk_size):
            h, words = x[rows].to(dtype), targets[rows]
            ignored = words == ignore_index
            words = words.masked_fill(ignored, 0).unsqueeze(1)
            logits = _logits(h, w, b, softcap, all_logits[: len(h)])
            log_probs = torch.log_softmax(logits, -1, out=all_log_probs[: len(h)])
            losses[rows] = -log_probs.gather(1, words).squeeze(1).masked_fill(ignored, 0.0)
            if not any(needs):
                continue
            # In place: from here on it is the gradient.
            grad_logits = log_probs.exp_().scatter_add_(1, words, log_probs.new_full((1, 1), -1.0).expand_as(words))
            if softcap is not None:
                grad_logits.mul_(logits.div_(softcap).square_().neg_().add_(1.0))
            grad_logits.masked_fill_(ignored.unsqueeze(1), 0.0)
            if needs[2]:
                grad_b += grad_logits.sum(0)
            narrow = grad_logits.to(dtype)
            if needs[0]:
                grad_x[rows] = narrow @ w
            if needs[1]:
                add_product(grad_w, narrow, h)
    return losses.sum(), grad_x.view(hidden.shape) if needs[0] else grad_x, grad_w, grad_b


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, out: Tensor) -> Tensor:
    """``[n, V]`` in the dtype of `out`, which they are written to."""
    if out.dtype != h.dtype:
        out.copy_(F.linear(h, weight, bias))
    elif bias is None:
        torch.mm(h, weight.t(), out=out)
    else:
        torch.addmm(bias, h, weight.t(), out=out)
    return out if softcap is None else out.div_(softcap).tanh_().mul_(softcap)


def _without_values(*arguments: Any) -> Results:
    given = Given(*arguments)
    hidden, weight, needs = given.hidden, given.weight, given.needs
    wide = accumulation_dtype(given.dtype)
    grad_x = hidden.new_empty(hidden.shape if needs[0] else 0)
    grad_w = weight.new_empty(weight.shape if needs[1] else 0, dtype=wide if needs[1] else hidden.dtype)
    grad_b = weight.new_empty(len(weight) if needs[2] else 0, dtype=wide if needs[2] else hidden.dtype)
    return hidden.new_empty((), dtype=wide), grad_x, grad_w, grad_b


def _scaled(gradients: list[Tensor], outputs: list[Tensor], *arguments: Any) -> list[Tensor | None]:
    """The gradients of the tensors, from that of the sum."""
    given = Given(*arguments)
    found: list[Tensor | None] = [
        None if x is None or not grad.numel() else times_number(grad, gradients[0], given.chunk_size).to(x.dtype)
        for x, grad in zip(given[:3], outputs[1:], strict=True)
    ]
    return [*found, None]


OPERATOR = OpaqueOperator(
    "longspan::chunked_cross_entropy",
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int ignore_index, int chunk_size, float? softcap, "
    "ScalarType dtype, bool[] needs",
    4,
    _sums_of_chunks,
    _without_values,
    _scaled,
)
