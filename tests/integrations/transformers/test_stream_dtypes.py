"""bfloat16 in segments of time: one segment has the bits of one piece, and many are no further from float64 than that is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import longspan
from longspan.integrations.transformers import stream_batch
from tests.integrations.transformers.families import build
from tests.integrations.transformers.reference import PLAIN, Batch, Expected, batch, expected, gradients_of
from tests.integrations.transformers.test_dtypes import run
from tests.integrations.transformers.test_stream_training import fully_sharded, hybrid, whole_gradients
from tests.ranks import run_on_ranks

DTYPES = {"bfloat16": torch.bfloat16, "autocast": torch.float32}


def in_segments(model: Any, how: str, of: Batch, segment_tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss = longspan.stream(model, segment_tokens).forward_backward(**stream_batch(model, of.arguments()))
    return loss, gradients_of(model)


def total_error(got: dict[str, Tensor], want: Expected) -> float:
    """The norm of all gradients' errors, relative to theirs."""
    assert got.keys() == want.gradients.keys()
    off = sum(float((got[key].double() - x).square().sum()) for key, x in want.gradients.items())
    return float((off / sum(float(x.square().sum()) for x in want.gradients.values())) ** 0.5)


@pytest.mark.parametrize("how", DTYPES)
def test_one_segment_has_the_bits_of_a_call_and_several_its_accuracy(how: str) -> None:
    model = longspan.parallelize(hybrid().to(DTYPES[how]), None)
    loss, _, want = run(model, how, PLAIN)
    got, found = in_segments(model, how, PLAIN, 64)
    different = [key for key in want if not torch.equal(found[key], want[key])]
    assert torch.equal(got, loss) and found.keys() == want.keys() and not different, different
    exact = expected(hybrid(), PLAIN)
    of_call, of_segments = (total_error(x, exact) for x in (want, in_segments(model, how, PLAIN, 5)[1]))
    assert 1e-3 < of_call < 0.1
    assert of_segments < 1.5 * of_call, (of_segments, of_call)


class InFloat32(nn.Module):
    """An activation that computes a product in float32, whatever the caller's autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(40, 40, generator=torch.Generator().manual_seed(2)) / 40**0.5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.silu(x.float() @ self.weight)


def test_what_forward_computes_in_float32_under_autocast_is_so_backward() -> None:
    model: Any = build("llama").float()
    model.model.layers[1].mlp.act_fn = InFloat32()
    longspan.parallelize(model, None)
    _, _, want = run(model, "autocast", PLAIN)
    _, found = in_segments(model, "autocast", PLAIN, 64)
    different = [key for key in want if not torch.equal(found[key], want[key])]
    assert found.keys() == want.keys() and not different, different


@pytest.mark.slow
def test_gradients_of_bfloat16_weights_do_not_err_more_with_more_segments() -> None:
    """Each of 128 segments adds to them."""
    long, model = batch(1, 256), longspan.parallelize(build("mamba2").bfloat16(), None)
    exact = expected(build("mamba2"), long)
    of_call = total_error(run(model, "bfloat16", long)[2], exact)
    of_segments = total_error(in_segments(model, "bfloat16", long, 2)[1], exact)
    assert of_segments < 1.2 * of_call, (of_segments, of_call)


def test_a_second_sequence_is_added_to_the_gradients_of_the_first() -> None:
    model = longspan.parallelize(build("mamba2").bfloat16(), None)
    given = stream_batch(model, PLAIN.arguments())
    longspan.stream(model, 10).forward_backward(**given)
    first = {name: p.grad for name, p in model.named_parameters()}
    alone = gradients_of(model)
    longspan.stream(model, 10).forward_backward(**given)
    both = gradients_of(model)
    for name, parameter in model.named_parameters():
        # The tensor that was there, as in one backward; twice a number is one of bfloat16, too.
        assert parameter.grad is first[name] and torch.equal(both[name], 2 * alone[name]), name


def under_a_policy() -> tuple[float, float]:
    """Errors of the gradients of a call, and of segments, with FSDP2's own mixed precision."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    exact = expected(hybrid(), PLAIN)
    model: Any = longspan.parallelize(hybrid().float(), None)
    fully_sharded(model, model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    model(**PLAIN.arguments()).loss.backward()
    of_call = total_error(whole_gradients(model), exact)
    model.zero_grad()
    longspan.stream(model, 10).forward_backward(**stream_batch(model, PLAIN.arguments()))
    return of_call, total_error(whole_gradients(model), exact)


def test_fsdp2_may_compute_in_bfloat16() -> None:
    for of_call, of_segments in run_on_ranks(2, under_a_policy):
        assert 1e-3 < of_call < 0.1
        assert of_segments < 1.5 * of_call, (of_segments, of_call)


def with_divided_bfloat16_weights() -> tuple[float, float]:
    """Errors of the gradients of a call, and of many segments that each sum them over the ranks."""
    long = batch(1, 256)
    exact = expected(hybrid(), long)
    model: Any = longspan.parallelize(hybrid().bfloat16(), None)
    fully_sharded(model, model)
    model(**long.arguments()).loss.backward()
    of_call = total_error(whole_gradients(model), exact)
    model.zero_grad()
    longspan.stream(model, 2, reduce_each=True).forward_backward(**stream_batch(model, long.arguments()))
    return of_call, total_error(whole_gradients(model), exact)


@pytest.mark.slow
def test_divided_bfloat16_weights_whose_gradients_each_segment_sums_do_not_err_more() -> None:
    for of_call, of_segments in run_on_ranks(2, with_divided_bfloat16_weights):
        assert of_segments < 1.2 * of_call, (of_segments, of_call)
