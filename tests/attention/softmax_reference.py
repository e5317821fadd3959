"""Dense softmax attention: the definition that the blockwise forms are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.attention.softmax import SoftmaxMethod, softmax_attention, write_softmax
from longspan.layout import Order, SequenceLayout
from tests.compare import relative_error
from tests.unwritten import unwritten_memory_is_nan

Documents = tuple[int, ...] | None


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    documents: tuple[int, ...],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q [B, T, H, D]; k [B, T, H_kv, D]; v [B, T, H_kv, D_v]; documents are cu_seqlens. Any float dtype, masks and scores whole."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    positions = torch.arange(q.shape[1])
    document = torch.bucketize(positions, torch.tensor(documents[1:]), right=True)
    visible = document[:, None] == document[None, :]
    distance = positions[:, None] - positions[None, :]
    if causal:
        visible &= distance >= 0
    if window is not None:
        visible &= distance.abs() < window
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is None:
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    # One more key that all queries of a head see, whose value is 0.
    columns = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.einsum("bhij,bjhd->bihd", torch.cat([scores, columns], dim=-1).softmax(-1)[..., :-1], v)


def random_inputs(
    seed: int,
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype = torch.float64,
    value_dim: int | None = None,
) -> list[Tensor]:
    """q, k, v and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    of_values = dim if value_dim is None else value_dim
    sizes = [(heads, dim), (kv_heads, dim), (kv_heads, of_values), (heads, of_values)]
    return [torch.randn(batch, tokens, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


@dataclass(frozen=True)
class Case:
    """One setting of softmax attention over ranks."""

    tokens: int
    method: SoftmaxMethod = "auto"
    order: Order = "contiguous"
    causal: bool = True
    window: int | None = None
    documents: Documents = None
    heads: tuple[int, int] = (4, 2)
    dtype: torch.dtype = torch.float64
    two_phases: bool = False
    rows: int = 2
    dim: int = 8
    value_dim: int | None = None
    floor: float = 0.0
    softcap: float | None = None
    with_sinks: bool = False
    frozen: tuple[int, ...] = ()


@unwritten_memory_is_nan()
def compare(cases: list[Case]) -> list[dict[str, float]]:
    """For each case the errors of this rank's o, dq, dk and dv, for a random upstream gradient, and of the sum of the sinks'."""
    return [_compare(case, seed) for seed, case in enumerate(cases)]


def _compare(case: Case, seed: int) -> dict[str, float]:
    everything = random_inputs(seed, case.rows, case.tokens, *case.heads, case.dim, case.dtype, case.value_dim)
    layout = SequenceLayout(case.tokens, order=case.order, documents=case.documents)
    own = [layout.shard(x).clone().requires_grad_(index not in case.frozen) for index, x in enumerate(everything[:3])]
    q, k, v = own
    # As large as the log-sum-exps, so that both take a part.
    scores = torch.linspace(-1.0, 3.0, case.heads[0], dtype=torch.float64)
    sinks = scores.to(case.dtype).requires_grad_() if case.with_sinks else None
    if case.two_phases:
        memory = write_softmax(k, v, layout=layout, causal=case.causal, window=case.window, method=case.method)
        out = memory.read(q, 0.4, softcap=case.softcap, sinks=sinks)
    else:
        out = softmax_attention(
            q, k, v, causal=case.causal, window=case.window, layout=layout, scale=0.4, softcap=case.softcap, sinks=sinks,
            method=case.method,
        )  # fmt: skip
    names = [name for index, name in enumerate(("dq", "dk", "dv")) if index not in case.frozen]
    inputs = [x for x in own if x.requires_grad]
    grads = torch.autograd.grad(out, inputs if sinks is None else [*inputs, sinks], layout.shard(everything[3]))

    leaves = [x.double().requires_grad_() for x in everything[:3]]
    documents = case.documents or (0, case.tokens)
    whole_sinks = None if sinks is None else sinks.detach().double().requires_grad_()
    want = dense_attention(
        *leaves, causal=case.causal, window=case.window, documents=documents, scale=0.4, softcap=case.softcap,
        sinks=whole_sinks,
    )  # fmt: skip
    differentiated = [x for index, x in enumerate(leaves) if index not in case.frozen]
    differentiated += [] if whole_sinks is None else [whole_sinks]
    want_grads = torch.autograd.grad(want, differentiated, everything[3].double())
    assert all(got.dtype == case.dtype for got in (out, *grads))
    errors = {"o": relative_error(out, layout.shard(want), case.floor)}
    for name, got, whole in zip(names, grads, want_grads, strict=False):
        # In a window of one token no query and no key has a gradient, so that rounding, whose order processors differ in, has no
        # size to be compared with: it is bounded by itself.
        has_no_size = case.window == 1 and sinks is None and name in ("dq", "dk")
        errors[name] = relative_error(got, layout.shard(whole), 1.0 if has_no_size else case.floor)
    if sinks is not None:
        # A rank's is its share.
        total = grads[-1].double()
        if layout.num_ranks > 1:
            dist.all_reduce(total)
        errors["dsinks"] = relative_error(total, want_grads[-1], case.floor)
    return errors
