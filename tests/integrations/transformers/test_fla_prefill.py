"""A prompt of flash-linear-attention's models prefilled over ranks leaves the package's own cache, and the same tokens follow.

As in test_fla.py its models run over PyTorch functions in place of its kernels; the last test is with the kernels, on a GPU.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import longspan
from longspan.layout import Order
from tests.compare import relative_error, worst_of
from tests.integrations.transformers.families import FLA_FAMILIES, build
from tests.integrations.transformers.fla_on_cpu import ignores_warnings, needs_fla
from tests.integrations.transformers.prompts import (
    GREEDY,
    TOLERANCE,
    compare,
    continued,
    empty_cache,
    expected,
    of_ranks,
    prompt,
    tensors_of,
)
from tests.integrations.transformers.reference import Wide
from tests.integrations.transformers.test_fla import WITH_KERNELS, on_cpu
from tests.integrations.transformers.test_prefill import compare_short, dtypes_of, shortest
from tests.integrations.transformers.test_prefill_decoding import a_loop_by_hand
from tests.ranks import raised, run_on_ranks

pytestmark = [needs_fla, ignores_warnings]


def check(name: str, num_ranks: int, order: Order, to: str) -> None:
    want = on_cpu(expected, name)
    compare(want, run_on_ranks(num_ranks, on_cpu, of_ranks, name, order, to, None), name, order, to)


@pytest.mark.parametrize("name", FLA_FAMILIES)
def test_two_ranks_are_one_process(name: str) -> None:
    check(name, 2, "zigzag", "last")


@pytest.mark.parametrize(("order", "to"), [("contiguous", "last"), ("zigzag", "all")])
@pytest.mark.parametrize("name", ["fla_rwkv6", "fla_samba"])
def test_other_orders_and_targets(name: str, order: Order, to: str) -> None:
    check(name, 2, order, to)


@pytest.mark.slow
@pytest.mark.parametrize("name", FLA_FAMILIES)
def test_every_family(name: str) -> None:
    check(name, 2, "contiguous", "all")
    check(name, 4, "contiguous", "last")
    check(name, 4, "zigzag", "last")
    check(name, 3, "zigzag", "all")
    check(name, 1, "zigzag", "last")


@pytest.mark.parametrize("length", [2, 3])
@pytest.mark.parametrize("name", ["fla_gated_deltanet", "fla_mamba2"])
def test_a_prompt_of_a_token_a_rank(name: str, length: int) -> None:
    """Shorter than convolutions, and than the segments that give rank 0 the last token."""
    compare_short(run_on_ranks(2, on_cpu, shortest, name, length))


@pytest.mark.slow
@pytest.mark.parametrize("name", FLA_FAMILIES)
def test_a_prompt_of_a_token_a_rank_in_every_family(name: str) -> None:
    compare_short(run_on_ranks(2, on_cpu, shortest, name, 2))


@pytest.mark.parametrize("name", ["fla_gla", "fla_mla"])
def test_calls_with_its_cache_decode_on_one_rank(name: str) -> None:
    found, nothing = run_on_ranks(2, on_cpu, a_loop_by_hand, name)
    assert nothing is None
    assert torch.equal(*found)


@pytest.mark.slow
@pytest.mark.parametrize("name", FLA_FAMILIES)
def test_dtypes_of_a_bfloat16_model(name: str) -> None:
    assert run_on_ranks(2, on_cpu, dtypes_of, name) == [[], []]


def sent_by_rank(name: str, length: int) -> int:
    model: Any = longspan.parallelize(build(name), None, order="contiguous")
    with longspan.record_traffic() as traffic:
        longspan.prefill(model, prompt(2, length))
    return traffic.of_phase("prefill").bytes_sent


def test_a_window_sends_what_it_will_see() -> None:
    """Two layers with windows of 9 tokens, 2 heads of 6: the last rank has all, or all but one."""
    bytes_of_a_token = 2 * 2 * 2 * 2 * 6 * 8
    assert run_on_ranks(2, on_cpu, sent_by_rank, "fla_transformer", 18) == [0, 0]
    assert run_on_ranks(2, on_cpu, sent_by_rank, "fla_transformer", 16) == [bytes_of_a_token, 0]


def what_kernels_may_change_in_place() -> list[str]:
    """Memories of layers that are not contiguous, or share what they are stored in with others."""
    model: Any = longspan.parallelize(build("fla_rwkv6"), None)
    cache = longspan.prefill(model, prompt(), to="all").cache
    found = [part for state in cache for part in state.values() if isinstance(part, Tensor)]
    storages = {part.untyped_storage().data_ptr() for part in found}
    assert len(storages) == len(found), "memories share storage"
    return [str(tuple(part.shape)) for part in found if not part.is_contiguous()]


def test_memories_are_contiguous_and_apart() -> None:
    assert run_on_ranks(2, on_cpu, what_kernels_may_change_in_place) == [[], []]


# Longer than the 64 tokens up to which layers take another kernel whatever their mode.
LONG = 130


def parallel_mode() -> tuple[dict[str, float], bool]:
    """Errors of the cache of a layer whose kernel for long prompts returns no state, and whether the package's own has one."""
    ids = prompt(1, LONG)
    want = build("fla_retnet")
    model: Any = build("fla_retnet", attn_mode="parallel")
    with Wide(), torch.no_grad():
        cache = empty_cache(want)
        want(ids, past_key_values=cache, use_cache=True)
        own = empty_cache(model)
        model(ids, past_key_values=own, use_cache=True)
        found = tensors_of(longspan.prefill(longspan.parallelize(model, None), ids, to="all").cache, model)
    expected = tensors_of(cache, want)
    assert found.keys() == expected.keys()
    return {key: relative_error(found[key], expected[key]) for key in expected}, own[0]["recurrent_state"] is not None


