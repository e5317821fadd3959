"""Every family over ranks equals the unmodified model in one process: loss, logits, and every gradient on every rank."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import longspan
from longspan.integrations.transformers import layout_of
from longspan.integrations.transformers.call import ParallelCall
from longspan.integrations.transformers.functions import rwkv_linear_attention
from longspan.layout import ORDERS, Order
from longspan.models.mixers import ParallelOptions
from tests.compare import relative_error, worst_of
from tests.integrations.transformers.families import FAMILIES, build
from tests.integrations.transformers.reference import PACKED, PLAIN, Batch, Expected, Wide, expected, gradients_of
from tests.ranks import run_on_ranks

TOLERANCE = 1e-10
KINDS: dict[str, Batch] = {"plain": PLAIN, "packed": PACKED}


@functools.lru_cache(maxsize=4)
def expected_of(name: str, kind: str) -> Expected:
    return expected(build(name), KINDS[kind])


def errors_over_ranks(name: str, kind: str, order: Order, options: dict[str, Any], want: Expected) -> dict[str, float]:
    """Errors of a parallelized model on this rank, of the loss, the logits and each gradient; and what unparallelize leaves."""
    batch = KINDS[kind]
    model = build(name)
    with Wide(), torch.no_grad():
        before = model(input_ids=batch.ids, use_cache=False).logits
    longspan.parallelize(model, None, order=order, loss="sum", **options)
    with Wide():
        out = model(**batch.arguments())
        out.loss.backward()
    longspan.sum_gradients(model)
    loss = out.loss.detach().clone()
    dist.all_reduce(loss)
    got = gradients_of(model)
    if got.keys() != want.gradients.keys():
        raise AssertionError(f"gradients of other parameters: {sorted(got.keys() ^ want.gradients.keys())}")
    errors = {f"gradient of {key}": relative_error(got[key], want.gradients[key]) for key in got}
    errors["loss"] = relative_error(loss, want.loss)
    errors["logits"] = relative_error(layout_of(model).gather(out.logits.detach()), want.logits)
    longspan.unparallelize(model)
    with Wide(), torch.no_grad():
        after = model(input_ids=batch.ids, use_cache=False).logits
    if not torch.equal(before, after):
        raise AssertionError("unparallelize() left a model that computes something else")
    return errors


def check(name: str, kind: str, num_ranks: int, order: Order, **options: Any) -> None:
    want = expected_of(name, kind)
    for rank, errors in enumerate(run_on_ranks(num_ranks, errors_over_ranks, name, kind, order, options, want)):
        error, what = worst_of(errors)
        assert error < TOLERANCE, f"{name} on rank {rank} of {num_ranks}: {what} is off by {error:.1e}"


@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_are_one_process(name: str) -> None:
    check(name, "packed", 2, "zigzag")


def grid_of(names: Iterable[str]) -> list[tuple[str, str, int, Order]]:
    """Name, kind of batch, ranks and order; all but two ranks, zigzag, and packed documents, which each family has for itself."""
    return [
        (name, kind, num_ranks, order)
        for name in names
        for kind in KINDS
        for num_ranks in (1, 2, 4)
        for order in ORDERS
        if (kind, num_ranks, order) != ("packed", 2, "zigzag") and (num_ranks > 1 or order == "zigzag")
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "num_ranks", "order"), grid_of(FAMILIES))
def test_any_ranks_in_any_order(name: str, kind: str, num_ranks: int, order: Order) -> None:
    check(name, kind, num_ranks, order)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3_next", {"exchange": "ring", "softmax_method": "ring"}),
        pytest.param("kimi_linear", {"exchange": "pipelined", "softmax_method": "ring"}, marks=pytest.mark.slow),
        pytest.param("bamba", {"exchange": "all_to_all", "softmax_method": "ulysses"}, marks=pytest.mark.slow),
        pytest.param("mistral", {"softmax_method": "ring"}, marks=pytest.mark.slow),
        pytest.param("gemma2", {"softmax_method": "ulysses"}, marks=pytest.mark.slow),
        pytest.param("gpt_oss", {"softmax_method": "ring"}, marks=pytest.mark.slow),
        pytest.param("minimax", {"exchange": "ring", "softmax_method": "all_gather"}, marks=pytest.mark.slow),
        pytest.param("jamba", {"exchange": "all_gather", "softmax_method": "ulysses"}, marks=pytest.mark.slow),
    ],
)
def test_any_exchange_and_softmax_method(name: str, options: dict[str, Any]) -> None:
    check(name, "packed", 2, "zigzag", **options)


@pytest.mark.parametrize("name", ["qwen2_moe", pytest.param("phimoe", marks=pytest.mark.slow)])
def test_windows_that_masks_alone_have(name: str) -> None:
    check(name, "packed", 2, "zigzag")


@pytest.mark.parametrize("name", ["nemotron", pytest.param("stablelm", marks=pytest.mark.slow)])
def test_attention_that_is_handed_no_keywords(name: str) -> None:
    check(name, "packed", 2, "zigzag")


def decoder_inside() -> float:
    """Error of the logits of OPT, whose head calls the decoder inside of its backbone."""
    import transformers

    sizes = {
        "hidden_size": 24,
        "ffn_dim": 40,
        "word_embed_proj_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    model: Any = transformers.OPTForCausalLM(transformers.OPTConfig(vocab_size=61, **sizes)).double().eval()
    with torch.no_grad():
        want = model(input_ids=PLAIN.ids, use_cache=False).logits
        got = longspan.parallelize(model, None)(input_ids=PLAIN.ids).logits
    return relative_error(layout_of(model).gather(got), want)


def test_a_head_may_call_the_decoder_inside_of_its_backbone() -> None:
    assert all(error < TOLERANCE for error in run_on_ranks(2, decoder_inside))


def test_keys_of_rwkv_may_be_far_apart() -> None:
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

    generator = torch.Generator().manual_seed(0)
    decay, first = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    key = 100.0 * torch.randn(2, 40, 5, generator=generator, dtype=torch.float64)
    value = torch.randn(2, 40, 5, generator=generator, dtype=torch.float64)
    call = ParallelCall(longspan.SequenceLayout.local(40), ParallelOptions())
    got, _ = rwkv_linear_attention(call, decay, first, key, value)
    with Wide():
        want, _ = rwkv_linear_attention_cpu(decay, first, key, value)
    assert relative_error(got, want) < 1e-12
