"""Softmax attention refuses what does not fit, on every rank, before anything is exchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.attention.softmax import softmax_attention, write_softmax
from longspan.errors import InputError, LayoutError
from longspan.exchange import record_traffic
from longspan.layout import SequenceLayout
from tests.attention.softmax_reference import random_inputs
from tests.ranks import raised, run_on_ranks


def good_inputs(tokens: int = 8) -> dict[str, Any]:
    q, k, v, _ = random_inputs(15, 1, tokens, 4, 2, 8, torch.float32)
    return {"q": q, "k": k, "v": v}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 8, 4, 8).double()}, r"one dtype; got q of torch.float64 and k of torch.float32. Cast"),
        ({"v": torch.zeros(1, 8, 2, 8).bfloat16()}, r"one dtype; got k of torch.float32 and v of torch.bfloat16"),
        ({"q": torch.zeros(1, 8, 3, 8)}, r"multiple of the number of key and value heads; got 3 and 2"),
        ({"v": torch.zeros(1, 8, 4, 8)}, r"the same B, T and H_kv; got k \(1, 8, 2, 8\) and v \(1, 8, 4, 8\)"),
        ({"v": torch.zeros(1, 8, 2, 0)}, r"at least one row, token, head and channel; got v of shape \(1, 8, 2, 0\)"),
        ({"q": torch.zeros(1, 7, 4, 8)}, r"batch rows, tokens and head dimension .* got q \(1, 7, 4, 8\)"),
        ({"q": torch.zeros(8, 4, 8)}, r"takes q \[B, T, H, D\], k .* got q \(8, 4, 8\)"),
        (
            {
                "k": torch.zeros(1, 8, 2, 8).long(),
                "v": torch.zeros(1, 8, 2, 8).long(),
                "q": torch.zeros(1, 8, 4, 8).long(),
            },
            "takes float64, float32, bfloat16, float16; got k of torch.int64",
        ),
        (
            {"q": torch.zeros(0, 8, 4, 8), "k": torch.zeros(0, 8, 2, 8), "v": torch.zeros(0, 8, 2, 8)},
            "at least one row",
        ),
        ({"method": "ulises"}, r"method must be one of 'auto', 'all_gather', 'ring', 'ulysses'; got 'ulises'"),
        ({"window": 0}, r"window must be an integer of at least 1.* got 0"),
        ({"window": 4.0}, r"window must be an integer of at least 1.* got 4.0"),
        ({"window": True}, r"window must be an integer of at least 1.* got True"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        softmax_attention(**{**good_inputs(), **change})


def test_queries_that_do_not_fit_the_written_keys_are_refused() -> None:
    inputs = good_inputs()
    memory = write_softmax(inputs["k"], inputs["v"])
    with pytest.raises(InputError, match="multiple of the number of key and value heads; got 3 and 2"):
        memory.read(torch.zeros(1, 8, 3, 8))


def test_a_planning_layout_cannot_attend() -> None:
    with pytest.raises(LayoutError, match="for_rank"):
        softmax_attention(**good_inputs(4), layout=SequenceLayout.for_rank(8, 2, 0))


def attend_with_bad_inputs(tokens: int, options: dict[str, Any], **change: Tensor) -> tuple[str, int]:
    with record_traffic() as traffic:
        _, message = raised(attend_over, tokens, {**good_inputs(4), **change, **options})
    return message, traffic.num_collectives


def attend_over(tokens: int, inputs: dict[str, Any]) -> Tensor:
    return softmax_attention(**inputs, layout=SequenceLayout(tokens))


def attend_with_wrong_dtype() -> tuple[str, int]:
    return attend_with_bad_inputs(8, {}, q=torch.zeros(1, 4, 4, 8).double())


def read_with_odd_heads() -> str:
    inputs = good_inputs(4)
    memory = write_softmax(inputs["k"], inputs["v"], layout=SequenceLayout(12), method="ulysses")
    _, message = raised(memory.read, inputs["q"])
    return message


def test_bad_input_is_refused_on_all_ranks_before_the_first_collective() -> None:
    for message, num_collectives in run_on_ranks(2, attend_with_bad_inputs, 12, {}):
        assert "takes the 6 tokens that rank" in message
        assert num_collectives == 0
    for message, num_collectives in run_on_ranks(2, attend_with_wrong_dtype):
        assert "one dtype" in message
        assert num_collectives == 0


def test_ulysses_refuses_heads_that_the_ranks_do_not_divide_and_names_the_methods_that_take_them() -> None:
    for message, num_collectives in run_on_ranks(3, attend_with_bad_inputs, 12, {"method": "ulysses"}):
        assert "got 4 heads for 3 ranks. Use method 'ring' or 'all_gather'" in message
        assert message.endswith("a number of ranks that divides the heads: 2 at most")
        assert num_collectives == 0
    for message in run_on_ranks(3, read_with_odd_heads):
        assert "got 4 heads for 3 ranks" in message
