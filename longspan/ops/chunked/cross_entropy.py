"""The cross-entropy of a language model's head that never holds the logits of all tokens: `chunked_cross_entropy`."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.autocast import as_in_product
from longspan.checks import check_count, check_number, check_same_device, check_tensor, check_tensors, described, is_int
from longspan.errors import InputError
from longspan.ops.chunked.loss_node import sum_of_losses
from longspan.tracing import has_no_values

NAME = "chunked_cross_entropy"
CHUNK_BYTES = 64 * 2**20
LEAST_CHUNK = 256
IGNORED = -100
"""Label of a token that is left out."""


def chunk_size_of(vocab_size: int) -> int:
    """Tokens whose logits are taken at once where none are said: those whose logits make 64 MiB in float32, and at least 256."""
    return max(LEAST_CHUNK, CHUNK_BYTES // (4 * vocab_size))


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORED,
    num_valid: int | Tensor | None = None,
    chunk_size: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """``F.cross_entropy(softcap(hidden weightᵀ + bias), labels)`` that never holds the logits of all tokens, forward or backward.

    Args:
        hidden: what the head reads, ``[..., D]``, float64, float32, bfloat16 or float16. With a layout, of this rank's tokens.
        weight: ``[V, D]``, the dtype of hidden. The embedding's matrix where weights are tied: its gradient from here is added to
            that from there. Under torch.autocast hidden, weight and bias are cast as the inputs of a matrix product are.
        labels: ``[...]``, int64, from 0 to V − 1 or `ignore_index`; shifted before the split (`SequenceLayout.shard_labels`).
        bias: ``[V]``, the dtype of hidden, or None.
        ignore_index: label of tokens that are left out of the loss and of all gradients.
        num_valid: what the sum of the losses is divided by: the number of valid tokens of **all** ranks (data × sequence), an int
            or a 0-dimensional tensor. The losses of the ranks then add up to the mean over all of them, and so do gradients
            (`longspan.sum_gradients`). None is the number of valid tokens here, for one process; 1 gives the sum; 0 counts as 1.
        chunk_size: tokens whose logits are held at once. None is as many as make 64 MiB of float32 logits, and at least 256.
        softcap: logits z become ``softcap · tanh(z / softcap)``, as in Gemma 2 (arXiv 2408.00118); None leaves them.

    Returns:
        The loss in nats, 0-dimensional, float32 (float64 for float64). 0, with gradients of 0, where all labels are ignored.

    Logits are products in the dtype of hidden; all else is float32 at least, and so are the sums over chunks of the gradients of
    weight and bias. Gradients are made in forward, for what requires one: in ``torch.no_grad()`` for nothing. Kept for backward are
    as many numbers as hidden and weight have. A chunk takes twice the memory of its logits, three times with narrow dtypes. A loss
    has no second derivative.

    Raises:
        InputError: for shapes, dtypes, devices or options that do not fit, and on the CPU for a label that is no word.

    Source: the Mini-Sequence Transformer (arXiv 2407.15892).
    """
    check_tensors(NAME, hidden=hidden, weight=weight, **({} if bias is None else {"bias": bias}))
    _check_head(hidden, weight, bias)
    check_labels(NAME, labels, hidden.shape[:-1], len(weight), ignore_index)
    check_same_device(NAME, hidden=hidden, weight=weight, bias=bias, labels=labels)
    check_num_valid(NAME, num_valid)
    if chunk_size is None:
        chunk_size = chunk_size_of(len(weight))
    check_count(NAME, "chunk_size", chunk_size, "tokens, or None for the default")
    if softcap is not None and check_number(NAME, "softcap", softcap, 0.0) == 0.0:
        raise InputError(f"{NAME}: softcap must be greater than 0; got {softcap!r}. Pass None for logits as they are")
    total = sum_of_losses(hidden, weight, bias, labels, ignore_index, chunk_size, softcap)
    if num_valid is None:
        num_valid = (labels != ignore_index).sum()
    return total / (num_valid.clamp(min=1) if isinstance(num_valid, Tensor) else max(1, num_valid))


def check_labels(what: str, labels: Tensor, shape: torch.Size, vocab_size: int, ignore_index: int = IGNORED) -> None:
    """Raise InputError unless labels are int64 of `shape`, and on the CPU each of them a word or `ignore_index`."""
    check_tensor(what, "labels", labels)
    if labels.dtype != torch.int64:
        raise InputError(f"{what}: labels must be int64; got {described(labels)}. Pass token ids, labels.long()")
    if labels.shape != shape:
        raise InputError(
            f"{what}: labels must be one for each token, of shape {tuple(shape)}; got {tuple(labels.shape)}. Shift them before a "
            "sequence is split: layout.shard_labels(tokens)"
        )
    if not is_int(ignore_index):
        raise InputError(f"{what}: ignore_index must be an int; got {described(ignore_index)}. Leave it out for -100")
    if labels.device.type != "cpu" or has_no_values(labels):
        return
    wrong = labels[((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)]
    if wrong.numel():
        raise InputError(
            f"{what}: labels must be from 0 to {vocab_size - 1}, or ignore_index ({ignore_index}); got {int(wrong[0])}, and "
            f"{wrong.numel() - 1} more. Use the tokenizer that the vocabulary is of"
        )


def check_num_valid(what: str, num_valid: object) -> None:
    """Raise InputError unless `num_valid` is None, a count, or a 0-dimensional tensor that may be one."""
    if isinstance(num_valid, Tensor):
        is_count = num_valid.dim() == 0 and num_valid.dtype not in (torch.bool, torch.complex64, torch.complex128)
        is_count = is_count and not num_valid.requires_grad
    else:
        is_count = num_valid is None or (isinstance(num_valid, int) and is_int(num_valid) and num_valid >= 0)
    if not is_count:
        raise InputError(
            f"{what}: num_valid must be an int of at least 0, or a 0-dimensional tensor without gradient; got "
            f"{described(num_valid)}. Pass the number of valid tokens of all ranks, or None for those of this one"
        )


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or 0 in weight.shape:
        raise InputError(
            f"{NAME} takes hidden [..., D] and weight [V, D], D and V at least 1; got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}. The weight of a torch.nn.Linear(D, V) is meant"
        )
    if bias is not None and tuple(bias.shape) != (len(weight),):
        raise InputError(
            f"{NAME} takes bias [V] = ({len(weight)},); got {tuple(bias.shape)}. Leave it out where the head has none"
        )
    given = [x for x in (hidden, weight, bias) if x is not None]
    if len({as_in_product(x.new_empty(0)).dtype for x in given}) > 1:
        raise InputError(
            f"{NAME} takes hidden, weight and bias of one dtype; got {', '.join(str(x.dtype) for x in given)}. Cast them, or use "
            "torch.autocast"
        )
