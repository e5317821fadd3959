"""A prompt prefilled over ranks leaves the cache that Transformers makes in one process, and the same tokens follow."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import longspan
from longspan.layout import Order
from tests.compare import relative_error, worst_of
from tests.integrations.transformers.families import build
from tests.integrations.transformers.prompts import (
    FEW,
    TOLERANCE,
    WITH_CACHE,
    check,
    continued,
    empty_cache,
    expected,
    name_of_cache,
    prompt,
    tensors_of,
)
from tests.integrations.transformers.reference import Wide
from tests.integrations.transformers.test_rotary import KINDS
from tests.ranks import run_on_ranks

PROJECT_ROOT = Path(__file__).resolve().parents[3]


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(qwen3|minimax)$")
@pytest.mark.parametrize("name", FEW)
def test_two_ranks_are_one_process(name: str) -> None:
    check(name, 2, "zigzag", "last")


@pytest.mark.parametrize(("order", "to"), [("contiguous", "last"), ("zigzag", "all")])
def test_other_orders_and_targets(order: Order, to: str) -> None:
    check("qwen3_next", 2, order, to)


@pytest.mark.parametrize("rope", KINDS)
def test_frequencies_that_look_at_the_longest_position(rope: str) -> None:
    check("llama", 2, "zigzag", "last", rope)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_CACHE)
def test_every_family(name: str) -> None:
    for num_ranks in (2, 4):
        for order in ("contiguous", "zigzag"):
            check(name, num_ranks, order, "last")
    check(name, 3, "zigzag", "all")
    check(name, 1, "zigzag", "last")


def dtypes_of(name: str) -> list[tuple[str, torch.dtype, torch.dtype]]:
    """Where a bfloat16 model's cache differs in dtype from Transformers' own."""
    model: Any = build(name).bfloat16()
    ids = prompt()
    with torch.no_grad():
        cache = empty_cache(model)
        model(ids, use_cache=True, **{name_of_cache(model): cache})
    want = tensors_of(cache, model)
    longspan.parallelize(model, None)
    got = tensors_of(longspan.prefill(model, ids, to="all").cache, model)
    return [(key, want[key].dtype, got[key].dtype) for key in want if want[key].dtype != got[key].dtype]


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_CACHE)
def test_dtypes_of_a_bfloat16_model(name: str) -> None:
    assert run_on_ranks(2, dtypes_of, name) == [[], []]


def shortest(name: str, length: int) -> tuple[int, dict[str, float] | None]:
    """The rank that has the last token, and there the errors of what is left of a prompt of few tokens."""
    model: Any = build(name)
    ids = prompt(1, length)
    with Wide(), torch.no_grad():
        cache = empty_cache(model)
        want = {"logits": model(ids, use_cache=True, **{name_of_cache(model): cache}).logits[:, -1]}
        want |= tensors_of(cache, model)
        cache, logits, rank = longspan.prefill(
            longspan.parallelize(model, None),
            ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(length)[None],
        )
        if cache is None or logits is None:
            return rank, None
        got = {"logits": logits, **tensors_of(cache, model)}
    return rank, {key: relative_error(got[key], want[key]) for key in want}


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(zamba2-2|recurrent_gemma-3)$")
@pytest.mark.parametrize("length", [2, 3])
@pytest.mark.parametrize("name", ["zamba2", "recurrent_gemma"])
def test_a_prompt_of_a_token_a_rank(name: str, length: int) -> None:
    """Shorter than convolutions, and than the segments that give rank 0 the last token."""
    check_short(name, length)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_CACHE)
def test_a_prompt_of_a_token_a_rank_in_every_family(name: str) -> None:
    check_short(name, 2)


def check_short(name: str, length: int) -> None:
    compare_short(run_on_ranks(2, shortest, name, length))


def compare_short(found: list[tuple[int, dict[str, float] | None]]) -> None:
    first, (owner, errors) = found
    assert first == (1, None)
    assert errors is not None
    assert owner == 1
    assert worst_of(errors)[0] < TOLERANCE


def sent_by_rank(name: str, length: int) -> int:
    model: Any = longspan.parallelize(build(name), None, order="contiguous")
    with longspan.record_traffic() as traffic:
        longspan.prefill(model, prompt(2, length))
    return traffic.of_phase("prefill").bytes_sent


def test_what_one_rank_decodes_with_is_sent_to_it_alone() -> None:
    """Keys and values of two softmax layers, 2 heads of 12; the last inputs of convolutions are on the last rank."""
    bytes_of_a_token = 2 * 2 * 2 * 2 * 12 * 8
    assert run_on_ranks(2, sent_by_rank, "qwen3_next", 29) == [15 * bytes_of_a_token, 0]


def test_a_window_sends_what_it_will_see() -> None:
    """Two layers with windows of 9 tokens, 2 heads of 6: 8 tokens, of which the last rank has all or all but one."""
    bytes_of_a_token = 2 * 2 * 2 * 2 * 6 * 8
    assert run_on_ranks(2, sent_by_rank, "mistral", 16) == [0, 0]
    assert run_on_ranks(2, sent_by_rank, "mistral", 15) == [bytes_of_a_token, 0]


def test_one_rank_needs_no_process_group() -> None:
    model: Any = longspan.parallelize(build("recurrent_gemma"), None)
    ids = prompt()
    with Wide():
        cache = longspan.prefill(model, ids[:, :-1]).cache
        assert torch.equal(continued(model, cache, ids), expected("recurrent_gemma").following)


def run_blocks_of_the_page() -> None:
    torch.manual_seed(0)
    page = PROJECT_ROOT / "docs" / "transformers_generation.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": "page"})


def test_the_blocks_of_the_page_run() -> None:
    run_on_ranks(2, run_blocks_of_the_page)


@pytest.mark.slow
def test_the_example_runs() -> None:
    example = PROJECT_ROOT / "examples" / "generate_long_prompt.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(example)]
    result = subprocess.run(
        [*command, "--tokens", "64", "--new-tokens", "4"],
        env={**os.environ, "PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert "64 tokens over 2 ranks: the same 4 tokens as in one process" in result.stdout
