"""Before the first step: is the sequence-parallel run the run that one process would make?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longspan.data.packing import Sequences
from longspan.errors import LongspanError
from longspan.layout import SequenceLayout
from longspan.parallel import gathered
from longspan.train.loss import forward_backward, loss_share
from longspan.train.model import sum_over_ranks
from longspan.train.optimizer import gradient_norm
from longspan.train.ranks import Ranks
from longspan.train.segments import Segmentation
from longspan.train.step_batch import LayoutOf

TOLERANCE = 1e-4
"""Largest relative difference of loss, gradient norm and gradients. Both sides compute in float32 and differ in the
order of their sums alone: sums of 10^4 terms agree to about 1e-6, and a chain of layers to 1e-5. A missing or doubled
term shows as 1e-2 or more. With experts both compute in float64: see `longspan.train.model.checked_dtype`."""


class SelfCheckError(LongspanError):
    """Sequence-parallel and single-process computation of the same batch disagree."""


@dataclass(frozen=True)
class SelfCheck:
    """Loss and gradient norm of one batch, computed by all ranks and by one process.

    worst: the parameter that differs most. gradient_difference: the norm of all gradients' differences over the norm of the
    gradients.
    """

    num_tokens: int
    loss: float
    loss_alone: float
    norm: float
    norm_alone: float
    gradient_difference: float
    worst: str

    @property
    def agrees(self) -> bool:
        """True if all three differences are finite and below `TOLERANCE`."""
        return all(difference <= TOLERANCE for difference in self.differences)

    @property
    def differences(self) -> tuple[float, float, float]:
        """Relative differences of loss and gradient norm, and of the gradients themselves."""
        return (
            _relative(self.loss, self.loss_alone),
            _relative(self.norm, self.norm_alone),
            self.gradient_difference,
        )

    def raise_unless_agrees(self) -> None:
        """Raise SelfCheckError, with all numbers, if the two sides disagree, or have diverged."""
        if self.agrees:
            return
        if not (math.isfinite(self.loss_alone) and math.isfinite(self.norm_alone)):
            raise SelfCheckError(
                f"the weights have diverged: on the first {self.num_tokens} tokens one process alone has loss {self.loss_alone} "
                f"and gradient norm {self.norm_alone}. Remove the newest checkpoint to go on from the one "
                "before it, or start a new run, with a lower optim.lr"
            )
        loss, norm, gradients = self.differences
        raise SelfCheckError(
            "the ranks together do not compute what one process computes, so this run would train another model. On "
            f"the first {self.num_tokens} tokens: loss {self.loss:.7g} against {self.loss_alone:.7g} (relative "
            f"difference {loss:.1e}), gradient norm {self.norm:.7g} against {self.norm_alone:.7g} ({norm:.1e}), "
            f"gradients {gradients:.1e}, most in {self.worst}; each must be at most {TOLERANCE:.0e}. Try another "
            "parallel.exchange, parallel.softmax_method or parallel.order to find what disagrees; parallel.sp 1 "
            "trains without exchanges, and no train.segment_tokens without segments"
        )


def self_check(
    parallel_model: nn.Module,
    build_alone: Callable[[], nn.Module],
    sequences: Sequences,
    layout_of: LayoutOf,
    ranks: Ranks,
    threads_alone: int,
    segments: Segmentation | None = None,
) -> SelfCheck:
    """Compare loss and gradients of all ranks together with those of one process; the same result on every rank.

    Args:
        parallel_model: as it will be trained. Its gradients are gone afterwards.
        build_alone: makes the same model with the same weights for a single process; called on rank 0 alone.
        sequences: B of them, the same on every rank; dp divides B.
        layout_of: makes this rank's layout for the ranks together.
        threads_alone: CPU threads for the single process, while the other ranks wait.
        segments: of time, in which the ranks together compute, three at least; the single process takes sequences whole.
    """
    num_tokens = sequences.num_valid_tokens
    rows = len(sequences) // ranks.dp
    own = sequences.rows(ranks.dp_rank * rows, rows).packed().to(ranks.device)
    parallel_model.zero_grad(set_to_none=True)
    cut = None if segments is None else segments.for_check(own.seq_len, ranks.sp)
    layout = layout_of(own.seq_len, own.documents)
    loss = forward_backward(parallel_model, own, layout, num_tokens, cut)
    sum_over_ranks(parallel_model, ranks)
    total = float(ranks.gather_numbers([float(loss)]).sum())
    norm = float(gradient_norm(parallel_model))
    named = [(name, _gradient_or_zero(parameter)) for name, parameter in parallel_model.named_parameters()]
    gradients = gathered(named, ranks.is_first)
    found: dict[str, Any] = ranks.from_first(
        lambda: (
            {"loss": total, "norm": norm} | _compare(gradients, build_alone(), sequences, threads_alone, ranks.device)
        )
    )
    parallel_model.zero_grad(set_to_none=True)
    return SelfCheck(num_tokens=max(1, num_tokens), **found)


def _compare(
    gradients: dict[str, Tensor], alone: nn.Module, sequences: Sequences, threads: int, device: torch.device
) -> dict[str, Any]:
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        batch = sequences.packed().to(device)
        layout = SequenceLayout.local(batch.seq_len, batch.documents)
        loss = loss_share(alone, batch, layout, batch.num_valid_tokens)
        loss.backward()
    finally:
        torch.set_num_threads(threads_before)
    squares = {
        name: float((gradients[name] - _gradient_or_zero(expected)).square().sum())
        for name, expected in alone.named_parameters()
    }
    norm_alone = float(gradient_norm(alone))
    difference = math.sqrt(sum(squares.values()))
    return {
        "loss_alone": float(loss.detach()),
        "norm_alone": norm_alone,
        "gradient_difference": difference / norm_alone if norm_alone else difference,
        "worst": max(squares, key=lambda name: (math.isnan(squares[name]), squares[name])),
    }


def _gradient_or_zero(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _relative(value: float, expected: float) -> float:
    return abs(value - expected) / abs(expected) if expected else abs(value)
