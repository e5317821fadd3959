"""What `benchmarks.gpu` times: our operators, flash-linear-attention's, flash attention; their inputs, bytes and operations.

Shapes: B batch rows, T tokens, H heads, D = K = V head size. All sides get the same tensors.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import longspan
from longspan.layout import SequenceLayout

OPERATORS = ("linear_attention", "retention", "simple_gla", "gla")

Attend = Callable[["Inputs"], Tensor]


@dataclass(frozen=True)
class Case:
    """One setting: the operator's name, sizes, dtype, and cu_seqlens where documents are packed."""

    operator: str
    seq_len: int
    size: int = 128
    batch: int = 1
    heads: int = 16
    dtype: torch.dtype = torch.bfloat16
    documents: tuple[int, ...] | None = None

    def __str__(self) -> str:
        packed = "" if self.documents is None else f", {len(self.documents) - 1} documents"
        return f"{self.operator} B{self.batch} T{self.seq_len:,} H{self.heads} D{self.size}{packed}"

    @property
    def num_rows(self) -> int:
        """Tokens times heads."""
        return self.batch * self.seq_len * self.heads

    def ideal_bytes(self, backward: bool) -> int:
        """Bytes of every input read once and every output written once: q, k, v, o; backward also ∂o, ∂q, ∂k, ∂v; g and ∂g."""
        number = torch.finfo(self.dtype).bits // 8
        tensors = (4 + 7) if backward else 4
        gates = {"simple_gla": 1, "gla": self.size}.get(self.operator, 0) * (3 if backward else 1)
        return self.num_rows * (tensors * self.size * number + gates * 4)

    def operations(self, backward: bool) -> int:
        """Of the matrix products of the chunk form, chunks of 64: a pass forward and three more backward, each with a pre-pass."""
        products = 4 * 64 * self.size + 4 * self.size**2
        prepass = 2 * self.size**2
        return self.num_rows * ((4 * products + 2 * prepass) if backward else products + prepass)


@dataclass(frozen=True)
class Inputs:
    """q, k, v and a gradient of o ``[B, T, H, D]``; gates by name; the layout of the documents, or None."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    gates: dict[str, Tensor]
    layout: SequenceLayout | None

    @property
    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.v, *(gate for gate in self.gates.values() if gate.requires_grad)]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Random inputs with keys of length 1; decays as RetNet's, or log-sigmoids over 16."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    shape = (case.batch, case.seq_len, case.heads, case.size)
    q, k, v, grad = (normal(*shape) for _ in range(4))
    gates: dict[str, Tensor] = {}
    if case.operator == "retention":
        gates["log_decay"] = torch.log1p(-(2.0 ** (-5 - torch.arange(case.heads, device=device) % 8)))
    elif case.operator in ("simple_gla", "gla"):
        gates["g"] = (
            F.logsigmoid(normal(*(shape[:3] if case.operator == "simple_gla" else shape))) / 16
        ).requires_grad_()
    layout = None if case.documents is None else SequenceLayout.local(case.seq_len, list(case.documents))
    q, k, v = (x.to(case.dtype).requires_grad_() for x in (q, F.normalize(k, dim=-1), v))
    return Inputs(case, q, k, v, grad.to(case.dtype), gates, layout)


def ours(inputs: Inputs, backend: str = "triton", layout: SequenceLayout | None = None) -> Tensor:
    """Our operator."""
    call = getattr(longspan, inputs.case.operator)
    chosen = inputs.layout if layout is None else layout
    o: Tensor = call(inputs.q, inputs.k, inputs.v, **inputs.gates, layout=chosen, backend=backend)
    return o


def exact(inputs: Inputs) -> tuple[Tensor, ...]:
    """o and the gradients of the leaves by the plain form in float64, which the tests hold against the recurrent form."""
    q, k, v = (x.detach().double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    gates = {name: gate.detach().double().requires_grad_(gate.requires_grad) for name, gate in inputs.gates.items()}
    wide = Inputs(inputs.case, q, k, v, inputs.grad.double(), gates, inputs.layout)
    return step(partial(ours, backend="torch"), wide)


def step(attend: Attend, inputs: Inputs) -> tuple[Tensor, ...]:
    """o and the gradients of the leaves."""
    o = attend(inputs)
    return (o, *torch.autograd.grad(o, inputs.leaves, inputs.grad))


def fla_side(case: Case) -> Attend | None:
    """flash-linear-attention's chunk operator, or None where it is not installed."""
    if importlib.util.find_spec("fla") is None:
        return None

    def attend(inputs: Inputs) -> Tensor:
        from fla.ops.gla import chunk_gla
        from fla.ops.linear_attn import chunk_linear_attn
        from fla.ops.simple_gla import chunk_simple_gla

        options = {"scale": case.size**-0.5}
        if case.documents is not None:
            options["cu_seqlens"] = _cu_seqlens(case.documents, inputs.q.device)
        if case.operator == "gla":
            o, _ = chunk_gla(inputs.q, inputs.k, inputs.v, inputs.gates["g"], **options)
        elif case.operator == "simple_gla":
            o, _ = chunk_simple_gla(inputs.q, inputs.k, inputs.v, g=inputs.gates["g"], **options)
        elif case.operator == "retention":
            o, _ = chunk_simple_gla(inputs.q, inputs.k, inputs.v, g_gamma=inputs.gates["log_decay"], **options)
        else:
            o, _ = chunk_linear_attn(inputs.q, inputs.k, inputs.v, normalize=False, **options)
        result: Tensor = o
        return result

    return attend


_CU_SEQLENS: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}


def _cu_seqlens(documents: tuple[int, ...], device: torch.device) -> Tensor:
    # One tensor for all calls: fla keeps what it derives from it by identity.
    return _CU_SEQLENS.setdefault((documents, device), torch.tensor(documents, device=device))


def flash_attention(inputs: Inputs) -> Tensor:
    """PyTorch's causal flash attention."""
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
