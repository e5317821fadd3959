"""How much a step computes, and how fast the device could at best."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise

import torch

from longspan.models import LinearLlama3, LinearLlama3Config
from longspan.models.block import HybridBlock
from longspan.models.counts import on_meta
from longspan.models.mixers.mixer import operations_of_matrices
from longspan.plan.devices import stated_peak_flops
from longspan.plan.training import Operations
from longspan.train.step_batch import StepBatch

_SIZE = 512
_SECONDS = 0.1


@dataclass(frozen=True)
class Peak:
    """What a rank's device reaches at best.

    flops: operations per second, None if unknown. source: where that comes from, or why it is unknown.
    """

    flops: float | None
    source: str

    def __str__(self) -> str:
        return self.source if self.flops is None else f"{self.flops / 1e9:,.0f} GFLOP/s at best, {self.source}"


def find_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The peak of this rank's device in matrix products of `dtype`.

    A GPU's is what its maker states. A CPU's is measured, 0.1 s long, with the threads that this rank has: all ranks of a machine
    must call this at the same time.
    """
    kind = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        flops = stated_peak_flops(name, dtype)
        if flops is None:
            return Peak(None, f"no peak is listed for {name} in {kind}, so that no share of it is shown")
        return Peak(flops, f"the maker's figure for {name} in {kind}")
    return Peak(measure_flops(dtype), f"measured by products of {_SIZE} x {_SIZE} matrices in {kind}")


def measure_flops(dtype: torch.dtype) -> float:
    """Operations per second of the fastest of several products of square matrices on the CPU."""
    # Not random numbers: the run's random state must not notice.
    a, b = (torch.ones(_SIZE, _SIZE, dtype=dtype) for _ in range(2))
    out = torch.empty(_SIZE, _SIZE, dtype=dtype)
    torch.mm(a, b, out=out)
    fastest = float("inf")
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        begun = time.perf_counter()
        torch.mm(a, b, out=out)
        fastest = min(fastest, time.perf_counter() - begun)
    return 2 * _SIZE**3 / fastest


def operations_of_model(config: LinearLlama3Config, num_tokens: int) -> Operations:
    """Operations of a model, forward and backward, for one sequence of so many tokens; no weight is made."""
    model = on_meta(config)
    softmax = [
        block.mixer for block in model.blocks if isinstance(block, HybridBlock) and block.mixer.name == "softmax"
    ]
    # Of a token that sees nothing, not even itself, matrices alone are left.
    attention = sum(mixer.flops_per_token(num_tokens) - operations_of_matrices(mixer) for mixer in softmax)
    return Operations((model.flops_per_token(num_tokens) - attention) * num_tokens, attention * num_tokens)


class ModelOperations:
    """The operations of a model's steps, forward and backward, without recomputation, as its mixers count them."""

    def __init__(self, model: LinearLlama3) -> None:
        self._model = model
        self._by_length: dict[int, float] = {}

    def of_sequence(self, num_tokens: int) -> float:
        """Of one sequence, or document, of so many tokens."""
        if num_tokens not in self._by_length:
            self._by_length[num_tokens] = num_tokens * self._model.flops_per_token(num_tokens) if num_tokens else 0.0
        return self._by_length[num_tokens]

    def of_batch(self, batch: StepBatch) -> float:
        """Of the sequences of this rank and of those with which it shares them, together."""
        total = 0.0
        for packed, _ in batch.micro_batches:
            documents = packed.documents or (0, packed.seq_len)
            total += len(packed.inputs) * sum(self.of_sequence(end - start) for start, end in pairwise(documents))
        return total
