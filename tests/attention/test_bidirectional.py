"""Every token reads all tokens of its document: equal to the plain sum, with every gradient, on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import longspan
from longspan.exchange import record_traffic
from tests.compare import relative_error, worst
from tests.ranks import run_on_ranks
from tests.unwritten import unwritten_memory_is_nan
from tests.variants import make_inputs

OPERATORS = ["linear_attention", "retention"]


def plain_sum(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, documents: list[int] | None) -> Tensor:
    """o_t = scale · Σ_s e^{|t−s| log_decay} (q_t·k_s) v_s over the tokens of t's document."""
    repeats = v.shape[2] // k.shape[2]
    q, k = (x.repeat_interleave(repeats, dim=2) for x in (q, k))
    positions = torch.arange(q.shape[1])
    distance = (positions[:, None] - positions).abs()
    weights = (distance * log_decay[:, None, None]).exp()
    if documents is not None:
        number = torch.bucketize(positions, torch.tensor(documents[1:]), right=True)
        weights = weights * (number[:, None] == number)
    return scale * torch.einsum("bthk,bshk,hts,bshv->bthv", q, k, weights, v)


@unwritten_memory_is_nan()
def errors_on_rank(name: str, order: Any, seq_len: int, documents: list[int] | None, key_heads: int) -> list[float]:
    inputs = make_inputs("retention", seq_len, documents=documents, heads=2, key_heads=key_heads)
    log_decay = inputs.gates["log_decay"].detach() * (name == "retention")
    leaves = [inputs.q, inputs.k, inputs.v]
    expected = plain_sum(inputs.q, inputs.k, inputs.v, log_decay, inputs.scale, documents)
    expected_grads = torch.autograd.grad((expected * inputs.grad_o).sum(), leaves)
    layout = longspan.SequenceLayout(seq_len, order=order, documents=documents)
    q, k, v = (layout.shard(x.detach()).requires_grad_() for x in leaves)
    gates: dict[str, Any] = {"log_decay": log_decay} if name == "retention" else {}
    with record_traffic() as traffic:
        memory = longspan.write(name, k, v, **gates, causal=False, exchange="all_gather", layout=layout, chunk_size=8)
        o = memory.read(q, inputs.scale)
        grads = torch.autograd.grad((o * layout.shard(inputs.grad_o)).sum(), [q, k, v])
    directions = 1 if name == "linear_attention" else 2
    assert traffic.num_collectives == (0 if dist.get_world_size() == 1 else 2 * directions)
    errors = [relative_error(o, layout.shard(expected))]
    return errors + [relative_error(g, layout.shard(e)) for g, e in zip(grads, expected_grads, strict=True)]


@pytest.mark.slow_rows(r"^linear_attention-contiguous-3")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^retention-contiguous-3$")
@pytest.mark.parametrize(
    "num_ranks", [1, pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("name", OPERATORS)
def test_bidirectional_equals_the_plain_sum_on_every_rank(name: str, order: str, num_ranks: int) -> None:
    for seq_len, documents in ((37, None), (5, None), (40, [0, 1, 2, 9, 30, 40])):
        for key_heads in (1, 2):
            for errors in run_on_ranks(num_ranks, errors_on_rank, name, order, seq_len, documents, key_heads):
                assert worst(errors) < 1e-10, (seq_len, documents, errors)


def test_what_has_no_meaning_both_ways_is_refused() -> None:
    x, g = torch.randn(1, 8, 2, 4), -torch.rand(1, 8, 2)
    with pytest.raises(longspan.InputError, match="there is no state before or after the sequence"):
        longspan.linear_attention(x, x, x, causal=False, output_final_state=True)
    with pytest.raises(longspan.InputError, match="is for 'linear_attention' and 'retention'"):
        longspan.write("simple_gla", x, x, g=g, causal=False)