def test_a_state_that_the_package_itself_forgets() -> None:
    """RetNet in its parallel mode: in one process the package continues a prompt of more than 64 tokens without a state."""
    for errors, has_state in run_on_ranks(2, on_cpu, parallel_mode):
        assert worst_of(errors)[0] < TOLERANCE
        assert not has_state


def refused(what: str) -> tuple[str, str]:
    model: Any = build("fla_gla")
    match what:
        case "no index":
            model.model.layers[1].attn.layer_idx = None
        case "two packages":
            from transformers import Qwen3Config
            from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

            model.model.layers[1].attn = Qwen3Attention(Qwen3Config(), 1)
    longspan.parallelize(model, None)
    if what == "generate":
        return raised(lambda: model.generate(prompt(), **GREEDY))
    if what == "a cache of the package":
        return raised(lambda: model.generate(prompt(), past_key_values=empty_cache(model), **GREEDY))
    return raised(lambda: longspan.prefill(model, prompt()))


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("no index", "GatedLinearAttention of GLAForCausalLM has no layer_idx"),
        ("two packages", "(GatedLinearAttention, Qwen3Attention)"),
        ("generate", "longspan.prefill(model, input_ids[:, :-1])"),
        ("a cache of the package", "longspan.prefill(model, input_ids[:, :-1])"),
    ],
)
def test_refusals(what: str, says: str) -> None:
    for kind, message in run_on_ranks(2, on_cpu, refused, what):
        assert kind == "InputError", message
        assert says in message


def a_layer_that_keeps_nothing() -> tuple[str, str]:
    model: Any = longspan.parallelize(build("fla_gla"), None)
    layers: Any = import_module("fla.layers.gla")
    update, layers.update_layer_cache = layers.update_layer_cache, lambda *_, **__: None
    try:
        return raised(lambda: longspan.prefill(model, prompt()))
    finally:
        layers.update_layer_cache = update


def test_a_layer_that_keeps_nothing_raises() -> None:
    for kind, message in run_on_ranks(2, on_cpu, a_layer_that_keeps_nothing):
        assert kind == "LayoutError" and "layers [0, 1] put neither" in message


# ------------------------------------------------------------------------------------------------- with its kernels


def compare_in_half_precision(name: str, device: str) -> None:
    """Our cache is laid out as the package's, as near to float64 within a factor of two in the median, and is decoded from."""
    options, ids = {"hidden_size": 64, **WITH_KERNELS[name]}, prompt(length=128)

    def cache_of(model: Any, device: str) -> dict[str, Tensor]:
        cache = empty_cache(model)
        with torch.no_grad():
            model(ids.to(device), past_key_values=cache, use_cache=True)
        return tensors_of(cache, model)

    with Wide():
        want = on_cpu(cache_of, build(name, **options), "cpu")
    model: Any = build(name, **options).to(device, torch.bfloat16)
    theirs = cache_of(model, device)
    longspan.parallelize(model, None)
    cache = longspan.prefill(model, ids.to(device)).cache
    ours = tensors_of(cache, model)
    assert {key: (x.shape, x.dtype) for key, x in ours.items()} == {
        key: (x.shape, x.dtype) for key, x in theirs.items()
    }
    medians = []
    for found in (theirs, ours):
        # What is counted has no error.
        errors = [relative_error(found[key], memory) for key, memory in want.items() if memory.is_floating_point()]
        medians.append(float(torch.tensor(errors).median()))
    assert medians[0] < 0.5, "the package's own code is no yardstick"
    assert medians[1] < 2 * medians[0]
    rest = longspan.prefill(model, ids[:, :-1].to(device)).cache
    assert continued(model, rest, ids.to(device)).shape[1] == GREEDY["max_new_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_KERNELS)
def test_in_half_precision_it_is_as_near_as_its_own_references(name: str) -> None:
    on_cpu(compare_in_half_precision, name, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels of flash-linear-attention need a GPU")
@pytest.mark.parametrize("name", WITH_KERNELS)
def test_on_a_gpu_it_is_as_near_as_its_own_kernels(name: str) -> None:
    compare_in_half_precision(name, "cuda")
