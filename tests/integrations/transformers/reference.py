"""The unmodified model in one process, in float64 throughout: what a parallelized one must equal.

Transformers computes norms, gates, routers and kernels in float32 whatever the model's dtype; `Wide` makes that float64, so that
errors of rounding do not hide others. Packed documents are run one by one: on the torch path, Transformers' own packed forward
runs states and convolutions over the ends of documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.integrations.transformers.families import VOCABULARY

IGNORED = -100


class Wide(TorchFunctionMode):
    """float32 where a model asks for it by name becomes float64, and float64 is what new tensors have."""

    def __enter__(self) -> Any:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        torch.set_default_dtype(self.before)
        super().__exit__(*exception)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        return func(*map(_widened, args), **{name: _widened(value) for name, value in (kwargs or {}).items()})


def _widened(value: Any) -> Any:
    if value is torch.float32:
        return torch.float64
    if isinstance(value, list | tuple) and any(part is torch.float32 for part in value):
        return type(value)(map(_widened, value))
    return value


@dataclass(frozen=True)
class Batch:
    """Whole sequences: ``[B, N]`` ids and labels; bounds of packed documents, or None."""

    ids: Tensor
    labels: Tensor
    bounds: tuple[int, ...] | None = None

    @property
    def positions(self) -> Tensor:
        """Position of each token in its document, ``[1, N]``."""
        assert self.bounds is not None
        return torch.cat([torch.arange(stop - start) for start, stop in pairwise(self.bounds)])[None]

    def arguments(self) -> dict[str, Tensor]:
        """What a model is called with."""
        given = {"input_ids": self.ids, "labels": self.labels}
        return given if self.bounds is None else {**given, "position_ids": self.positions}


def batch(rows: int = 2, length: int = 37, bounds: tuple[int, ...] | None = None, seed: int = 3) -> Batch:
    """Random ids, some labels of which do not count."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, 3 : length // 2] = IGNORED
    labels[-1, length - length // 5 :] = IGNORED
    if bounds is not None:
        # What a document's first token is counts in the batch, and must not be predicted from the document before.
        labels[:, list(bounds[:-1])] = ids[:, list(bounds[:-1])]
    return Batch(ids, labels, bounds)


PLAIN = batch()
PACKED = batch(1, 53, (0, 5, 6, 23, 50, 53))


@dataclass(frozen=True)
class Expected:
    """Loss, logits ``[B, N, V]`` and gradients by name of a batch in one process."""

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def expected(model: nn.Module, what: Batch, **options: Any) -> Expected:
    """Run the unmodified model, each document by itself; its gradients are left empty."""
    model.zero_grad()
    with Wide():
        if what.bounds is None:
            out = model(input_ids=what.ids, labels=what.labels, use_cache=False, **options)
            loss, logits = out.loss, out.logits
        else:
            parts = [
                model(input_ids=what.ids[:, start:stop], use_cache=False, **options).logits
                for start, stop in pairwise(what.bounds)
            ]
            logits = torch.cat(parts, dim=1)
            shifted = F.pad(what.labels, (0, 1), value=IGNORED)[:, 1:].clone()
            shifted[:, [stop - 1 for stop in what.bounds[1:]]] = IGNORED
            loss = F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), ignore_index=IGNORED)
        loss.backward()
    found = Expected(loss.detach(), logits.detach(), gradients_of(model))
    model.zero_grad()
    return found
